"""Lazy tensors made of others: turned around, taken in turns, seen under another name, a number added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.dtypes import Words, itemsize, words
from nemoport.exporters.tensor import LazyTensor, Span, Squeezed, read, squeeze


@dataclass(frozen=True)
class Transposed:
    """[columns, rows] of a matrix."""

    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.source.shape
        return (columns, rows)

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return Transposed(self.source.cut(spans[::-1]))

    def fill(self, out: Words) -> None:
        turned: Words = np.empty(self.source.shape, out.dtype)
        self.source.fill(turned)
        np.copyto(out, turned.T)


@dataclass(frozen=True)
class Shifted:
    """Every element plus `by`, in float32: a cast that follows is then the only rounding."""

    source: LazyTensor
    by: float
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return replace(self, source=self.source.cut(spans))

    def fill(self, out: Words) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # NaN stays NaN
            numbers: NDArray[np.float32] = read(self.source).astype(np.float32) + np.float32(self.by)
        np.copyto(out, numbers.view(words(self.dtype)))


def transpose(tensor: LazyTensor) -> LazyTensor:
    return tensor.source if isinstance(tensor, Transposed) else Transposed(tensor)


def strided(tensor: LazyTensor, start: int, step: int) -> LazyTensor:
    return Strided(tensor, start, step)


def interleave(tensors: Sequence[LazyTensor]) -> LazyTensor:
    assert len({tensor.shape for tensor in tensors}) == 1, [tensor.shape for tensor in tensors]
    return Interleaved(tuple(tensors))


def shift(tensor: LazyTensor, by: float) -> LazyTensor:
    return Shifted(tensor, by)


@dataclass(frozen=True)
class Strided:
    """`source[start :: step]` of the rows. The rows between are read as well, since they lie among the wanted ones."""

    source: LazyTensor
    start: int
    step: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(range(self.start, self.source.shape[0], self.step)), *self.source.shape[1:])

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        (first, stop), *others = spans
        last = self.start + max(stop - 1, first) * self.step + 1
        rows = (self.start + first * self.step, min(last, self.source.shape[0]))
        if first == stop:
            rows = (0, 0)
        return Strided(self.source.cut((rows, *others)), 0, self.step)

    def fill(self, out: Words) -> None:
        every: Words = np.empty(self.source.shape, out.dtype)
        self.source.fill(every)
        np.copyto(out, every[self.start :: self.step])


@dataclass(frozen=True)
class Interleaved:
    """Rows of several tensors in turns: the first of each, then the second of each. Earlier ones may have one more."""

    sources: tuple[LazyTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(source.shape[0] for source in self.sources), *self.sources[0].shape[1:])

    @property
    def dtype(self) -> str:
        return self.sources[0].dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        (first, stop), *others = spans
        count, kept = len(self.sources), []
        for row in range(first, first + count):
            start = row // count
            rows = (start, start + len(range(row, stop, count)))
            kept.append(self.sources[row % count].cut((rows, *others)))
        return Interleaved(tuple(kept))

    def fill(self, out: Words) -> None:
        for turn, source in enumerate(self.sources):
            if source.shape[0]:
                source.fill(out[turn :: len(self.sources)])


@dataclass(frozen=True)
class Viewed:
    """The same bytes under the name of another dtype of the same width."""

    source: LazyTensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return replace(self, source=self.source.cut(spans))

    def fill(self, out: Words) -> None:
        self.source.fill(out)


@dataclass(frozen=True)
class Single:
    """A scalar as a vector of one."""

    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,)

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        assert spans == ((0, 1),), spans
        return self

    def fill(self, out: Words) -> None:
        self.source.fill(out[0, ...])


@dataclass(frozen=True)
class Spaced:
    """[a, 1, b, 1] of [a, b]."""

    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for axis in self.source.shape for size in (axis, 1))

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return Spaced(self.source.cut(spans[::2]))

    def fill(self, out: Words) -> None:
        self.source.fill(out[(slice(None), 0) * len(self.source.shape)])


@dataclass(frozen=True)
class Closed:
    """[a, b] of [a, 1, b, 1]."""

    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape[::2]

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return Closed(self.source.cut(tuple(span for each in spans for span in (each, (0, 1)))))

    def fill(self, out: Words) -> None:
        self.source.fill(out[(slice(None), np.newaxis) * (len(self.source.shape) // 2)])


def spaced(tensor: LazyTensor) -> LazyTensor:
    return tensor.source if isinstance(tensor, Closed) else Spaced(tensor)


def closed(tensor: LazyTensor) -> LazyTensor:
    return tensor.source if isinstance(tensor, Spaced) else Closed(tensor)


def viewed(tensor: LazyTensor, dtype: str) -> LazyTensor:
    assert itemsize(tensor.dtype) == itemsize(dtype), (tensor.dtype, dtype)
    return tensor if tensor.dtype == dtype else Viewed(tensor, dtype)


def single(tensor: LazyTensor) -> LazyTensor:
    return tensor.source if isinstance(tensor, Squeezed) else Single(tensor)


def squeezed(tensor: LazyTensor) -> LazyTensor:
    """A vector of one as a scalar."""
    return tensor.source if isinstance(tensor, Single) else squeeze(tensor)
