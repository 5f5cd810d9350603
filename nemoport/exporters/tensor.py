"""Tensors whose shape is known and whose bytes are not read yet.

A lazy tensor is a small tree: stored arrays at the leaves, and above them mosaics (concatenations, shards, padding),
casts and the like. Cutting a tree moves down to the leaves, so only the bytes of a wanted slice are ever touched;
filling a buffer walks the tree once and copies straight from the mapped files.

    stacked = files.array("__0_0.distcp", offset=512, shape=(4, 96, 64), dtype="bfloat16")
    layer = squeeze(cut(stacked, 0, 2, 3))                  # [96, 64], nothing read
    gate, up = cut(layer, 0, 0, 48), cut(layer, 0, 48, 96)
    up_then_gate = concat([up, gate], axis=0)               # still nothing
    read(up_then_gate)                                      # two copies
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from threading import Lock
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nemoport.errors import DamagedInput, InputError
from nemoport.exporters.dtypes import Words, itemsize, real, words

Buffer = bytes | memoryview
Span = tuple[int, int]
"""Start and stop along one axis."""


class LazyTensor(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        """The box given by one span for each axis."""
        ...

    def fill(self, out: Words) -> None:
        """Write every element into `out`: same shape, unsigned words of the dtype's width, last axis contiguous."""
        ...


class Store(Protocol):
    """Bytes that can be had from anywhere: a file, a member of an archive."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def view(self, start: int, stop: int) -> Buffer:
        """The bytes of that range, mapped or read."""
        ...


class Files:
    """Memory maps of the files of one checkpoint, at most `limit` open at a time, so that a checkpoint of thousands
    of shards stays within the limit on open files."""

    def __init__(self, limit: int = 128) -> None:
        self._limit, self._lock = limit, Lock()
        self._maps: OrderedDict[Path, mmap.mmap] = OrderedDict()

    def bytes(self, path: Path) -> mmap.mmap:
        with self._lock:
            if path not in self._maps:
                while len(self._maps) >= self._limit:
                    self._maps.popitem(last=False)
                with path.open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            self._maps.move_to_end(path)
            return self._maps[path]

    def store(self, path: Path) -> MappedFile:
        return MappedFile(self, path, path.stat().st_size)

    def array(self, path: Path, *, offset: int, shape: tuple[int, ...], dtype: str) -> LazyTensor:
        """A row-major little-endian array inside a file, at any byte offset. The file must be long enough."""
        return stored(self.store(path), offset=offset, shape=shape, dtype=dtype)


@dataclass(frozen=True)
class MappedFile:
    """A whole file as a Store."""

    files: Files
    path: Path
    size: int

    @property
    def name(self) -> str:
        return self.path.name

    def view(self, start: int, stop: int) -> Buffer:
        return memoryview(self.files.bytes(self.path))[start:stop] if start < stop else b""  # none map an empty file


@dataclass(frozen=True)
class Stored:
    """A box of a contiguous row-major array in a store."""

    store: Store
    offset: int
    stored_shape: tuple[int, ...]
    spans: tuple[Span, ...]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.spans)

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        inner = tuple((low + start, low + stop) for (low, _), (start, stop) in zip(self.spans, spans, strict=True))
        return replace(self, spans=inner)

    def fill(self, out: Words) -> None:
        if not out.size:
            return
        strides = [itemsize(self.dtype)]
        for size in reversed(self.stored_shape[1:]):
            strides.insert(0, strides[0] * size)
        # From the first element of the box to the last; it may start at any byte, numpy copes with unaligned views.
        first = sum(start * stride for (start, _), stride in zip(self.spans, strides, strict=False))
        last = sum((stop - 1) * stride for (_, stop), stride in zip(self.spans, strides, strict=False))
        content = self.store.view(self.offset + first, self.offset + last + itemsize(self.dtype))
        box: Words = np.ndarray(self.shape, words(self.dtype), content, strides=strides[: len(self.shape)])
        np.copyto(out, box)


def stored(store: Store, *, offset: int, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    """A whole array in a store. The store must be long enough."""
    if store.size < (needed := offset + prod(shape) * itemsize(dtype)):
        raise DamagedInput(f"{store.name} is truncated: {store.size} bytes, {needed} needed; copy the checkpoint again")
    return Stored(store, offset, shape, tuple((0, size) for size in shape), dtype)


@dataclass(frozen=True)
class Deferred:
    """A tensor whose place in its file is looked up when it is read: the directory of an archive, say."""

    shape: tuple[int, ...]
    dtype: str
    look_up: Callable[[], LazyTensor]

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        shape = tuple(stop - start for start, stop in spans)
        return Deferred(shape, self.dtype, lambda: self.look_up().cut(spans))

    def fill(self, out: Words) -> None:
        self.look_up().fill(out)


def reshaped(tensor: LazyTensor, shape: tuple[int, ...]) -> LazyTensor:
    """The same elements in the same order under another shape. Of a whole stored array only: others have no order."""
    assert prod(tensor.shape) == prod(shape), (tensor.shape, shape)
    if isinstance(tensor, Deferred):
        return Deferred(shape, tensor.dtype, lambda: reshaped(tensor.look_up(), shape))
    assert isinstance(tensor, Stored), tensor
    assert tensor.shape == tensor.stored_shape, tensor
    return replace(tensor, stored_shape=shape, spans=tuple((0, size) for size in shape))


@dataclass(frozen=True)
class Mosaic:
    """Boxes side by side that cover `shape` exactly: shards of a tensor, or parts joined along an axis."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[tuple[int, ...], LazyTensor], ...]
    """The corner at which each piece begins, and the piece."""

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        kept = []
        for corner, piece in self.pieces:
            inside = tuple(
                (max(start, low) - low, min(stop, low + size) - low)
                for (start, stop), low, size in zip(spans, corner, piece.shape, strict=True)
            )
            if all(start < stop for start, stop in inside):
                moved = tuple(max(low, start) - start for low, (start, _) in zip(corner, spans, strict=True))
                kept.append((moved, piece.cut(inside)))
        shape = tuple(stop - start for start, stop in spans)
        if len(kept) == 1 and kept[0][1].shape == shape:
            return kept[0][1]
        return Mosaic(shape, self.dtype, tuple(kept))

    def fill(self, out: Words) -> None:
        for corner, piece in self.pieces:
            piece.fill(out[tuple(slice(low, low + size) for low, size in zip(corner, piece.shape, strict=True))])


@dataclass(frozen=True)
class Zeros:
    shape: tuple[int, ...]
    dtype: str

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return Zeros(tuple(stop - start for start, stop in spans), self.dtype)

    def fill(self, out: Words) -> None:
        out[...] = 0


@dataclass(frozen=True, eq=False)
class Held:
    """An array that is in memory already: a small constant, such as a table of angles."""

    array: NDArray[np.generic]
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return Held(self.array[tuple(slice(start, stop) for start, stop in spans)], self.dtype)

    def fill(self, out: Words) -> None:
        np.copyto(out, self.array.view(words(self.dtype)))


@dataclass(frozen=True)
class Squeezed:
    """A tensor without its leading axis of length one: one layer of a stack."""

    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[1:]

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return Squeezed(self.source.cut(((0, 1), *spans)))

    def fill(self, out: Words) -> None:
        self.source.fill(out[np.newaxis])


@dataclass(frozen=True)
class Unsqueezed:
    """A tensor with a leading axis of length one: what goes into a stack."""

    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (1, *self.source.shape)

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        assert spans[0] == (0, 1), spans
        return Unsqueezed(self.source.cut(spans[1:]))

    def fill(self, out: Words) -> None:
        self.source.fill(out[0])


@dataclass(frozen=True)
class Cast:
    """Another dtype, rounded to nearest even. A finite number that the dtype cannot hold is an error."""

    source: LazyTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return Cast(self.source.cut(spans), self.dtype)

    def fill(self, out: Words) -> None:
        numbers = read(self.source)
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are looked at below, NaN stays NaN
            rounded = numbers.astype(real(self.dtype))
            lost = itemsize(self.dtype) <= 2 and np.any(np.isinf(rounded) & np.isfinite(numbers))
        if lost:
            worst = float(np.max(np.abs(numbers.astype(np.float32))))
            raise InputError(f"a value of magnitude {worst:g} does not fit in {self.dtype}; use bfloat16 or float32")
        np.copyto(out, rounded.view(words(self.dtype)))


def cut(tensor: LazyTensor, axis: int, start: int, stop: int) -> LazyTensor:
    """`tensor[..., start:stop, ...]` along one axis."""
    assert 0 <= start <= stop <= tensor.shape[axis], (tensor.shape, axis, start, stop)
    if (start, stop) == (0, tensor.shape[axis]):
        return tensor
    spans: list[Span] = [(0, size) for size in tensor.shape]
    spans[axis] = (start, stop)
    return tensor.cut(tuple(spans))


def concat(tensors: Sequence[LazyTensor], axis: int) -> LazyTensor:
    first = tensors[0]
    if len(tensors) == 1:
        return first
    position, pieces = 0, []
    for tensor in tensors:
        assert tensor.dtype == first.dtype, (tensor.dtype, first.dtype)
        corner = [0] * len(first.shape)
        corner[axis] = position
        pieces.append((tuple(corner), tensor))
        position += tensor.shape[axis]
    shape = (*first.shape[:axis], position, *first.shape[axis + 1 :])
    return Mosaic(shape, first.dtype, tuple(pieces))


def pad(tensor: LazyTensor, axis: int, size: int) -> LazyTensor:
    """Zeros appended along an axis up to `size`."""
    if (missing := size - tensor.shape[axis]) == 0:
        return tensor
    shape = (*tensor.shape[:axis], missing, *tensor.shape[axis + 1 :])
    return concat([tensor, Zeros(shape, tensor.dtype)], axis)


def squeeze(tensor: LazyTensor) -> LazyTensor:
    assert tensor.shape[0] == 1, tensor.shape
    return tensor.source if isinstance(tensor, Unsqueezed) else Squeezed(tensor)


def unsqueeze(tensor: LazyTensor) -> LazyTensor:
    return tensor.source if isinstance(tensor, Squeezed) else Unsqueezed(tensor)


def unstacked(tensor: LazyTensor) -> tuple[LazyTensor, ...]:
    """Each `tensor[i]` along the first axis. The pieces of a mosaic are looked at once, not once for each index: a
    stack of experts has thousands."""
    count = tensor.shape[0]
    if not isinstance(tensor, Mosaic) or any(piece.shape[0] != 1 for _, piece in tensor.pieces):
        return tuple(squeeze(cut(tensor, 0, index, index + 1)) for index in range(count))
    found: list[list[tuple[tuple[int, ...], LazyTensor]]] = [[] for _ in range(count)]
    for corner, piece in tensor.pieces:
        found[corner[0]].append((corner[1:], squeeze(piece)))
    shape = tensor.shape[1:]
    return tuple(
        pieces[0][1] if len(pieces) == 1 and pieces[0][1].shape == shape else Mosaic(shape, tensor.dtype, tuple(pieces))
        for pieces in found
    )


def stack(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Along a new first axis: the inverse of `unstacked`."""
    return concat([unsqueeze(tensor) for tensor in tensors], 0)


def cast(tensor: LazyTensor, dtype: str) -> LazyTensor:
    return tensor if tensor.dtype == dtype else Cast(tensor, dtype)


def read(tensor: LazyTensor) -> NDArray[np.generic]:
    """The whole tensor in memory, in its own dtype."""
    out: Words = np.empty(tensor.shape, words(tensor.dtype))
    tensor.fill(out)
    return out.view(real(tensor.dtype))


def nbytes(tensor: LazyTensor) -> int:
    return prod(tensor.shape) * itemsize(tensor.dtype)
