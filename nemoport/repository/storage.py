"""Changing a repository on disk: one process at a time, files copied aside first, and the disk's refusals in a
sentence."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nemoport.errors import MachineError
from nemoport.repository import config, journal
from nemoport.repository.lock import locked
from nemoport.repository.versions import check_name, evidence_area, evidence_of, model_directory, staging_area

SCRATCH = ".publish-"
TRASH = ".trash"
_TEMPORARY = re.compile(r"\..+\.[0-9]+")
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
    """Hold the repository's lock and finish what a killed process began; gives an empty directory on the
    repository's file system, removed at the end."""
    check_name(name)
    with _disk_speaks(repository):
        repository.mkdir(parents=True, exist_ok=True)
        if repository.stat().st_dev != repository.resolve().parent.stat().st_dev:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(repository))
        for place in (staging_area(repository), evidence_area(repository)):
            place.mkdir(exist_ok=True)
        with locked(evidence_area(repository) / ".lock", str(repository)):
            _settle(repository, name)
            scratch = staging_area(repository) / f"{SCRATCH}{os.getpid()}"
            scratch.mkdir()
            try:
                yield scratch
            finally:
                if not journal.begun(repository):  # else its steps still need what lies there
                    shutil.rmtree(scratch, ignore_errors=True)
                _drop_half_written(repository, name)


def need_room(repository: Path, size: int) -> None:
    """Refuse a copy that cannot fit, before it is begun."""
    if size > (free := shutil.disk_usage(repository).free):
        raise MachineError(f"{repository} has {free} bytes free and the version needs {size}; make room first")


def copy(source: Path, target: Path, files: Iterable[str]) -> None:
    """Copy files by their relative paths."""
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        copied = target / file
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, copied)


def _settle(repository: Path, name: str) -> None:
    journal.finish(repository)
    area = staging_area(repository)
    for leftover in (*area.glob(f"{SCRATCH}*"), *area.glob(f"{TRASH}*")):  # the lock is ours: its maker is gone
        shutil.rmtree(leftover)
    _drop_half_written(repository, name)


def _drop_half_written(repository: Path, name: str) -> None:
    """Temporaries of `write_atomically`, of this process or of one that is gone."""
    model, evidence = model_directory(repository, name), evidence_of(repository, name)
    places = (evidence_area(repository), model, model / config.LABELS, evidence, *evidence.glob("[0-9]*"))
    for leftover in (path for place in places for path in place.glob(".*.*")):
        if _TEMPORARY.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)


@contextmanager
def _disk_speaks(repository: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        place = error.filename or repository
        raise MachineError(f"changing {repository} stopped at {place}: {_REFUSALS[error.errno]}") from error
