"""The server as a process of its own, so that its memory is its own and its death is seen."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from nemoport.runner.serve import Addresses

PORTS = [f"--{door}-port=0" for door in ("http", "grpc", "metrics")] + [
    f"--{door}-address=127.0.0.1" for door in ("http", "grpc", "metrics")
]


@contextmanager
def served(repository: Path, *flags: str) -> Iterator[tuple[Addresses, psutil.Process]]:
    """Until the block ends; then the process must still be there, and end well when it is told to."""
    with started(repository, *flags) as (addresses, process):
        yield addresses, psutil.Process(process.pid)
        assert process.poll() is None, log_of(repository)[-4000:]
        process.terminate()
        assert process.wait(30) == 0, log_of(repository)[-4000:]


@contextmanager
def started(repository: Path, *flags: str) -> Iterator[tuple[Addresses, subprocess.Popen[bytes]]]:
    """It is dead after the block, however it ends."""
    log = repository.parent / "server.log"
    command = [sys.executable, "-m", "nemoport", "serve", str(repository), *PORTS, *flags]
    with log.open("w") as sink, subprocess.Popen(command, stderr=sink) as process:
        try:
            yield _addresses(process, log), process
        finally:
            process.kill()


def log_of(repository: Path) -> str:
    return (repository.parent / "server.log").read_text()


def _addresses(process: subprocess.Popen[bytes], log: Path) -> Addresses:
    for _ in range(600):
        at = dict(re.findall(r"Started (\S+)(?: Service)? at (\S+)", log.read_text()))
        if "GRPCInferenceService" in at:
            return Addresses(at["HTTPService"], at["GRPCInferenceService"], at["Metrics"])
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        break
    raise AssertionError(f"the server did not start: {log.read_text()[-4000:]}")


def anonymous(process: psutil.Process) -> int:
    """Bytes of memory that are not of files."""
    memory = process.memory_info()
    return int(memory.rss - memory.shared)
