"""JSON and YAML files as plain data, whatever they ask for: no tag is ever constructed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.formats.tree import content
from nemoport.exporters.tensor import Store

LARGEST = 256 * 2**20
"""Bytes of the largest configuration or tokenizer file read."""


def mapping(path: Path) -> dict[str, Any]:
    """The mapping in a `.json`, `.yaml` or `.yml` file."""
    if (size := path.stat().st_size) > LARGEST:
        raise DamagedInput(f"{path.name} has {size} bytes, a configuration has at most {LARGEST}")
    return _mapping(path.read_bytes(), path.name)


def stored_mapping(store: Store) -> dict[str, Any]:
    """The same of a file in a tree."""
    return _mapping(content(store, LARGEST), store.name)


def stored_list(store: Store) -> list[Any]:
    """The list in a file of a tree."""
    data = _parsed(content(store, LARGEST), store.name)
    if not isinstance(data, list):
        raise UnsupportedInput(f"{store.name} holds a {type(data).__name__}, a list is needed")
    return data


def _parsed(text: bytes, name: str) -> Any:
    kind = "JSON" if name.endswith(".json") else "YAML"
    try:
        return json.loads(text) if kind == "JSON" else yaml.load(text, yaml.CSafeLoader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DamagedInput(f"{name} is not readable as {kind} ({reason})") from error


def _mapping(text: bytes, name: str) -> dict[str, Any]:
    data = _parsed(text, name)
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise UnsupportedInput(f"{name} holds a {type(data).__name__}, a mapping of names is needed")
    return dict(data)
