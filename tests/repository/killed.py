"""Run a function in a process that is killed just before its n-th change of the file system."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

CHANGES = {
    *("os.link", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.rmtree"),
}
NEVER = sys.maxsize

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    [
        *("nemoport.repository.labels", "nemoport.repository.transfer", "fsspec.implementations.local"),
        "nemoport.compilers.compile",
    ]
)


def kill_before(change: int, function: Callable[..., object], *arguments: object) -> None:
    """The function must have that many changes to make."""
    process = _processes.Process(target=_run, args=(change, None, function, arguments))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL, f"ended with {process.exitcode} before change {change}"
    process.close()


def count_changes(function: Callable[..., object], *arguments: object) -> int:
    """Run the function undisturbed; the changes it made."""
    receiver, sender = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_run, args=(NEVER, sender, function, arguments))
    process.start()
    process.join()
    assert process.exitcode == 0, f"ended with {process.exitcode}"
    process.close()
    with receiver, sender:
        return int(receiver.recv())


def _run(
    change: int, report: Connection | None, function: Callable[..., object], arguments: tuple[object, ...]
) -> None:
    made = 0

    def watch(event: str, found: tuple[Any, ...]) -> None:
        nonlocal made
        writes = event == "open" and isinstance(found[2], int) and found[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            made += 1
            if made == change:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    function(*arguments)
    if report:
        report.send(made)


def started(function: Callable[..., object], *arguments: object) -> tuple[Any, Connection]:
    """A process that waits for `go`, so that others can learn its id before it does anything."""
    receiver, sender = _processes.Pipe(duplex=False)
    process = _processes.Process(target=_wait_and_run, args=(receiver, function, arguments))
    process.start()
    return process, sender


def go(waiting: tuple[Any, Connection]) -> None:
    """Let it run; it must be killed by somebody."""
    process, sender = waiting
    sender.send(None)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, f"ended with {process.exitcode}"
    process.close()
    sender.close()


def _wait_and_run(receiver: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    receiver.recv()
    function(*arguments)
