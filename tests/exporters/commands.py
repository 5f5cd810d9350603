"""Ways to run a conversion: as functions, as the command in this process, as a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from nemoport.artifact import Artifact
from nemoport.cli import main
from nemoport.exporters import convert, stream
from nemoport.exporters.job import Job
from nemoport.spec import Plan

from .fixtures import Fixture


def converted(
    source: Fixture | Path,
    to: str,
    destination: Path,
    *,
    config: Mapping[str, Any] | None = None,
    workers: int | None = None,
    **plan: Any,
) -> Path:
    """Convert in this process; the destination."""
    job = planned(source, to, destination, config=config, **plan)
    stream.run(replace(job, workers=workers or job.workers))
    return destination


def planned(
    source: Fixture | Path, to: str, destination: Path, *, config: Mapping[str, Any] | None = None, **plan: Any
) -> Job:
    path = source
    if isinstance(source, Fixture):
        path, config = source.path, source.config
    assert isinstance(path, Path)
    return convert.plan(path, to, destination, config=config, plan=Plan(**plan))


def command(*arguments: object) -> Result:
    """The command line in this process."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="nemoport")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "nemoport", *(str(argument) for argument in arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def sentence(stderr: str) -> str:
    """The one line of an error."""
    assert stderr.startswith("Error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert stderr.endswith("\n"), stderr
    return stderr.removeprefix("Error: ").rstrip("\n")


def contents(directory: Path, *without: str) -> dict[str, bytes]:
    """Every file below a directory, `origin.json` apart, which says where the source was."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in {"origin.json", *without}
    }


def artifact_of(directory: Path) -> Artifact:
    """A finished artifact, every file of it checked against its digest."""
    from nemoport import artifact

    found = artifact.read_manifest(directory)
    artifact.verify(directory, found)
    return found


def anonymous(pid: int) -> int:
    """Bytes of memory that no file backs; none when the process has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
