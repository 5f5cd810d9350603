"""The JSON of an inference request: what it says of its tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from nemoport.runner.datatypes import BY_NAME, Datatype
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import check_parameters, check_supported
from nemoport.runner.tensors import MOST_DIMS, Buffer, show

_MOST = 1024  # texts that are remembered
_LARGEST_DIM = 2**63 - 1
_MISSING: Any = object()
_KINDS = {dict: "object", list: "array", str: "string", bool: "boolean"}
_NOT_UNSIGNED = "attempt to access JSON non-unsigned-integer as unsigned-integer"
_WRONG_KIND = "parameter '{}' has invalid type. It should be either 'int', 'bool', or 'string'."


@dataclass(frozen=True, slots=True)
class Form:
    """How a client wants its outputs: those it named, and all when it named none."""

    binary: frozenset[str] = frozenset()
    all_binary: bool = False

    def is_binary(self, name: str) -> bool:
        return self.all_binary or name in self.binary


@dataclass(frozen=True, slots=True)
class Entry:
    """An input: its elements are in `data`, or else in `size` bytes behind the JSON."""

    name: str
    datatype: Datatype
    shape: tuple[int, ...]
    data: Any
    size: int


@dataclass(frozen=True, slots=True)
class Head:
    """`outputs` are the names wanted."""

    inputs: tuple[Entry, ...]
    outputs: tuple[str, ...]
    form: Form
    id: str
    parameters: Mapping[str, Any]


def parse_json(text: Buffer) -> dict[str, Any]:
    """An object; an empty body is an empty one."""
    if not text:
        return {}
    try:
        value = json.loads(str(text, "utf-8"))
    except (ValueError, RecursionError) as error:
        raise Refusal(f"failed to parse the request JSON buffer: {error}") from None
    fields: dict[str, Any] = _is(value, dict, "the request")
    return fields


def read_head(text: Buffer) -> Head:
    fields = parse_json(text)
    inputs = tuple(_entry(_is(entry, dict, "an input")) for entry in _member(fields, "inputs", list))
    outputs = [_is(entry, dict, "an output") for entry in _member(fields, "outputs", list, [])]
    names = tuple(_member(entry, "name", str) for entry in outputs)
    parameters = _parameters(fields)
    check_parameters(parameters, (), _WRONG_KIND)
    if names:  # Triton reads binary_data_output only when no output is named
        form = Form(frozenset(name for name, entry in zip(names, outputs, strict=True) if _wants_binary(entry)))
    else:
        form = Form(all_binary=_member(parameters, "binary_data_output", bool, False))
    return Head(inputs, names, form, _member(fields, "id", str, ""), parameters)


remembered_head = lru_cache(_MOST)(read_head)
"""The same for texts that come again and again."""


def _entry(fields: Mapping[str, Any]) -> Entry:
    parameters = _parameters(fields)
    _check_source("data" in fields, parameters)
    name = _member(fields, "name", str)
    said = _member(fields, "datatype", str)
    if said not in BY_NAME:
        raise Refusal(f"invalid datatype for input {name}")
    datatype, shape = BY_NAME[said], _shape(fields, name)
    if "data" in fields:
        return Entry(name, datatype, shape, _member(fields, "data", list), 0)
    size = parameters["binary_data_size"]
    if type(size) is not int or size < 0:
        raise Refusal(f"Unable to parse 'binary_data_size': {_NOT_UNSIGNED}")
    return Entry(name, datatype, shape, None, size)


def _check_source(has_data: bool, parameters: Mapping[str, Any]) -> None:
    given = [f"'{name}'" for name in ("binary_data_size", "shared_memory_region") if name in parameters]
    given = ["'data'", *given] if has_data else given
    if len(given) != 1:
        raise Refusal(
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters', "
            f"'shared_memory_region' in 'parameters'. But {'set ' + ' '.join(given) if given else 'no field is set'}"
        )
    check_supported(parameters)


def _shape(entry: Mapping[str, Any], name: str) -> tuple[int, ...]:
    dims = _member(entry, "shape", list)
    if any(type(dim) is not int or not 0 <= dim <= _LARGEST_DIM for dim in dims):
        raise Refusal(f"Unable to parse 'shape': {_NOT_UNSIGNED}")
    if len(dims) > MOST_DIMS:
        raise Refusal(f"invalid shape for input '{name}': {len(dims)} dimensions, at most {MOST_DIMS} are supported")
    if math.prod(dims) > _LARGEST_DIM:
        raise Refusal(
            f"invalid shape for input '{name}': shape {show(dims)} causes total element count to exceed "
            f"maximum size of {_LARGEST_DIM}"
        )
    return tuple(dims)


def _wants_binary(entry: Mapping[str, Any]) -> bool:
    parameters = _parameters(entry)
    check_supported(parameters)
    return bool(_member(parameters, "binary_data", bool, False))


def _parameters(fields: Mapping[str, Any]) -> dict[str, Any]:
    parameters: dict[str, Any] = _member(fields, "parameters", dict, {})
    return parameters


def _member(fields: Mapping[str, Any], name: str, kind: type, default: Any = _MISSING) -> Any:
    value = fields.get(name, default)
    if value is _MISSING:
        raise Refusal(f"Unable to parse '{name}': attempt to access non-existing object member '{name}'")
    return _is(value, kind, f"'{name}'")


def _is(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise Refusal(f"Unable to parse {what}: attempt to access JSON non-{_KINDS[kind]} as {_KINDS[kind]}")
    return value
