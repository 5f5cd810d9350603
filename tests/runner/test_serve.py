"""The server as a process: its options, its signals, its exit."""

from __future__ import annotations

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

from nemoport.cli import main
from nemoport.errors import MachineError, UsageError
from nemoport.runner.serve import ServeOptions, check_options, load_models, serve, serving
from nemoport.runner.server import Server

from .models import linear, write_model

PORTS = [f"--{door}-port=0" for door in ("http", "grpc", "metrics")] + [
    f"--{door}-address=127.0.0.1" for door in ("http", "grpc", "metrics")
]
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
