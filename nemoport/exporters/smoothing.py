"""Pre-scales: a number for each input of a linear, by which the input is multiplied and the weights are divided, so
that what is hard to round moves from one into the other (SmoothQuant, AWQ).

    y = x w' = (x * pre_scale) (w / pre_scale)'

Linears that a loader fuses have one, the mean of what each would have; as ModelOpt does it, a weight is divided by its
own first, rounded, and then turned to the mean, and pre-scales are held in the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from nemoport.exporters.computed import Once, Single, single, solved
from nemoport.exporters.dtypes import real
from nemoport.exporters.encoding import Form
from nemoport.exporters.quantizing import Given, Mapped, rounded
from nemoport.exporters.tensor import LazyTensor, cut, read

PRE_SCALE = {
    "modelopt": Form("pre_quant_scale"),
    "trtllm": Form("prequant_scaling_factor", always=True),
    "onnx": Form("pre_scale"),
}
"""compressed-tensors has none: there a pre-scale is in a norm, or nowhere."""
_ROWS = 256


@dataclass(frozen=True)
class Smoothed:
    weight: LazyTensor
    """Divided by the pre-scale."""
    pre_scale: LazyTensor
    """[inputs], that of all that share it."""
    own: Once[Single]
    """What the weight would have alone, in float32."""
    kind: np.dtype[Any]


def smoothed(given: Given, own: Callable[[int], Single]) -> tuple[Smoothed, ...]:
    """`own(index)` is the pre-scale that a weight would have alone."""
    alone = [Once(partial(_alone, largest, own, index)) for index, largest in enumerate(given.largest())]
    kind = real(given.weights[0].dtype)
    shared = Once(lambda: _mean([rounded(each(), kind) for each in alone], kind))
    first = given.weights[0]
    pre_scale = solved((first.shape[1],), first.dtype, lambda: shared().astype(kind))
    pairs = zip(given.weights, alone, strict=True)
    return tuple(Smoothed(_turned(weight, each, shared, kind), pre_scale, each, kind) for weight, each in pairs)


def _alone(largest: Once[np.float32], own: Callable[[int], Single], index: int) -> Single:
    largest()  # refuses a weight that cannot be divided
    return own(index)


def _mean(scales: list[Single], kind: np.dtype[Any]) -> Single:
    if len(scales) == 1:
        return scales[0]
    total: Single = np.add.reduce(scales) / np.float32(len(scales))
    return rounded(total, kind)


def _turned(weight: LazyTensor, own: Once[Single], shared: Once[Single], kind: np.dtype[Any]) -> LazyTensor:
    """Divided by its own pre-scale, then turned to the one that is shared."""

    def divided(numbers: Single, inputs: slice) -> Single:
        return numbers * (np.float32(1) / own()[inputs])

    def turned(numbers: Single, inputs: slice) -> Single:
        mine, ours = rounded(own()[inputs], kind), shared()[inputs]
        return numbers if np.array_equal(mine, ours) else numbers * mine / ours

    return Mapped(Mapped(weight, divided), turned)


def folded(tensor: LazyTensor, pre_scale: LazyTensor, centre: float) -> LazyTensor:
    """A norm's weight or bias times the pre-scale of all that reads the norm; `centre` is what the weight lacks."""

    def change(numbers: Single, inputs: slice) -> Single:
        by = single(read(cut(pre_scale, 0, inputs.start, inputs.stop)))
        return (numbers + np.float32(centre)) * by - np.float32(centre)

    return Mapped(tensor, change)


def column_amax(weight: LazyTensor) -> Single:
    """max |w| of each input."""
    most = np.zeros(weight.shape[1], np.float32)
    for start in range(0, weight.shape[0], _ROWS):
        band = cut(weight, 0, start, min(start + _ROWS, weight.shape[0]))
        np.maximum(most, np.abs(single(read(band))).max(axis=0), out=most)
    return most


def mean_share(weight: LazyTensor, group: int) -> Single:
    """The mean over the rows of |w| / max |w| of its group, for each input; shares are rounded to the weight's dtype,
    and so is their mean."""
    total, (rows, width) = np.zeros(weight.shape[1]), weight.shape
    kind = real(weight.dtype)
    for start in range(0, rows, _ROWS):
        numbers = np.abs(single(read(cut(weight, 0, start, min(start + _ROWS, rows)))))
        groups = numbers.reshape(len(numbers), -1, group)
        most = np.maximum(groups.max(axis=2, keepdims=True), np.finfo(np.float32).tiny)
        total += rounded((groups / most).astype(np.float32), kind).reshape(len(numbers), width).sum(0, dtype=np.float64)
    return rounded((total / rows).astype(np.float32), kind)
