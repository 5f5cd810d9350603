"""Numbers of fewer than eight bits, or of eight, as other formats lay them out in words: read and written a box at a
time, the same numbers either way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import lcm

import numpy as np

from nemoport.exporters.dtypes import Words, words
from nemoport.exporters.tensor import LazyTensor, Span, read

Follows = tuple[tuple[int, int], ...]
Words8 = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Change = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Packing:
    """Another layout of a field, and the way there and back."""

    dtype: str
    follows: Follows
    pack: Change
    unpack: Change

    def shape(self, weight: Sequence[int]) -> tuple[int, ...]:
        return tuple(-(-weight[axis] // step) for axis, step in self.follows)


@dataclass(frozen=True)
class Repacked:
    """A box of a field in another layout."""

    source: LazyTensor
    source_follows: Follows
    follows: Follows
    weight: tuple[int, ...]
    dtype: str
    change: Change
    spans: tuple[Span, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.spans)

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        inner = tuple((low + start, low + stop) for (low, _), (start, stop) in zip(self.spans, spans, strict=True))
        return replace(self, spans=inner)

    def fill(self, out: Words) -> None:
        boxes, crop = [], []
        for (start, stop), (axis, step), (_, theirs) in zip(self.spans, self.follows, self.source_follows, strict=True):
            unit = lcm(step, theirs)
            low = start * step // unit * unit
            high = min(-(-stop * step // unit) * unit, self.weight[axis])
            boxes.append((low // theirs, -(-high // theirs)))
            crop.append(slice(start - low // step, stop - low // step))
        found = self.change(read(self.source.cut(tuple(boxes))))
        np.copyto(out, np.ascontiguousarray(found[tuple(crop)]).view(words(self.dtype)))


def repacked(
    source: LazyTensor, source_follows: Follows, follows: Follows, weight: tuple[int, ...], dtype: str, change: Change
) -> LazyTensor:
    spans = tuple((0, weight[axis] // step) for axis, step in follows)
    return Repacked(source, source_follows, follows, weight, dtype, change, spans)


def _nibbles_from_row_pairs(block: np.ndarray) -> Words8:
    """uint8 [rows / 2, inputs], two rows in a byte, to two's complement nibbles [rows, inputs]."""
    pairs = block.view(np.uint8)
    return np.stack([pairs & 15, pairs >> 4], axis=1).reshape(2 * pairs.shape[0], pairs.shape[1])


def _eight_in_a_word(block: np.ndarray) -> np.ndarray:
    nibbles = _nibbles_from_row_pairs(block) ^ 8
    return np.ascontiguousarray(nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(np.int32)


def _from_eight_in_a_word(block: np.ndarray) -> np.ndarray:
    pairs = np.ascontiguousarray(block).view(np.uint8)
    nibbles = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(pairs.shape[0], 2 * pairs.shape[1]) ^ 8
    return nibbles[0::2] | nibbles[1::2] << 4


def _four_in_a_word(block: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(block).view(np.uint8) ^ 0x80).view(np.int32)


def _from_four_in_a_word(block: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(block).view(np.uint8) ^ 0x80).view(np.int8)


FOUR_BITS = Packing("int32", ((0, 1), (1, 8)), _eight_in_a_word, _from_eight_in_a_word)
"""Eight inputs in an int32, the first in the lowest bits, 8 added to each: compressed-tensors' pack_to_int32."""
EIGHT_BITS = Packing("int32", ((0, 1), (1, 4)), _four_in_a_word, _from_four_in_a_word)
"""Four inputs in an int32, 128 added to each."""
