"""Lazy tensors made of another one: turned around, seen under another name, or with a number added."""

from __future__ import annotations

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


def shift(tensor: LazyTensor, by: float) -> LazyTensor:
    return Shifted(tensor, by)


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


def viewed(tensor: LazyTensor, dtype: str) -> LazyTensor:
    assert itemsize(tensor.dtype) == itemsize(dtype), (tensor.dtype, dtype)
    return tensor if tensor.dtype == dtype else Viewed(tensor, dtype)


def single(tensor: LazyTensor) -> LazyTensor:
    return tensor.source if isinstance(tensor, Squeezed) else Single(tensor)


def squeezed(tensor: LazyTensor) -> LazyTensor:
    """A vector of one as a scalar."""
    return tensor.source if isinstance(tensor, Single) else squeeze(tensor)
