"""Which versions a model has, and where each of them lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nemoport.errors import UnsupportedInput, UsageError
from nemoport.repository import config

STAGED = "staging-"
STABLE = "stable"
"""The label of the version that config.pbtxt serves to requests that name none."""
NUMBER = re.compile(r"0|[1-9][0-9]*")
"""What Triton takes for a version: no sign, no leading zero."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PARTS = re.compile(rf"(?P<prefix>(?:[a-z]+-)?)(?P<number>{NUMBER.pattern})")


@dataclass(frozen=True, kw_only=True)
class State:
    name: str
    model: Path
    """The model's directory: in the repository, or in the staging area while no version was ever live."""
    live: tuple[int, ...]
    """Listed by the config and present."""
    staged: tuple[int, ...]
    unlisted: tuple[int, ...]
    """A directory that Triton would take, and config.pbtxt does not list: rolled back, retired, or only labelled."""
    labels: Mapping[str, int]
    """What each labelled config serves to requests that name no version. `stable` is config.pbtxt itself."""
    config: config.Config

    @property
    def served(self) -> int | None:
        """The version that answers a request which names none."""
        return max(self.live, default=None)

    @property
    def next_up(self) -> int | None:
        """The version that a promotion without a number means. One that was rolled back has to be named."""
        waiting = max(self.staged, default=-1)
        return waiting if waiting > max(self.live, default=-1) else None

    @property
    def every(self) -> tuple[int, ...]:
        return tuple(sorted((*self.live, *self.staged, *self.unlisted)))

    def names(self, version: int) -> tuple[str, ...]:
        """The labels of a version."""
        stable = (STABLE,) if version == self.served else ()
        return stable + tuple(sorted(label for label, labelled in self.labels.items() if labelled == version))

    def directory(self, version: int) -> str:
        """The name of a version's directory inside the model's."""
        return f"{STAGED}{version}" if version in self.staged else str(version)


@dataclass(frozen=True, kw_only=True)
class Located:
    model: Path
    """Holds `config.pbtxt` and the version's directory."""
    directory: str
    """`7` or `staging-7`."""
    version: int
    evidence: Path
    """Holds `manifest.json`; a verdict goes here, as `report.json`."""


def models(repository: Path) -> tuple[str, ...]:
    """Every model, live or only staged, sorted."""
    places = (repository, staging_area(repository))
    return tuple(sorted({path.parent.name for place in places for path in place.glob(f"[!.]*/{config.FILE}")}))


def state(repository: Path, name: str) -> State:
    model = model_directory(repository, name)
    path = model / config.FILE
    if is_live(repository, name) and not path.is_file():
        raise UnsupportedInput(f"{path} is missing; nemoport manages models whose config lists their versions")
    if not path.is_file():
        raise UsageError(f"{repository} has no model {name!r}; it has {', '.join(models(repository)) or 'none'}")
    parsed = config.parse(path.read_text(), str(path))
    if not parsed.versions:
        raise UnsupportedInput(
            f"{path} does not list its versions; to let nemoport manage the model, write the live ones into it: "
            "version_policy { specific { versions: [ 1 ] } }"
        )
    numeric = _numbers(model, "")
    live = numeric & set(parsed.versions) if is_live(repository, name) else set()
    known = _numbers(evidence_of(repository, name), "")
    return State(
        name=name,
        model=model,
        live=tuple(sorted(live)),
        staged=tuple(sorted(_numbers(model, STAGED) & known)),
        unlisted=tuple(sorted((numeric - live) & known)),
        labels=_labels(model),
        config=parsed,
    )


def locate(repository: Path, name: str, version: str | None) -> Located:
    """`7`, `staging-7`, or the newest: staged if there is one, else live."""
    found = state(repository, name)
    every = {found.directory(number): number for number in (*found.live, *found.unlisted, *found.staged)}
    if version is None:
        newest = max(found.staged, default=None)
        number = found.served if newest is None else newest
        directory = "" if number is None else found.directory(number)
    else:
        directory = version
    if directory not in every:
        raise UsageError(f"{name} in {repository} has no version {version}; it has {', '.join(every) or 'none'}")
    return Located(
        model=found.model,
        directory=directory,
        version=every[directory],
        evidence=evidence_of(repository, name) / str(every[directory]),
    )


def number_of(version: str) -> int:
    """`7` and `staging-7` are both 7."""
    parts = _PARTS.fullmatch(version)
    if not parts or parts["prefix"] not in ("", STAGED):
        raise UsageError(f"{version!r} is no version; write a number such as 7, or {STAGED}7")
    return int(parts["number"])


def next_version(repository: Path, name: str) -> int:
    """One more than any version that was ever used, also by those of which only the evidence is left."""
    places = (repository / name, staging_area(repository) / name, evidence_of(repository, name))
    used = [_PARTS.fullmatch(path.name) for place in places if place.is_dir() for path in place.iterdir()]
    return max((int(parts["number"]) for parts in used if parts), default=0) + 1


def model_directory(repository: Path, name: str) -> Path:
    return repository / name if is_live(repository, name) else staging_area(repository) / name


def is_live(repository: Path, name: str) -> bool:
    return (repository / name).is_dir()


def staging_area(repository: Path) -> Path:
    return _beside(repository, "staging")


def evidence_of(repository: Path, name: str) -> Path:
    return evidence_area(repository) / name


def evidence_area(repository: Path) -> Path:
    return _beside(repository, "evidence")


def _labels(model: Path) -> dict[str, int]:
    """Of the configs that labels compile to; others in that directory are their owner's."""
    found = {}
    for path in sorted((model / config.LABELS).glob("[!.]*.pbtxt")):
        if (text := path.read_text()).startswith(config.LABEL_MARK):
            found[path.stem] = max(config.parse(text, str(path)).versions)
    return found


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a model; use letters, digits, '.', '_' and '-', a letter or digit first"
        )


def _beside(repository: Path, word: str) -> Path:
    root = repository.resolve()
    return root.with_name(f"{root.name}.{word}")


def _numbers(directory: Path, prefix: str) -> set[int]:
    if not directory.is_dir():
        return set()
    parts = [_PARTS.fullmatch(path.name) for path in directory.iterdir() if path.is_dir()]
    return {int(part["number"]) for part in parts if part and part["prefix"] == prefix}
