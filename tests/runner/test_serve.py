"""The server as a process: its options, its signals, its exit."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from tritonserver import usage

from nemoport.cli import main
from nemoport.errors import MachineError, UsageError
from nemoport.runner.serve import ServeOptions, check_options, load_models, serve, serving
from nemoport.runner.server import Server

from .models import linear, write_model
from .served import PORTS, served
from .test_http import ask

FALLBACK = "executed on the CPU by --allow-cpu-fallback"
PROGRAM = """
import sys
from pathlib import Path
from nemoport.runner.serve import ServeOptions, serve
here = dict(http_address="127.0.0.1", grpc_address="127.0.0.1", http_port=0, grpc_port=0, metrics_port=0)
serve(ServeOptions((Path(sys.argv[1]),), **here))
print("done")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_process_in_order(tmp_path: Path, number: signal.Signals) -> None:
    write_model(tmp_path, "m", linear())
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            for line in process.stderr:
                if found := re.search(r"Started HTTPService at (\S+)", line):
                    break
            assert found
            with urllib.request.urlopen(f"http://{found[1]}/v2/health/ready", timeout=10) as answer:
                assert answer.status == 200
            process.send_signal(number)
            output, log = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, output) == (0, "done\n"), log


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ServeOptions((Path(),), model_control_mode="pull"),
            "--model-control-mode=pull is none of",
        ),
        (ServeOptions((Path(),), load_model=("a",)), "--load-model needs --model-control-mode=explicit"),
        (
            ServeOptions((Path(),), model_control_mode="explicit", load_model=("*", "a")),
            r"--load-model=\* loads every model",
        ),
        (ServeOptions((Path(),), allow_http=False, allow_grpc=False), "neither HTTP nor gRPC is allowed"),
        (ServeOptions(()), "no --model-repository is given"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: ServeOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_options(options)


def test_a_port_for_metrics_that_is_taken_is_named_before_models_load(tmp_path: Path) -> None:
    write_model(tmp_path, "m", linear())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        options = ServeOptions((tmp_path,), http_address="127.0.0.1", http_port=0, metrics_port=port)
        with pytest.raises(MachineError, match=f"{port}.*choose another --metrics-port"):
            serve(options)
        with pytest.raises(MachineError, match=f"{port}.*choose another --grpc-port"):
            serve(replace(options, metrics_port=0, grpc_address="127.0.0.1", grpc_port=port))


def test_options_reach_the_models(tmp_path: Path) -> None:
    write_model(tmp_path, "m", linear(), "instance_group { kind: KIND_GPU }")
    server = load_models(ServeOptions((tmp_path,), allow_cpu_fallback=True))
    assert server.find("m").version == 1


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MachineError, match=f"cannot serve HTTP at 127.0.0.1:{port}"), serving(Server(), port):
            pass


def test_flags_of_tritonserver_that_do_nothing_here_are_accepted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--backend-config", "python,a=b", "--trace-config=rate=1", "--model-control-mode=explicit"]
    ended = CliRunner().invoke(main, ["serve", str(tmp_path), *flags, "--load-model=m", *PORTS])
    assert ended.exit_code != 0  # the model is not there
    assert "--backend-config is accepted and changes nothing" in caplog.text
    assert "this server does not have tracing" in caplog.text


def test_every_flag_of_tritonserver_is_known_and_stands_in_its_group() -> None:
    ours = CliRunner().invoke(main, ["serve", "--help"]).output
    theirs, found = _grouped(usage()), _grouped(ours)
    assert set(theirs) <= set(found)
    for title, flags in theirs.items():
        assert flags - found[title] - {"--help"} == set(), title


def _grouped(text: str) -> dict[str, set[str]]:
    groups: dict[str, set[str]] = {}
    for title, *flags in re.findall(r"^(?:([A-Z][\w/ ]+):$|  (--[\w-]+)(?:, (--[\w-]+))?)", text, re.MULTILINE):
        if title:
            groups[title] = set()
        elif groups:
            list(groups.values())[-1].update(filter(None, flags))
    return {title: flags for title, flags in groups.items() if flags}


def test_the_log_goes_where_and_how_it_is_told_to(tmp_path: Path) -> None:
    write_model(tmp_path / "repository", "m", linear(), "instance_group { kind: KIND_GPU }")
    flags = ("--id=mine", "--log-verbose=2", "--log-format=ISO8601", "--allow-cpu-fallback", "--rate-limit=off")
    with served(tmp_path / "repository", *flags) as (addresses, _):
        settings = json.loads(ask(addresses.http, "/v2/logging").body)
        assert (settings["log_verbose_level"], settings["log_format"]) == (2, "ISO8601")
        assert json.loads(ask(addresses.http, "/v2").body)["name"] == "mine"
        (row,) = json.loads(ask(addresses.http, "/v2/repository/index", b"").body)
        assert (row["state"], row["reason"]) == ("READY", f"instance_group: KIND_GPU, {FALLBACK}")
    log = (tmp_path / "server.log").read_text()
    assert FALLBACK in log
    assert "--rate-limit is accepted and changes nothing: this server does not have the rate limiter" in log
    assert re.search(r"\dT[0-9:]+Z INFO ", log)


@pytest.mark.parametrize("flag", ["--metrics-config=summary_latencies=1", "--metrics-config=x", "--log-format=x"])
def test_settings_that_are_none_are_refused_before_anything_is_loaded(tmp_path: Path, flag: str) -> None:
    ended = CliRunner().invoke(main, ["serve", str(tmp_path), flag, *PORTS])
    assert ended.exit_code == 2
    assert flag.rpartition("=")[2] in ended.output
