"""Safetensors files: 8 bytes of header length, little-endian, a JSON header, then the tensors' bytes.

The header of a file to be written is computed before any tensor is read, since it needs only shapes and dtypes.
Format: github.com/huggingface/safetensors, README section "Format".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.checkpoint import Slot, TensorFile
from nemoport.exporters.dtypes import BY_SAFETENSORS, DTYPES, itemsize
from nemoport.exporters.tensor import Files, LazyTensor, nbytes

_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL")
LARGEST_HEADER = 100 * 2**20
"""Bytes; the limit of the format's own reader."""


def read(files: Files, path: Path) -> dict[str, LazyTensor]:
    """Every tensor of one file, unread."""
    header, start = _header(path)
    size = path.stat().st_size
    tensors, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            code = entry["dtype"]
            numbers = (*shape, begin, end)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedInput(f"{path.name}: the header's entry {name} is malformed ({error!r})") from error
        if code not in BY_SAFETENSORS:
            raise UnsupportedInput(
                f"{name} in {path.name} has dtype {code}; nemoport reads {', '.join(BY_SAFETENSORS)}"
            )
        dtype = BY_SAFETENSORS[code].name
        if not all(type(number) is int and 0 <= number < 2**48 for number in numbers):
            raise DamagedInput(f"{path.name}: the header's entry {name} has impossible numbers {numbers}")
        if end - begin != prod(shape) * itemsize(dtype):
            raise DamagedInput(f"{name} in {path.name} has {end - begin} bytes, its shape {list(shape)} needs others")
        if start + end > size:
            raise DamagedInput(
                f"{path.name} is truncated: {size} bytes, {start + end} needed; copy the checkpoint again"
            )
        tensors[name] = files.array(path, offset=start + begin, shape=shape, dtype=dtype)
        spans.append((begin, end))
    if any(stop > begin for (_, stop), (begin, _) in pairwise(sorted(spans))):
        raise DamagedInput(f"{path.name}: tensors overlap by the header's offsets; copy the checkpoint again")
    return tensors


def metadata(path: Path) -> dict[str, str]:
    """What the writer of a file says of it, beside its tensors."""
    found = _header(path)[0].get("__metadata__", {})
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DamagedInput(f"{path.name}: the header's __metadata__ is no table of strings")
    return found


def ordered(slots: Iterable[Slot]) -> list[Slot]:
    """In the order of the format's own writer, wide elements first: so every tensor lies at a multiple of its
    element."""
    return sorted(slots, key=lambda slot: (_ORDER.index(DTYPES[slot.tensor.dtype].safetensors), slot.name))


def file(path: str, slots: Sequence[Slot], metadata: Mapping[str, str] | None = None) -> TensorFile:
    """The file that holds these tensors in this order, its header and offsets ready."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position, starts = 0, []
    for slot in slots:
        end = position + nbytes(slot.tensor)
        header[slot.name] = {
            "dtype": DTYPES[slot.tensor.dtype].safetensors,
            "shape": list(slot.tensor.shape),
            "data_offsets": [position, end],
        }
        starts.append(position)
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = len(text).to_bytes(8, "little") + text
    return TensorFile(
        path=path, header=content, slots=tuple(slots), offsets=tuple(len(content) + start for start in starts)
    )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The parsed header, and where the data starts."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= LARGEST_HEADER:
            raise DamagedInput(f"{path.name} is no safetensors file: its header would have {length} bytes")
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedInput(f"{path.name} has a header that is not JSON ({error}); copy the checkpoint again") from error
    if not isinstance(header, dict) or len(text) < length:
        raise DamagedInput(f"{path.name} has a truncated or malformed header; copy the checkpoint again")
    return header, 8 + length
