"""A directory that is there whole or not at all: written beside its place under a name of its own, then renamed.

A process that was killed leaves that name. It is always the same for a place, so whoever writes there next takes it
over, emptied.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemoport.artifact import settle_on_disk, sync_directory
from nemoport.errors import UsageError


def check_free(destination: Path) -> None:
    if os.path.lexists(destination):
        raise UsageError(f"{destination} exists; remove it, or choose another directory with -o")


@contextmanager
def unfinished(destination: Path) -> Iterator[Path]:
    """An empty directory, which is `destination` once the block has ended, on the disk; removed where it fails. One
    process at a time."""
    check_free(destination)
    scratch = destination.with_name(f".{destination.name}.unfinished")
    scratch.mkdir(parents=True, exist_ok=True)
    handle = os.open(scratch, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _hold(handle, destination)
        try:
            check_free(destination)  # another process may have come first
            for entry in scratch.iterdir():
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            yield scratch
            settle_on_disk(scratch)
            scratch.rename(destination)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        sync_directory(destination.parent)
    finally:
        os.close(handle)


def _hold(handle: int, destination: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"another nemoport is writing {destination}; wait for it, or choose another directory with -o"
        ) from None
