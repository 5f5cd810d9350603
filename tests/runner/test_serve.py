"""The server as a process: its options, its signals, its exit."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from nemoport.errors import MachineError, UsageError
from nemoport.runner.serve import ServeOptions, check_options, load_models, serving
from nemoport.runner.server import Server

from .models import linear, write_model

PROGRAM = """
import sys
from pathlib import Path
from nemoport.runner.serve import ServeOptions, serve
serve(ServeOptions((Path(sys.argv[1]),), http_address="127.0.0.1", http_port=0))
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
        (ServeOptions((Path(),), model_control_mode="poll"), "--model-control-mode=poll is not done"),
        (ServeOptions((Path(),), load_model=("a",)), "--load-model needs --model-control-mode=explicit"),
        (
            ServeOptions((Path(),), model_control_mode="explicit", load_model=("*", "a")),
            r"--load-model=\* loads every model",
        ),
        (ServeOptions(()), "no --model-repository is given"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: ServeOptions, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_options(options)


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
