"""What an ONNX file says of its inputs, outputs and external data, without its weights.

The file is walked as the protobuf message it is (https://protobuf.dev/programming-guides/encoding/), over a map of its
bytes: the weights inside it are stepped over, and nothing else of it is kept. Field numbers are those of onnx.proto3.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import OperatorSetIdProto, StringStringEntryProto, ValueInfoProto

MAX_FIELDS = 2_000_000
"""Nodes, initializers and their parts in one file; a decoder of 100 layers has some 10 000."""

_DATA_TYPES = {  # TensorProto.DataType -> what Triton calls it
    1: "TYPE_FP32",
    2: "TYPE_UINT8",
    3: "TYPE_INT8",
    4: "TYPE_UINT16",
    5: "TYPE_INT16",
    6: "TYPE_INT32",
    7: "TYPE_INT64",
    8: "TYPE_STRING",
    9: "TYPE_BOOL",
    10: "TYPE_FP16",
    11: "TYPE_FP64",
    12: "TYPE_UINT32",
    13: "TYPE_UINT64",
    16: "TYPE_BF16",
}
_MODEL_GRAPH, _OPSET = 7, 8
_INITIALIZER, _INPUT, _OUTPUT = 5, 11, 12
_TENSOR_NAME, _EXTERNAL_DATA = 8, 13
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Tensor:
    name: str
    data_type: str | None
    """TYPE_FP32; None where Triton has no such type."""
    shape: tuple[int | str, ...] | None
    """An axis without a number is its name, "" where it has none; None where the rank is not said."""

    @property
    def dims(self) -> tuple[int, ...] | None:
        return None if self.shape is None else tuple(axis if isinstance(axis, int) else -1 for axis in self.shape)


@dataclass(frozen=True)
class External:
    """Bytes of weights in another file, counted from the directory of the graph."""

    location: str
    end: int
    """The file must have this many bytes, as far as the graph says."""


@dataclass(frozen=True)
class Graph:
    source: str
    """What says it: the graph's file, or a manifest."""
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    external: tuple[External, ...] = ()
    opset: int | None = None
    """Of ai.onnx; None where it is not said."""


class Unreadable(Exception):
    """The file is no ONNX graph, or has no end."""


def read(path: Path, name: str) -> Graph:
    with path.open("rb") as file:
        try:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise Unreadable("the file is empty") from None
        with content:
            try:
                return _graph(content, name)
            except (IndexError, DecodeError, ValueError) as error:
                raise Unreadable(f"not an ONNX graph ({error})") from None


def _graph(content: mmap.mmap, name: str) -> Graph:
    budget = [MAX_FIELDS]
    parts = list(_fields(content, 0, len(content), budget))
    spans = [span for number, span in parts if number == _MODEL_GRAPH]
    if len(spans) != 1:
        raise Unreadable("not an ONNX graph (the model holds none)")
    inputs, outputs, initialized = [], [], set()
    external: dict[str, int] = {}
    for number, (start, end) in _fields(content, *spans[0], budget):
        if number == _INPUT:
            inputs.append(_tensor(content[start:end]))
        elif number == _OUTPUT:
            outputs.append(_tensor(content[start:end]))
        elif number == _INITIALIZER:
            weight, where = _initializer(content, start, end, budget)
            initialized.add(weight)
            if where:
                external[where.location] = max(external.get(where.location, 0), where.end)
    return Graph(
        name,
        tuple(tensor for tensor in inputs if tensor.name not in initialized),
        tuple(outputs),
        tuple(External(location, end) for location, end in sorted(external.items())),
        opset=_opset(content[start:end] for number, (start, end) in parts if number == _OPSET),
    )


def _opset(messages: Iterable[bytes]) -> int | None:
    said = map(OperatorSetIdProto.FromString, messages)
    return max((each.version for each in said if each.domain in ("", "ai.onnx")), default=None)


def _tensor(message: bytes) -> Tensor:
    info = ValueInfoProto.FromString(message)
    of = info.type.tensor_type
    shape = None
    if of.HasField("shape"):
        shape = tuple(axis.dim_value if axis.HasField("dim_value") else axis.dim_param for axis in of.shape.dim)
    return Tensor(info.name, _DATA_TYPES.get(of.elem_type), shape)


def _initializer(content: mmap.mmap, start: int, end: int, budget: list[int]) -> tuple[str, External | None]:
    name, entries = "", {}
    for number, (begin, stop) in _fields(content, start, end, budget):
        if number == _TENSOR_NAME:
            name = content[begin:stop].decode()
        elif number == _EXTERNAL_DATA:
            entry = StringStringEntryProto.FromString(content[begin:stop])
            entries[entry.key] = entry.value
    if "location" not in entries:
        return name, None
    return name, External(entries["location"], int(entries.get("offset") or 0) + int(entries.get("length") or 0))


def _fields(content: mmap.mmap, start: int, end: int, budget: list[int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Each field's number and the span of its content."""
    while start < end:
        budget[0] -= 1
        if budget[0] < 0:
            raise Unreadable(f"the graph has more than {MAX_FIELDS} parts, which were not all looked at")
        key, start = _varint(content, start)
        wire = key & 7
        if wire == _VARINT:
            _, stop = _varint(content, start)
        elif wire == _FIXED64:
            stop = start + 8
        elif wire == _FIXED32:
            stop = start + 4
        elif wire == _BYTES:
            size, start = _varint(content, start)
            stop = start + size
        else:
            raise Unreadable(f"not an ONNX graph (byte {start} starts no field)")
        if stop > end:
            raise Unreadable("cut short: a part is longer than the file")
        yield key >> 3, (start, stop)
        start = stop


def _varint(content: mmap.mmap, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise Unreadable(f"not an ONNX graph (the number at byte {at} has no end)")
