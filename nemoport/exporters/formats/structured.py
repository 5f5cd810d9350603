"""JSON and YAML files as plain data, whatever they ask for: no tag is ever constructed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nemoport.errors import DamagedInput, UnsupportedInput

LARGEST = 64 * 2**20
"""Bytes of the largest configuration file read."""


def mapping(path: Path) -> dict[str, Any]:
    """The mapping in a `.json`, `.yaml` or `.yml` file."""
    if (size := path.stat().st_size) > LARGEST:
        raise DamagedInput(f"{path.name} has {size} bytes, a configuration has at most {LARGEST}")
    text = path.read_bytes()
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.load(text, yaml.CSafeLoader)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise DamagedInput(f"{path.name} is not readable as {path.suffix[1:].upper()} ({reason})") from error
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise UnsupportedInput(f"{path.name} holds a {type(data).__name__}, a mapping of names is needed")
    return dict(data)
