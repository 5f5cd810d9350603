"""Numbers of four and eight bits turned from how fields hold them to how ONNX does, and back.

field int4      uint8 [out / 2, in]            two rows in a byte, the even one in the low nibble
INT4            [in, out], two in a byte       the same bytes turned around: neighbours share a byte there
MatMulNBits     uint8 [out, in / block, ...]   two inputs in a byte; plus 8, or 128, so that none is negative
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nemoport.errors import DamagedInput
from nemoport.exporters.dtypes import Words, words
from nemoport.exporters.tensor import LazyTensor, Span, cut, read, reshaped


@dataclass(frozen=True)
class Flipped:
    """Every byte with the bits of `mask` changed: two's complement to offset binary, and back."""

    source: LazyTensor
    mask: int
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return replace(self, source=self.source.cut(spans))

    def fill(self, out: Words) -> None:
        self.source.fill(out)
        np.bitwise_xor(out, np.uint8(self.mask), out=out)


@dataclass(frozen=True)
class Repacked:
    """Nibbles of a matrix whose pairs lie along one axis, paired along the other: `axis`. `spans` are in nibbles."""

    source: LazyTensor
    axis: int
    spans: tuple[Span, Span]
    dtype: str = "uint8"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple((stop - start) // (2 if axis == self.axis else 1) for axis, (start, stop) in enumerate(self.spans))

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        steps = (2 if axis == self.axis else 1 for axis in (0, 1))
        moved = [
            (low + start * step, low + stop * step)
            for (low, _), (start, stop), step in zip(self.spans, spans, steps, strict=True)
        ]
        return replace(self, spans=(moved[0], moved[1]))

    def fill(self, out: Words) -> None:
        paired = 1 - self.axis
        first, last = self.spans[paired]
        box = cut(self.source, self.axis, *self.spans[self.axis])
        bytes_ = read(cut(box, paired, first // 2, -(-last // 2))).view(np.uint8)
        nibbles = np.stack([bytes_ & 15, bytes_ >> 4], axis=paired + 1)
        shape = list(bytes_.shape)
        shape[paired] *= 2
        inside = [slice(None), slice(None)]
        inside[paired] = slice(first % 2, first % 2 + last - first)
        numbers = nibbles.reshape(shape)[tuple(inside)]
        low, high = (numbers[0::2], numbers[1::2]) if self.axis == 0 else (numbers[:, 0::2], numbers[:, 1::2])
        np.copyto(out, low | high << 4)


@dataclass(frozen=True)
class Blocked:
    """[rows, blocks, size] of [rows, blocks * size]."""

    source: LazyTensor
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        rows, width = self.source.shape
        return (rows, width // self.size, self.size)

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        rows, (first, last), (start, stop) = spans
        if (start, stop) == (0, self.size):
            return Blocked(self.source.cut((rows, (first * self.size, last * self.size))), self.size)
        assert last - first == 1, spans  # part of a block: blocks are cut apart before
        whole = self.source.cut((rows, (first * self.size + start, first * self.size + stop)))
        return Blocked(whole, stop - start)

    def fill(self, out: Words) -> None:
        np.copyto(out, read(self.source).view(words(self.dtype)).reshape(self.shape))


@dataclass(frozen=True)
class Repeated:
    """[rows, count] of [rows]: one scale for every block."""

    source: LazyTensor
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.source.shape, self.count)

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        rows, (start, stop) = spans
        return Repeated(self.source.cut((rows,)), stop - start)

    def fill(self, out: Words) -> None:
        np.copyto(out, read(self.source).view(words(self.dtype))[:, None])


@dataclass(frozen=True)
class Agreed:
    """[rows] of [rows, count] whose columns must be equal."""

    source: LazyTensor
    name: str
    """Of the weight, for errors."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[:1]

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return replace(self, source=cut(self.source, 0, *spans[0]))

    def fill(self, out: Words) -> None:
        columns = read(self.source).view(words(self.dtype))
        if np.any(columns != columns[:, :1]):
            raise DamagedInput(f"{self.name} has several scales to a row, one for all blocks needed; convert it anew")
        np.copyto(out, columns[:, 0])


def along_inputs(pairs: LazyTensor) -> LazyTensor:
    """[out, in / 2] of [out / 2, in]."""
    rows, inputs = pairs.shape
    return Repacked(pairs, 1, ((0, 2 * rows), (0, inputs)))


def along_rows(pairs: LazyTensor) -> LazyTensor:
    """[out / 2, in] of [out, in / 2]."""
    rows, inputs = pairs.shape
    return Repacked(pairs, 0, ((0, rows), (0, 2 * inputs)))


def joined(blocks: LazyTensor) -> LazyTensor:
    """[rows, blocks * size] of [rows, blocks, size], in a file."""
    rows, count, size = blocks.shape
    return reshaped(blocks, (rows, count * size))
