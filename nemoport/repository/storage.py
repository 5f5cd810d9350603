"""Changing a repository on disk: one process at a time, each step one rename, and the disk's refusals in a sentence.

A version becomes visible in three renames, so that a process may be killed anywhere between them:

    1. scratch evidence -> evidence/NAME/publishing-7    7 is about to appear
    2. scratch files    -> NAME/staging-7                a new model: the whole of NAME
    3. publishing-7     -> evidence/NAME/7               from here on the version exists

`changing` finishes what a killed process left: step 3 where step 2 was done, else it drops step 1.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from nemoport.artifact import sync_directory
from nemoport.errors import MachineError
from nemoport.repository import config
from nemoport.repository.versions import (
    STAGED,
    check_name,
    evidence_area,
    evidence_of,
    model_directory,
    staging_area,
)

PUBLISHING = "publishing-"
SCRATCH = ".publish-"
PATIENCE = 60
"""Seconds to wait for another nemoport on the same repository: a promotion is quick, a large copy is not."""

_REFUSALS = {
    errno.ENOSPC: "the disk is full; make room and run the same command again",
    errno.EDQUOT: "the quota is used up; make room and run the same command again",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied to this user",
    errno.EPERM: "permission denied to this user",
    errno.EXDEV: "the repository is a mount of its own, and versions appear in it by a rename from beside it; "
    "use a directory inside the mount as the repository",
}


@contextmanager
def changing(repository: Path, name: str) -> Iterator[Path]:
    """Hold the repository's lock and settle what a killed process left of this model; gives an empty directory on the
    repository's file system, removed at the end."""
    check_name(name)
    with _disk_speaks(repository):
        repository.mkdir(parents=True, exist_ok=True)
        if repository.stat().st_dev != repository.resolve().parent.stat().st_dev:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(repository))
        for place in (staging_area(repository), evidence_area(repository)):
            place.mkdir(exist_ok=True)
        with (evidence_area(repository) / ".lock").open("a+") as lock:
            _take(lock, repository)
            _settle(repository, name)
            scratch = staging_area(repository) / f"{SCRATCH}{os.getpid()}"
            scratch.mkdir()
            try:
                yield scratch
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
                _drop_half_written(model_directory(repository, name))


def need_room(repository: Path, size: int) -> None:
    """Refuse a copy that cannot fit, before it is begun."""
    if size > (free := shutil.disk_usage(repository).free):
        raise MachineError(f"{repository} has {free} bytes free and the version needs {size}; make room first")


def copy(source: Path, target: Path, files: Iterable[str]) -> None:
    """Copy files by their relative paths; everything is on the disk when this returns."""
    target.mkdir(parents=True)
    for file in files:
        copied = target / file
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, copied)
        with copied.open("rb") as handle:
            os.fsync(handle.fileno())
    for directory, _, _ in os.walk(target):
        sync_directory(Path(directory))


def appear(prepared: Path, place: Path, prepared_evidence: Path, evidence: Path) -> None:
    """The three renames of the module's docstring. `prepared` is a version's directory, or a whole new model."""
    begun = evidence.with_name(f"{PUBLISHING}{evidence.name}")
    evidence.parent.mkdir(exist_ok=True)
    move(prepared_evidence, begun)
    move(prepared, place)
    move(begun, evidence)


def move(source: Path, target: Path) -> None:
    """A rename that survives a power cut. The target does not exist, or is an empty directory."""
    source.rename(target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)


def _settle(repository: Path, name: str) -> None:
    for scratch in staging_area(repository).glob(f"{SCRATCH}*"):  # the lock is ours: whoever made it is gone
        shutil.rmtree(scratch)
    model, known = model_directory(repository, name), evidence_of(repository, name)
    _drop_half_written(model)
    for begun in known.glob(f"{PUBLISHING}*"):
        version = begun.name.removeprefix(PUBLISHING)
        if (model / f"{STAGED}{version}").is_dir():
            move(begun, known / version)
        else:
            shutil.rmtree(begun)


def _drop_half_written(model: Path) -> None:
    """Temporaries of `write_atomically`."""
    for leftover in model.glob(f".{config.FILE}.*"):
        leftover.unlink(missing_ok=True)


def _take(lock: IO[str], repository: Path) -> None:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                lock.seek(0)
                raise MachineError(
                    f"{repository} is being changed by another nemoport (process {lock.read() or 'unknown'}) "
                    f"for more than {PATIENCE} s; run this again when it is done"
                ) from None
            time.sleep(0.1)
        else:
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            return


@contextmanager
def _disk_speaks(repository: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        place = error.filename or repository
        raise MachineError(f"changing {repository} stopped at {place}: {_REFUSALS[error.errno]}") from error
