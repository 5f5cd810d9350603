"""A build as a directory that another machine can run: the artifact, a script, and what runs it in a container.

    engines.job/
      artifact/       what is compiled, whole, so that it can be validated there too
      build.sh        exits 4 with one sentence where a program is missing
      Dockerfile      the container with the job in it
      job.yaml        the same for Kubernetes
      README.md       the three ways to run it
      built_with      what the script found on the machine that built, written before the last rename
      product/        what the script leaves, complete once it is there

Builds of this machine run the same script, so it is one thing that is tested.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from nemoport.artifact import MANIFEST, Artifact, json_bytes, link, write_atomically
from nemoport.compilers import machine
from nemoport.compilers.build import ARTIFACT, PRODUCT, Build, Facts
from nemoport.errors import DamagedInput, MachineError

REQUEST, SCRIPT, FACTS = "request.json", "build.sh", "built_with"
USER = 1000
"""Who builds in a container: nobody's root."""
_STDERR = 2
_LACKS = 4
"""The script's exit code, and ours, where a machine lacks something."""


def write(directory: Path, build: Build, source: Path, made: Artifact, request: Mapping[str, Any]) -> None:
    """The whole job, whatever lay there of it: first whose it is, last the script, so that what can be run is
    complete."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SCRIPT).unlink(missing_ok=True)
    write_atomically(directory / REQUEST, json_bytes(request))
    for name in (MANIFEST, *(file.path for file in made.files)):
        link(source / name, directory / ARTIFACT / name)
    for name, content in build.files.items():
        _write(directory / name, content)
    for name, kept in build.kept.items():
        if kept.is_file():
            _write(directory / name, kept.read_bytes())
    said = _said(directory, build)
    _write(directory / "job.yaml", yaml.safe_dump(_kubernetes(directory, build), sort_keys=False).encode())
    for name in ("Dockerfile", "README.md", SCRIPT):
        text = _environment().get_template(f"job/{name}").render(said)
        write_atomically(directory / name, text.encode())
    (directory / SCRIPT).chmod(0o755)


def request(directory: Path) -> Mapping[str, Any] | None:
    """Which build a directory is the job of; None where nothing is yet, empty where it is of something else."""
    if (directory / REQUEST).is_file():
        with suppress(ValueError):
            said = json.loads((directory / REQUEST).read_bytes())
            return said if isinstance(said, dict) else {}
    elif not os.path.lexists(directory) or (directory.is_dir() and all(map(_begun, directory.iterdir()))):
        return None
    return {}


def remove(directory: Path) -> None:
    """The whole job; that it is one last, so that one that was begun to be removed can be removed again."""
    for path in directory.iterdir() if directory.is_dir() else ():
        if path.name != REQUEST:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (directory / REQUEST).unlink(missing_ok=True)
    with suppress(FileNotFoundError):
        directory.rmdir()


def _begun(path: Path) -> bool:
    """Whether it is what a process that was killed left of the first file."""
    return path.name.startswith(f".{REQUEST}.")


def run(directory: Path, lock: int) -> None:
    """Run the script here. What it says goes to stderr. It holds the lock too, should it outlive us."""
    command, environment = ["bash", str(directory.resolve() / SCRIPT)], {**os.environ, "PATH": machine.path()}
    ended = subprocess.run(command, stdout=_STDERR, env=environment, pass_fds=[lock], check=False)  # noqa: S603
    if ended.returncode:
        raise MachineError(
            f"{directory / SCRIPT} ended with exit code {ended.returncode}, and what it said stands above; "
            "the same command tries again"
        )


def facts(directory: Path) -> Facts:
    """What the script found on the machine that built."""
    path = directory / FACTS
    try:
        rows = [line.split(" ", 1) for line in path.read_text().splitlines()]
        return {name: int(value) if value.isdecimal() else value for name, value in rows}
    except (OSError, ValueError) as error:
        raise DamagedInput(f"{path} is not what {SCRIPT} wrote ({error}); build again") from error


def lost(build: Build, directory: Path) -> MachineError:
    """What a machine is told that cannot build."""
    return MachineError(
        f"this machine cannot build it: {build.lacking}; the build job is in {directory}: run its {SCRIPT} in a "
        f"container {build.container}, as its README.md says, and then this command again"
    )


def _said(directory: Path, build: Build) -> dict[str, Any]:
    gpus = f"{build.gpus} GPU{'s' if build.gpus > 1 else ''}"
    return {
        "name": _name(directory),
        "build": build,
        "commands": [shlex.join(command) for command in build.commands],
        "artifact": ARTIFACT,
        "product": PRODUCT,
        "facts_file": FACTS,
        "lacks": _LACKS,
        "user": USER,
        "machine": f"with {gpus} of the kind that will serve it" if build.gpus else "like the one that will serve it",
        "docker_run": "docker run --gpus all" if build.gpus else "docker run",
    }


def _kubernetes(directory: Path, build: Build) -> dict[str, Any]:
    """A batch/v1 Job that builds in a volume into which the job was copied."""
    name = _name(directory)
    container = {
        "name": "build",
        "image": name if build.packages else build.container,
        "command": ["bash", f"/job/{SCRIPT}"],
        "workingDir": "/job",
        "env": [{"name": "HOME", "value": "/tmp"}],  # noqa: S108  (a volume of its own)
        "resources": {"limits": {"nvidia.com/gpu": build.gpus} if build.gpus else {}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "job", "mountPath": "/job"},
            {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "job", "persistentVolumeClaim": {"claimName": name}},
            {"name": "scratch", "emptyDir": {}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/managed-by": "nemoport"}},
        "spec": {"backoffLimit": 0, "template": {"spec": pod}},
    }


def _name(directory: Path) -> str:
    """A DNS label."""
    return re.sub(r"[^a-z0-9]+", "-", directory.resolve().name.lower())[:63].strip("-") or "build"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _environment() -> Environment:
    environment = Environment(  # noqa: S701  (the output is no HTML; what the shell reads is quoted)
        loader=PackageLoader("nemoport", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = shlex.quote
    return environment
