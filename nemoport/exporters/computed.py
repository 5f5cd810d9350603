"""Fields of a quantized weight, computed from the weight when they are read, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemoport.errors import UnsupportedInput
from nemoport.exporters.dtypes import Words, words
from nemoport.exporters.encoding import Follows
from nemoport.exporters.tensor import Deferred, Held, LazyTensor, Span, cut, read

Array = NDArray[Any]
Single = NDArray[np.float32]
Compute = Callable[[Array, Span], Array]
"""A band of the weight, whole in all that is seen together, and which inputs it spans, to the field's elements."""
T = TypeVar("T")
_TILE = 1 << 18
"""Elements computed at a time: what is made of them stays in cache."""


class Once(Generic[T]):
    """A value that is worked out when it is first asked for, and once, whoever asks."""

    def __init__(self, work_out: Callable[[], T]) -> None:
        self._work_out, self._lock, self._found = work_out, Lock(), list[T]()

    def __call__(self) -> T:
        with self._lock:
            if not self._found:
                self._found.append(self._work_out())
        return self._found[0]


def solved(shape: tuple[int, ...], dtype: str, value: Callable[[], Array]) -> LazyTensor:
    """A small array that a first pass solves, as a field."""
    return Deferred(shape, dtype, lambda: Held(value(), dtype))


@dataclass(frozen=True)
class Computed:
    """A box of a field whose elements each follow a few of the weight's."""

    weight: LazyTensor
    follows: Follows
    dtype: str
    compute: Compute
    together: tuple[int, int]
    """How many rows and inputs must be seen at once; 0 is all inputs."""
    spans: tuple[Span, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.spans)

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        inner = tuple((low + start, low + stop) for (low, _), (start, stop) in zip(self.spans, spans, strict=True))
        return replace(self, spans=inner)

    def fill(self, out: Words) -> None:
        steps, (rows, inputs) = dict(self.follows), self.weight.shape
        left, right = (0, inputs)
        if len(self.spans) > 1:
            left, right = self.spans[1][0] * steps[1], min(self.spans[1][1] * steps[1], inputs)
        unit = np.lcm(self.together[1] or inputs, steps.get(1, 1))
        outer = (int(left // unit * unit), int(min(-(-right // unit) * unit, inputs)))
        crop = slice((left - outer[0]) // steps.get(1, 1), -(-(right - outer[0]) // steps.get(1, 1)))
        first, last = self.spans[0]
        unit = int(np.lcm(self.together[0], steps[0])) // steps[0]
        for start, stop in _tiles(first, last, unit, _TILE // max(1, (outer[1] - outer[0]) * steps[0])):
            begin, end = start // unit * unit, -(-stop // unit) * unit
            band = cut(cut(self.weight, 0, begin * steps[0], min(end * steps[0], rows)), 1, *outer)
            found = self.compute(read(band), outer)[start - begin : stop - begin]
            found = found[:, crop] if len(self.spans) > 1 else found
            np.copyto(out[start - first : stop - first], np.ascontiguousarray(found).view(words(self.dtype)))


def computed(
    weight: LazyTensor, follows: Follows, dtype: str, compute: Compute, together: tuple[int, int] = (1, 1)
) -> LazyTensor:
    spans = tuple((0, -(-weight.shape[axis] // step)) for axis, step in follows)
    return Computed(weight, follows, dtype, compute, together, spans)


def single(block: Array) -> Single:
    """float32 of any float; of bfloat16 the words, shifted."""
    if block.dtype.name == "bfloat16":
        wide: Single = (block.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return wide
    return block.astype(np.float32)


def largest(name: str, tensor: LazyTensor) -> np.float32:
    """max |w| of a whole weight, which must be finite and somewhere not zero. Of 16-bit floats the words are compared,
    which without their signs are in the order of the numbers."""
    most: Any = np.float32(0)
    for start, stop in _tiles(0, tensor.shape[0], 1, 4 * _TILE // max(1, tensor.shape[1])):
        block = read(cut(tensor, 0, start, stop))
        if block.dtype.itemsize == 2:
            top = (block.view(np.uint16) & 0x7FFF).max(initial=0)
            found = single(np.array(top, np.uint16).view(block.dtype))
        else:
            found = np.abs(block).max(initial=0).astype(np.float32)
        most = np.maximum(most, found)  # NaN stays
    if not np.isfinite(most):
        raise UnsupportedInput(f"{name} holds a number that is not finite, which no scale fits; mend the checkpoint")
    if most == 0:
        raise UnsupportedInput(f"{name} is zero throughout, which no scale fits; leave it plain with --exclude")
    return np.float32(most)


def _tiles(first: int, last: int, unit: int, size: int) -> Iterator[Span]:
    """Runs of about `size` that begin at multiples of `unit`, the first apart."""
    step, start = max(unit, size // unit * unit), first
    while start < last:
        stop = min(start // unit * unit + step, last)
        yield start, stop
        start = stop
