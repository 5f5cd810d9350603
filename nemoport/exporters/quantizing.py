"""What a quantizer is given and gives: weights that share their scales, and the fields that store them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from nemoport.errors import UnsupportedInput
from nemoport.exporters.computed import Once, Single, largest, single
from nemoport.exporters.dtypes import Words, words
from nemoport.exporters.encoding import Encoding
from nemoport.exporters.groups import FUSED
from nemoport.exporters.statistics import Statistics
from nemoport.exporters.tensor import LazyTensor, Span, read

Fields = dict[str, LazyTensor]
Shares = tuple[tuple[str, ...], ...]
APART: Shares = ()
TOGETHER: Shares = FUSED


@dataclass(frozen=True, kw_only=True)
class Given:
    """Weights that read one input and share what is one number for all of them."""

    names: tuple[str, ...]
    weights: tuple[LazyTensor, ...]
    dialect: str
    pre_scaled: bool = True
    """A pre-scale has a place: beside the weight, or in a norm that feeds it."""
    input: str
    """The linear under which the statistics of their input stand."""
    statistics: Callable[[], Statistics] | None
    group: int | None = None
    """Inputs that are to share a scale, of a method that lets it be chosen."""

    def saw(self, what: str) -> Single:
        """`amax` or `mean` of their input."""
        assert self.statistics is not None, f"{self.names[0]} was not calibrated"
        return self.statistics().of(self.input, what)

    def losses(self, linear: str) -> Single:
        assert self.statistics is not None, f"{linear} was not calibrated"
        return self.statistics().of(linear, "losses")

    @property
    def calibrated(self) -> bool:
        return self.statistics is not None

    def largest(self) -> tuple[Once[np.float32], ...]:
        """max |w| of each weight."""
        pairs = zip(self.names, self.weights, strict=True)
        return tuple(Once(partial(largest, f"{name}.weight", weight)) for name, weight in pairs)


class Quantizer(Protocol):
    """A module in `quantizers/`."""

    ALGORITHM: str
    """ModelOpt's word for it; empty where it has none."""
    NEEDS: Mapping[str, tuple[str, ...]]
    """By dialect: the statistics without which it cannot be written there."""
    SHARES: Mapping[str, Shares]
    """By dialect: which linears of a group have one scale, since a loader fuses them."""

    def encoding(self, group: int | None) -> Encoding: ...

    def quantize(self, given: Given) -> tuple[Fields, ...]:
        """The fields of each weight, lazy. `pre_scale` may be among them."""
        ...

    def dequantize(self, fields: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]: ...


def joint(found: tuple[Once[np.float32], ...]) -> Once[np.float32]:
    """The largest of several."""
    return Once(lambda: np.float32(max(each() for each in found)))


def input_amax(given: Given) -> np.float32:
    """The largest magnitude of the input at all."""
    amax = np.float32(given.saw("amax").max())
    if not amax > 0:
        raise UnsupportedInput(
            f"the input of {given.names[0]} was zero throughout calibration, which no scale fits; calibrate with text "
            "that reaches it, or leave it plain with --exclude"
        )
    return amax


@dataclass(frozen=True)
class Mapped:
    """Every element of a weight changed by a function of its input channel, in float32 and rounded once."""

    source: LazyTensor
    change: Callable[[Single, slice], Single]
    """Elements [..., inputs], and which inputs."""
    left: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> str:
        return self.source.dtype

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        return replace(self, source=self.source.cut(spans), left=self.left + spans[-1][0])

    def fill(self, out: Words) -> None:
        block = read(self.source)
        changed = self.change(single(block), slice(self.left, self.left + block.shape[-1]))
        np.copyto(out, changed.astype(block.dtype).view(words(self.dtype)))


def rounded(numbers: Single, dtype: np.dtype[Any]) -> Single:
    """As a dtype holds them, in float32 again."""
    return single(numbers.astype(dtype))
