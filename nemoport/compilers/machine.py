"""What this machine has of what a builder needs. Packages are looked for, and none imported."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path

from nemoport.compilers.build import Fact, Program


def path() -> str:
    """PATH, with the programs of the Python that runs this first."""
    return os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))


def lacking(programs: Iterable[Program]) -> str | None:
    """The programs that are not on PATH, in a clause."""
    missing = [program.name for program in programs if shutil.which(program.name, path=path()) is None]
    return f"it has no {' and no '.join(missing)}" if missing else None


def version(*distributions: str) -> str | None:
    """Of the first that is installed, under whichever name."""
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def accepts(fact: Fact, value: str | int | None) -> bool:
    """As the script judges it, with the shell's patterns."""
    return value is not None and any(fnmatchcase(str(value), pattern) for pattern in fact.accepted)
