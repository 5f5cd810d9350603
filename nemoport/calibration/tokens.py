"""Tokens to calibrate on: rows of equal length from a text, from the `text` of a JSONL file, or as ids in `.npz`.

Texts are tokenized by the checkpoint's own tokenizer, laid end to end and cut into rows: no row is padded, and only
what does not fill the last one is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nemoport.errors import DamagedInput, MissingPackage, UnsupportedInput, UsageError
from nemoport.exporters.formats.structured import LARGEST
from nemoport.exporters.formats.tree import Tree, content

BATCH = 2
"""Rows that are run at once, where nothing else is said."""
_TEXT = "text"


@dataclass(frozen=True, kw_only=True)
class Limits:
    samples: int = 512
    """Rows at most."""
    length: int = 512
    """Tokens of a row."""
    batch: int = BATCH
    """Rows that are run at once."""


@dataclass(frozen=True)
class Tokens:
    rows: NDArray[np.int64]
    """[rows, length]."""
    batch: int = BATCH
    """Rows that are run at once."""

    @property
    def digest(self) -> str:
        """Of all that the statistics depend on."""
        shape = repr((*self.rows.shape, self.batch))
        return blake3(shape.encode() + np.ascontiguousarray(self.rows).tobytes()).hexdigest()

    def batches(self) -> list[NDArray[np.int64]]:
        return [self.rows[start : start + self.batch] for start in range(0, len(self.rows), self.batch)]


def read(path: Path, tokenizer: Tree | None, limits: Limits, option: str = "--calib") -> Tokens:
    """`option` is what the user gave the file with."""
    if min(limits.samples, limits.length, limits.batch) < 1:
        raise UsageError("--calib-samples, --calib-length and --calib-batch count from 1 on")
    if path.suffix == ".npz":
        return Tokens(_ids(path, option)[: limits.samples, : limits.length], limits.batch)
    encode = _encoder(tokenizer)
    ids: list[int] = []
    for text in texts(path, option):
        ids += encode(text)
        if len(ids) >= limits.samples * limits.length:
            break
    if not ids:
        raise UsageError(f"{option} {path} holds no text: no token came of it; give text, or token ids in .npz")
    length = min(limits.length, len(ids))
    rows = min(limits.samples, len(ids) // length)
    return Tokens(np.array(ids[: rows * length], np.int64).reshape(rows, length), limits.batch)


def _ids(path: Path, option: str) -> NDArray[np.int64]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, TypeError, BadZipFile) as error:  # TypeError: it is a bare array
        raise DamagedInput(f"{option} {path} is no .npz file ({error}); copy it again") from error
    found = arrays.get("tokens", next(iter(arrays.values())) if len(arrays) == 1 else None)
    if found is None or found.ndim != 2 or not found.size or found.dtype.kind not in "iu":
        raise UnsupportedInput(f"{option} {path} has no `tokens`, integers [rows, length], none of them empty")
    ids: NDArray[np.int64] = found.astype(np.int64)
    return ids


def texts(path: Path, option: str) -> Iterator[str]:
    """Paragraph by paragraph, or the `text` of line after line."""
    with path.open(encoding="utf-8", errors="strict") as file:
        try:
            for number, line in enumerate(file, 1):
                yield line if path.suffix not in (".jsonl", ".json") else _text(path, number, line, option)
        except UnicodeDecodeError as error:
            raise DamagedInput(
                f"{option} {path} is no UTF-8 text ({error}); give text, or token ids in .npz"
            ) from error


def _text(path: Path, number: int, line: str, option: str) -> str:
    if not line.strip():
        return ""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DamagedInput(
            f"{option} {path}, line {number} is no JSON ({error}); one object a line is needed"
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get(_TEXT), str):
        raise UnsupportedInput(f'{option} {path}, line {number} has no "{_TEXT}"; one object with it a line is needed')
    text: str = row[_TEXT]
    return text


def _encoder(tokenizer: Tree | None) -> Any:
    """Text to ids, without the special tokens that a template would add."""
    store = tokenizer.file("tokenizer.json") if tokenizer else None
    if store is None:
        raise UnsupportedInput(
            "the checkpoint has no tokenizer.json to read text with; give token ids in .npz (`tokens`, [rows, length])"
        )
    if find_spec("tokenizers") is None:
        raise MissingPackage("tokenizers", "calibrate", "calibration on text")
    from tokenizers import Tokenizer

    try:
        found = Tokenizer.from_str(content(store, LARGEST).decode())
    except Exception as error:  # what the package raises for a file that it cannot read has no class of its own
        raise DamagedInput(f"the checkpoint's tokenizer.json cannot be used ({error}); copy it again") from error
    return lambda text: found.encode(text, add_special_tokens=False).ids
