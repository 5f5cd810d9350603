"""A load that brings its own config, or its own files, in place of those in the repository."""

from __future__ import annotations

import base64
import binascii
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from google.protobuf import json_format, text_format

from nemoport.runner.model_config import ModelConfig
from nemoport.runner.refusal import Refusal

_FILE = "file:"
_LONGEST_PART = 255  # of a path, which file systems can hold


@dataclass(frozen=True)
class Overrides:
    """`files` are all that the model then has, and need a config."""

    config: ModelConfig | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return self.config is not None or bool(self.files)


NONE = Overrides()


def overrides_from(model: str, parameters: Mapping[str, Any]) -> Overrides:
    """From the parameters of a load: `config` is JSON, `file:1/model.onnx` is base64 over HTTP and bytes over gRPC."""
    config, files = None, {}
    for name, value in parameters.items():
        if name == "config":
            config = _config(model, value)
        elif name.startswith(_FILE):
            files[_path(model, name.removeprefix(_FILE))] = _content(name, value)
        else:
            raise Refusal(
                f"unexpected parameter '{name[:100]}' of the load of '{model}'; there are config and {_FILE}PATH"
            )
    if files and config is None:
        raise _unreadable(model, "a load with files needs the parameter 'config' too")
    return Overrides(config, files)


def placed_files(model: str, overrides: Overrides) -> tuple[Path, Path]:
    """A directory that is the caller's to remove, and in it the model."""
    scratch = Path(tempfile.mkdtemp(prefix="nemoport-load-"))
    directory = scratch / model
    try:
        directory.mkdir()
        for name, content in overrides.files.items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        (directory / "config.pbtxt").write_text(text_format.MessageToString(overrides.config or ModelConfig()))
    except OSError as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise _unreadable(model, f"its files cannot be written: {error}") from None
    return scratch, directory


def _config(model: str, value: Any) -> ModelConfig:
    if not isinstance(value, str):
        raise Refusal("attempt to access JSON non-string as string in 'config'")
    try:
        return json_format.ParseDict(json.loads(value), ModelConfig())
    except (ValueError, RecursionError, json_format.ParseError) as error:
        raise _unreadable(model, f"its config is no ModelConfig: {error}") from None


def _path(model: str, text: str) -> str:
    path = PurePosixPath(text)
    fits = all(0 < len(part.encode()) <= _LONGEST_PART and part not in (".", "..") for part in path.parts)
    if not path.parts or path.is_absolute() or not fits or "\0" in text or len(path.parts) > 16:
        raise _unreadable(model, f"'{text[:100]}' is no path inside the model")
    return str(path)


def _content(name: str, value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise Refusal(f"attempt to access JSON non-string as string in '{name[:100]}'")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(f"'{name[:100]}' is not base64: {error}") from None


def _unreadable(model: str, why: str) -> Refusal:
    return Refusal(f"failed to load '{model}', failed to poll from model repository: {why}")
