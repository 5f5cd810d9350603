"""A YAML file as data that a schema was held against; every complaint names its line and column."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from nemoport.errors import UsageError

Place = tuple[str | int, ...]
"""The way to a value: ("models", 0, "tp")."""


def load(path: Path) -> dict[str, Any]:
    """The file's content; UsageError with every complaint, the first in front."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); give a pipeline file, YAML") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
        marks = dict(_marks(root, ())) if root else {}
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # an alias may hold itself
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        at = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        raise UsageError(f"{at}: this is not YAML: {' '.join(str(problem).split())}") from error
    complaints = [*_repeated(root, path), *(_said(each, marks, path) for each in _judged(data))]
    if complaints:
        more = f" ({len(complaints) - 1} more: {'; '.join(complaints[1:4])})" if len(complaints) > 1 else ""
        raise UsageError(complaints[0] + more)
    found: dict[str, Any] = data
    return found


def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(files("nemoport.pipeline").joinpath("schema.json").read_text())
    return found


def _judged(data: Any) -> list[jsonschema.ValidationError]:
    validator = jsonschema.Draft202012Validator(schema())
    return sorted(validator.iter_errors(data), key=lambda error: list(map(str, error.absolute_path)))


def _said(error: jsonschema.ValidationError, marks: Mapping[Place, yaml.Mark], path: Path) -> str:
    place: Place = tuple(error.absolute_path)
    if error.validator == "additionalProperties":
        known, given = _keys(error.schema), _keys(error)
        odd = next(key for key in given if key not in known)
        near = get_close_matches(str(odd), known, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
        return f"{_at(marks, (*place, odd), path)}: {odd!r} is not known here; {hint}"
    where = ".".join(map(str, place)) or "the file"
    return f"{_at(marks, place, path)}: {where}: {error.message}"


def _keys(found: Any) -> list[str]:
    """Those that a schema knows, or that an instance has."""
    keys: Any = found.instance if isinstance(found, jsonschema.ValidationError) else found["properties"]
    return list(keys)


def _at(marks: Mapping[Place, yaml.Mark], place: Place, path: Path) -> str:
    """Of the value, or of what holds it."""
    while place and place not in marks:
        place = place[:-1]
    mark = marks.get(place)
    return f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)


def _marks(node: yaml.Node, place: Place) -> Iterator[tuple[Place, yaml.Mark]]:
    """Where every value begins; a value of a mapping, where its key does."""
    yield place, node.start_mark
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from _marks(value, (*place, key.value))
            yield (*place, key.value), key.start_mark
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _marks(value, (*place, index))


def _repeated(node: yaml.Node | None, path: Path) -> Iterator[str]:
    """YAML would take the last of two values for one key."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if key.value in seen:
                yield f"{path}:{key.start_mark.line + 1}:{key.start_mark.column + 1}: {key.value!r} is said twice"
            seen.add(key.value)
            yield from _repeated(value, path)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _repeated(value, path)
