"""The end of the process, while something is under way."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from .python_models import ECHO, X_CONFIG, write_python
from .served import log_of, started
from .test_control import until
from .test_http import Reply, ask
from .test_same_python_models import X, infer

WAITS = """
import time
from pathlib import Path

def wait(place):
    Path(place, "begun").touch()
    while not Path(place, "go").exists():
        time.sleep(0.01)
"""
INITIALIZES = WAITS + ECHO.replace(
    "    def execute", "    def initialize(self, args):\n        wait({place})\n\n    def execute"
)
EXECUTES = WAITS + ECHO.replace("        arrays", "        wait({place})\n        arrays")
EXPLICIT = ("--model-control-mode=explicit",)
POLLED = ("--model-control-mode=poll", "--repository-poll-secs=1")


def write(repository: Path, name: str, code: str) -> None:
    """It waits for the file `go` beside the repository, and says with `begun` that it does."""
    write_python(repository, name, code.replace("{place}", repr(str(repository.parent))), X_CONFIG)


def load(address: str) -> Reply:
    return ask(address, "/v2/repository/models/slow/load", b"")


def request(address: str) -> Reply:
    path, body = infer("slow", X)[:2]
    return ask(address, path, body)


def nothing(address: str) -> None:
    """Polling will find it."""


@pytest.mark.parametrize(
    "code, flags, do, named",
    [
        (INITIALIZES, EXPLICIT, load, "the load of 'slow'"),
        (INITIALIZES, POLLED, nothing, "the load of 'slow'"),
        (EXECUTES, (*EXPLICIT, "--load-model=slow"), request, "requests of 'slow' version 1"),
    ],
)
def test_the_process_ends_within_its_limit_and_names_what_was_under_way(
    tmp_path: Path, code: str, flags: tuple[str, ...], do: Callable[[str], Reply | None], named: str
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    if do is not nothing:
        write(repository, "slow", code)
    with (
        ThreadPoolExecutor(1) as pool,
        started(repository, *flags, "--exit-timeout-secs=1") as (addresses, process),
    ):
        if do is nothing:
            write(repository, "slow", code)
        reply = pool.submit(do, addresses.http)
        until((tmp_path / "begun").exists)
        process.terminate()
        assert process.wait(30) == 1  # nothing ever lets the model go on
        told = reply.result(30)
    assert f"--exit-timeout-secs=1, exiting; under way: {named}" in log_of(repository)
    if told is not None:
        assert (told.status, told.headers["content-type"]) == (503, "application/json")
        assert "the server ends" in told.error


def test_a_request_under_way_is_answered_at_the_end(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write(repository, "slow", EXECUTES)
    with ThreadPoolExecutor(1) as pool, started(repository) as (addresses, process):
        reply = pool.submit(request, addresses.http)
        until((tmp_path / "begun").exists)
        process.terminate()
        until(lambda: refused(addresses.http))
        (tmp_path / "go").touch()
        assert reply.result(30).json["outputs"][0]["data"] == [1]
        assert process.wait(30) == 0


def refused(address: str) -> bool:
    try:
        ask(address, "/v2/health/live")
    except OSError:
        return True
    return False
