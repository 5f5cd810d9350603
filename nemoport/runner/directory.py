"""The tree of a model repository: which directories are models, which are versions, which versions are served.

<repository>/<model>/config.pbtxt
                     configs/<name>.pbtxt      instead, under --model-config-name
                     1/model.onnx              a version: a whole number without leading zeros
                     staging-7/model.onnx      anything else is not looked at
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from nemoport.errors import DamagedInput, InputError
from nemoport.runner.model_config import ModelConfig

_VERSION = re.compile(r"0|[1-9][0-9]{0,17}")


class NoVersion(DamagedInput):
    """A model that can be read, of which its version policy serves nothing."""


class AwayRepository(InputError):
    """A repository that cannot be read, now."""

    def __init__(self, repository: Path, why: str) -> None:
        super().__init__(f"model repository {repository} {why}; give one with a directory per model")
        self.repository = repository


def find_models(repositories: Iterable[Path]) -> dict[str, list[Path]]:
    """Model name to its directories: more than one is an error of that model, not of the repositories. Raises
    AwayRepository."""
    found: dict[str, list[Path]] = {}
    for repository in repositories:
        try:
            if not repository.is_dir():
                raise AwayRepository(repository, "is not a directory")
            for directory in sorted(repository.iterdir()):
                if directory.is_dir():
                    found.setdefault(directory.name, []).append(directory)
        except OSError as error:
            raise AwayRepository(repository, f"cannot be read ({error})") from None
    return dict(sorted(found.items()))


Fingerprint = tuple[tuple[str, int, int], ...]


def fingerprint(model: Path) -> Fingerprint:
    """Path, time of change and size of all that is in the directory: another means that the model has changed."""
    found = []
    for path in sorted(model.rglob("*")):
        try:
            status = path.stat()
        except FileNotFoundError:  # it went while we looked; the next look will see it gone
            continue
        found.append((str(path.relative_to(model)), status.st_mtime_ns, status.st_size if path.is_file() else 0))
    return tuple(found)


def config_file(model: Path, config_name: str = "") -> Path | None:
    """None when the model has none. A custom name that this model lacks falls back to config.pbtxt, as in Triton."""
    custom = model / "configs" / f"{config_name}.pbtxt"
    if config_name and custom.is_file():
        return custom
    plain = model / "config.pbtxt"
    return plain if plain.is_file() else None


def find_versions(model: Path) -> list[int]:
    return sorted(int(entry.name) for entry in model.iterdir() if entry.is_dir() and _VERSION.fullmatch(entry.name))


def versions_to_serve(config: ModelConfig, present: list[int]) -> list[int]:
    """The versions that the policy picks of those that are there, ascending; never empty."""
    policy = config.version_policy
    if policy.HasField("specific"):
        chosen = [version for version in present if version in policy.specific.versions]
    elif policy.HasField("all"):
        chosen = present
    else:
        chosen = present[-policy.latest.num_versions :] if policy.latest.num_versions else []
    if not chosen:
        raise NoVersion(
            f"at least one version must be available under the version policy of model '{config.name}'; "
            f"its version directories are {', '.join(map(str, present)) or 'none'}"
        )
    return chosen


def version_number(directory_name: str) -> int:
    """The number under which a directory is served when it is named explicitly: 7 of `7` and of `staging-7`."""
    number = re.search(r"[0-9]{1,18}$", directory_name)
    return int(number.group()) if number else 1
