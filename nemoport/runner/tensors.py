"""One tensor on the wire: raw bytes and JSON lists to numpy, and back.

Raw elements are little-endian and row-major. A BYTES element is a uint32 length and that many bytes:

    [3 0 0 0 'a' 'b' 'c'  0 0 0 0  1 0 0 0 'd']   is   [b'abc', b'', b'd']
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.runner.datatypes import BYTES, Datatype
from nemoport.runner.refusal import Refusal

Array = NDArray[Any]
Buffer = bytes | bytearray | memoryview

MOST_DIMS = 64  # of numpy
_LENGTH = struct.Struct("<I")
_DEEPEST_JSON = 100  # lists within lists; the limit of Triton's HTTP front end


def show(shape: Iterable[int]) -> str:
    """Triton's way of printing a shape: `[-1,16]`."""
    return "[" + ",".join(map(str, shape)) + "]"


def split_bytes(buffer: Buffer, count: int, whose: str) -> Array:
    """[count] objects of type bytes; `whose` ends the sentence of an error, as in "inference input 'X'"."""
    view, at = memoryview(buffer), 0
    elements: list[bytes] = []
    while at < len(view):
        if len(view) - at < _LENGTH.size:
            raise Refusal(
                f"incomplete string length indicator for {whose}, expecting {_LENGTH.size} bytes "
                f"but only {len(view) - at} bytes available"
            )
        if len(elements) == count:
            raise Refusal(f"unexpected number of string elements {count + 1} for {whose}, expecting {count}")
        (length,) = _LENGTH.unpack_from(view, at)
        at += _LENGTH.size
        if length > len(view) - at:
            raise Refusal(f"incomplete string data for {whose}, expecting {length} bytes but only {len(view) - at}")
        elements.append(bytes(view[at : at + length]))
        at += length
    if len(elements) != count:
        raise Refusal(f"expected {count} string elements for {whose}, got {len(elements)}")
    return _objects(elements)


def join_bytes(elements: Iterable[bytes]) -> bytes:
    """The inverse of `split_bytes`."""
    return b"".join(chain.from_iterable((_LENGTH.pack(len(element)), element) for element in elements))


def from_raw(datatype: Datatype, buffer: Buffer) -> Array:
    """A flat view of the buffer, not a copy, whose length is a whole number of elements (not for BYTES)."""
    flat = np.frombuffer(buffer, datatype.numpy)
    # A tail starts wherever the JSON before it ended; kernels may read only aligned memory.
    return flat if flat.flags.aligned else flat.copy()


def to_raw(datatype: Datatype, array: Array) -> Buffer:
    if datatype is BYTES:
        return join_bytes(array.reshape(-1))
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def from_json(datatype: Datatype, data: list[Any], shape: Sequence[int], name: str) -> Array:
    """A flat array from a list, or lists in lists, of exactly as many elements as the shape has."""
    if not datatype.json:
        raise Refusal(
            f"receiving {datatype.name} data via JSON is not supported. "
            f"Please use the binary data format for input {name}"
        )
    elements, types = _flatten(data)
    for wrong in types - set(datatype.json):
        raise Refusal(f"Unable to parse 'data': input '{name}' is {datatype.name}, and a {wrong.__name__} is in it")
    if len(elements) != math.prod(shape):
        raise Refusal(
            f"Unable to parse 'data': shape {show(shape)} of input '{name}' does not match true shape "
            f"of 'data' field, which has {len(elements)} elements"
        )
    if datatype is BYTES:
        return _objects([_encode(element, name) for element in elements])
    try:
        with np.errstate(over="ignore"):
            return np.array(elements, datatype.numpy)
    except OverflowError as error:
        raise Refusal(f"Unable to parse 'data': input '{name}' is {datatype.name}: {error}") from None


def to_json(datatype: Datatype, array: Array, name: str) -> list[Any]:
    """A flat list in row-major order."""
    if not datatype.json:
        raise Refusal(
            f"sending {datatype.name} data via JSON is not supported. "
            f"Please use the binary data format for output {name}"
        )
    flat: list[Any] = array.reshape(-1).tolist()
    if datatype is not BYTES:
        return flat
    try:
        return [element.decode() for element in flat]
    except UnicodeDecodeError:
        raise Refusal(f"output '{name}' is not UTF-8 text, ask for it in the binary data format") from None


def _flatten(data: list[Any]) -> tuple[list[Any], set[type]]:
    types = set(map(type, data))
    for _ in range(_DEEPEST_JSON):
        if list not in types:
            return data, types
        data = list(chain.from_iterable(item if isinstance(item, list) else (item,) for item in data))
        types = set(map(type, data))
    raise Refusal(f"JSON nesting depth exceeds maximum allowed limit ({_DEEPEST_JSON})")


def _objects(elements: list[bytes]) -> Array:
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    return array


def _encode(text: str, name: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise Refusal(f"Unable to parse 'data': input '{name}' has text with half of a surrogate pair") from None
