"""One writer at a time: a lock whose owner others can see, and which ends.

It is `flock` on REPO.evidence/.lock, which the kernel lets go when its process ends, however it ends; in the file
stands who holds it. Where `flock` does not reach from one host to another, as on some network file systems, the words
in the file count: a lease that its owner renews, and that others respect until it expires. An owner on this host who
holds no `flock` is gone, and an expired one is taken for gone: their locks are stale, and taken over with a warning.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from nemoport.errors import MachineError

log = logging.getLogger(__name__)

EXPIRY = 60.0
"""Seconds for which a lease stands; its owner renews it three times as often."""
PATIENCE = 600.0
"""Seconds to wait for another writer: a promotion is quick, a large copy is not."""


@dataclass(frozen=True, kw_only=True)
class Owner:
    user: str
    host: str
    pid: int
    since: float
    until: float
    """Seconds since 1970, both."""

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.since))
        return f"{self.user}@{self.host}, process {self.pid}, since {since}"


def ourselves() -> Owner:
    now = time.time()
    return Owner(user=user(), host=socket.gethostname(), pid=os.getpid(), since=now, until=now + EXPIRY)


def user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"uid {os.getuid()}"


def as_bytes(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner)) + "\n").encode()


def read_owner(content: bytes) -> Owner | None:
    """None where nobody holds it, or the words are torn."""
    with suppress(ValueError, TypeError):
        return Owner(**json.loads(content))
    return None


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock while the block runs; `what` is for whoever waits."""
    with path.open("a+b") as file:
        _take(file, what)
        ended = threading.Event()
        renewal = threading.Thread(target=_renew, args=(file, ended), daemon=True, name="lease")
        renewal.start()
        try:
            yield
        finally:
            ended.set()
            renewal.join()
            file.truncate(0)


def _take(file: IO[bytes], what: str) -> None:
    end, told = time.monotonic() + PATIENCE, False
    while True:
        ours = _flocked(file)
        owner = _owner(file)
        here = owner is not None and owner.host == socket.gethostname()
        if ours and (owner is None or here or owner.until < time.time()):
            if owner:
                log.warning("the lock of %s on %s is stale and was taken over", owner, what)
            _write(file, ourselves())
            return
        if ours:
            fcntl.flock(file, fcntl.LOCK_UN)
        if time.monotonic() > end:
            raise MachineError(
                f"{what} is being changed by another nemoport ({owner or 'who does not say its name'}) for more than "
                f"{PATIENCE:.0f} s; run this again when it is done"
            )
        if not told and time.monotonic() > end - PATIENCE + 1:
            log.warning("%s is being changed by %s; waiting for it", what, owner or "another nemoport")
            told = True
        time.sleep(0.05)


def _flocked(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(file: IO[bytes]) -> Owner | None:
    return read_owner(os.pread(file.fileno(), 4096, 0))


def _write(file: IO[bytes], owner: Owner) -> None:
    file.truncate(0)
    file.write(as_bytes(owner))  # opened to append: at the end, which is the beginning
    file.flush()


def _renew(file: IO[bytes], ended: threading.Event) -> None:
    since = time.time()
    while not ended.wait(EXPIRY / 3):
        now = ourselves()
        _write(file, Owner(**{**asdict(now), "since": since}))
