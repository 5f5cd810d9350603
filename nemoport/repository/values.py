"""`config.values.yaml`: the choices in a generated config, for its owner to edit; generating it anew keeps them.

triton_release: "24.10"        fields that this release does not know are refused
max_batch_size: 8
instance_group: [{count: 2, kind: KIND_GPU}]       any field of Triton's ModelConfig, in its own words;
dynamic_batching: {max_queue_delay_microseconds: 500}     one that is null is left out of the config
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from nemoport.artifact import Artifact
from nemoport.compatibility import FIELDS
from nemoport.errors import UsageError
from nemoport.repository import config
from nemoport.repository.config import Config

FILE = "config.values.yaml"
RELEASE = "24.10"
"""What is generated loads in this release of Triton and all later ones."""
SINCE = {name.rpartition(".")[2]: since for name, since in FIELDS.items() if since > RELEASE}
"""Fields that came later: a server refuses a config with a field that it does not know."""
HEAD = """\
# The choices in config.pbtxt. Edit them, then run: nemoport repo config REPOSITORY {name}
# Any field of Triton's ModelConfig may stand here, in its own words; one that is null is left out.
"""


@dataclass(frozen=True, kw_only=True)
class Values:
    triton_release: str = RELEASE
    max_batch_size: int = config.MAX_BATCH_SIZE
    fields: Mapping[str, Any] = field(default_factory=dict)
    """As they are written in the file."""


def read(text: str, place: str) -> Values:
    data = _mapping(text, place)
    release, batch = data.pop("triton_release", RELEASE), data.pop("max_batch_size", config.MAX_BATCH_SIZE)
    if not isinstance(batch, int) or batch < 0:
        raise UsageError(f"{place} has max_batch_size {batch!r}; it must be a whole number, 0 for no batching")
    if own := sorted(set(data) & set(config.OWN)):
        raise UsageError(f"{place} sets {own[0]}, which follows from the artifact and its versions; take it out")
    found = Values(triton_release=_release(str(release), place), max_batch_size=batch, fields=data)
    config.normal({name: value for name, value in data.items() if value is not None}, place)
    _check_release(found, place)
    return found


def release(text: str, place: str) -> str:
    """Only the release of Triton that a file names."""
    return _release(str(_mapping(text, place).get("triton_release", RELEASE)), place)


def with_release(text: str, release: str) -> str:
    """The same file for another release of Triton."""
    line = f'triton_release: "{release}"'
    changed, count = re.subn(r"^triton_release\s*:.*$", line, text, flags=re.MULTILINE)
    return changed if count else f"{line}\n{text}"


def write(values: Values, made: Artifact, name: str) -> str:
    """A file with every choice as it is made now."""
    tuned = dict(generated(values, made, name, (1,)).tuning)
    chosen = {"triton_release": values.triton_release, "max_batch_size": values.max_batch_size, **tuned}
    return HEAD.format(name=name) + yaml.safe_dump(chosen, sort_keys=False, default_flow_style=None, width=110)


def generated(values: Values, made: Artifact, name: str, versions: tuple[int, ...]) -> Config:
    """The config of a model: what follows from the manifest, and over it what the values say."""
    follows = config.from_artifact(made, name, 0, values.max_batch_size)
    said = {name: value for name, value in values.fields.items() if value is not None}
    kept = {name: value for name, value in follows.tuning.items() if name not in values.fields}
    return replace(follows, versions=versions, tuning=kept | config.normal(said, FILE))


def _mapping(text: str, place: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise UsageError(f"{place} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{place} holds a {type(data).__name__}; it must map names of fields to their values")
    return data


def _release(text: str, place: str) -> str:
    if not re.fullmatch(r"\d\d\.(0[1-9]|1[0-2])", text):
        raise UsageError(f"{place} has triton_release {text!r}; write year and month, such as {RELEASE}")
    if text < RELEASE:
        raise UsageError(f"{place} has triton_release {text}; what is generated needs {RELEASE} or later")
    return text


def _check_release(values: Values, place: str) -> None:
    for name in sorted(_names(values.fields) & SINCE.keys()):
        if values.triton_release < SINCE[name]:
            raise UsageError(
                f"{place} sets {name}, which Triton {values.triton_release} does not know and refuses; take it out, or "
                f"name triton_release {SINCE[name]} or later"
            )


def _names(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return set(value) | {name for each in value.values() for name in _names(each)}
    return {name for each in value for name in _names(each)} if isinstance(value, list) else set()
