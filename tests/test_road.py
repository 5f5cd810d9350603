"""The whole road, walked as a user walks it: from the directory that Megatron wrote to a model that is served."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.http as triton
from numpy.typing import NDArray

DATA = Path(__file__).parent / "data" / "megatron"
MCORE = DATA / "mcore" / "llama_te_tp2pp2"
CONFIG = DATA / "mcore" / "llama_te_tp2pp2.cfg.json"
OTHER = DATA / "hf" / "llama"
ANSWERS = DATA / "mcore" / "llama_te_tp1pp1.ref.npz"
NEMOPORT = [sys.executable, "-m", "nemoport"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # so that tests can run beside each other


def test_the_road_from_a_checkpoint_to_a_served_model(tmp_path: Path) -> None:
    repository, first = tmp_path / "models", tmp_path / "first"

    seen = said("inspect", MCORE, "--config", CONFIG)
    assert (seen["format"], seen["family"]) == ("torch_dist", "llama")

    said("convert", MCORE, "--config", CONFIG, "--to", "onnx", "--dtype", "float32", "-o", first)
    assert said("validate", first)["models"][0]["answers"] == json.loads((first / "report.json").read_bytes())

    bare = tmp_path / "bare"
    said("convert", MCORE, "--config", CONFIG, "--to", "onnx", "--dtype", "float32", "-o", bare)
    staged = said("publish", bare, "--model-repository", repository, "--name", "llama")
    assert (staged["version"], staged["state"]) == (1, "staging-1")
    refused = run("repo", "promote", repository, "llama")
    assert (refused.returncode, refused.stdout) == (5, "")
    assert "never validated" in refused.stderr
    assert said("validate", repository, "--model", "llama")["passed"]
    assert said("repo", "promote", repository, "llama")["live"] == [1]
    check_served(repository, "1")

    second = tmp_path / "second"
    said("convert", OTHER, "--to", "onnx", "--dtype", "float32", "-o", second)
    assert said("validate", second, "--against", MCORE, "--config", CONFIG)["passed"]
    live = said("publish", second, "--model-repository", repository, "--name", "llama", "--promote")
    assert (live["version"], live["state"]) == (2, "live")
    (row,) = said("repo", "list", repository)["models"]
    assert (row["model"], row["live"], row["staged"], row["unlisted"]) == ("llama", [1, 2], [], [])
    assert [version["verdict"] for version in row["versions"]] == ["green", "green"]
    check_served(repository, "2")


def test_the_road_to_ranks(tmp_path: Path) -> None:
    ranks = tmp_path / "ranks"
    said("convert", MCORE, "--config", CONFIG, "--to", "trtllm", "--tp", "2", "-o", ranks)
    assert {path.name for path in ranks.glob("rank*")} == {"rank0.safetensors", "rank1.safetensors"}
    shown = run("validate", ranks)
    assert shown.returncode == 0, shown.stderr
    assert "simulating 2 ranks" in shown.stdout
    assert shown.stdout.rstrip().endswith("passed")


def check_served(repository: Path, version: str) -> None:
    """A client that knows nothing of nemoport gets megatron-core's own logits."""
    known = np.load(ANSWERS)
    tokens, wanted = known["tokens"].astype(np.int64), known["logits_fp32"]
    length = tokens.shape[1]
    with served(repository) as address, triton.InferenceServerClient(address) as client:
        assert client.is_server_ready()
        assert client.get_model_metadata("llama")["versions"][-1] == version
        half = ask(client, tokens[:, : length // 2], {})
        rest = ask(client, tokens[:, length // 2 :], past(half))
    assert np.abs(half["logits"] - wanted[:, : length // 2]).max() < 1e-4
    assert np.abs(rest["logits"] - wanted[:, length // 2 :]).max() < 1e-4


def ask(client: Any, tokens: NDArray[np.int64], cache: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    inputs = client.get_model_metadata("llama")["inputs"]
    names = [each["name"] for each in inputs if each["name"].startswith("past_key_values.")]
    _, heads, _, size = next(each["shape"] for each in inputs if each["name"] in names)
    cache = cache or {name: np.zeros((len(tokens), heads, 0, size), np.float32) for name in names}
    before = cache[names[0]].shape[2]
    total = before + tokens.shape[1]
    positions = np.broadcast_to(np.arange(before, total), tokens.shape).copy()
    arrays = {"input_ids": tokens, "attention_mask": np.ones((len(tokens), total), np.int64), "position_ids": positions}
    requested = []
    for name, array in {**arrays, **cache}.items():
        requested.append(triton.InferInput(name, array.shape, "FP32" if array.dtype == np.float32 else "INT64"))
        requested[-1].set_data_from_numpy(np.ascontiguousarray(array))
    answer = client.infer("llama", requested)
    return {each["name"]: answer.as_numpy(each["name"]) for each in answer.get_response()["outputs"]}


def past(answer: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.replace("present.", "past_key_values."): x for name, x in answer.items() if name != "logits"}


@contextmanager
def served(repository: Path) -> Iterator[str]:
    """The address of a server in a process of its own, ended by SIGTERM as an orchestrator would."""
    command = [*NEMOPORT, "serve", str(repository), "--http-address", "127.0.0.1", "--http-port", "0"]
    command += ["--allow-grpc", "false", "--allow-metrics", "false"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        try:
            assert process.stderr is not None
            started = (re.search(r"Started HTTPService at (\S+)", line) for line in process.stderr)
            yield next(found[1] for found in started if found)
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=30)
            assert process.returncode == 0, log
        finally:
            process.kill()


def said(*words: object) -> dict[str, Any]:
    """What a command that must succeed prints with --json."""
    done = run(*words, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*NEMOPORT, *map(str, words)], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
