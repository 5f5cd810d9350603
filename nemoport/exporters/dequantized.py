"""What quantized weights stand for, as lazy float32 tensors: for execution by the reference, never for an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType

import numpy as np

from nemoport import plugins
from nemoport.exporters.dtypes import Words, words
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.tensor import LazyTensor, Span, read

QUANTIZERS = "nemoport.exporters.quantizers"


def algorithms() -> dict[str, ModuleType]:
    """ModelOpt's word -> the quantizer whose encoding it means; several may share one, and some have none."""
    found = plugins.load_all(QUANTIZERS).items()
    own = (module for name, module in found if module.encoding(None).method == name)
    return {module.ALGORITHM: module for module in own if module.ALGORITHM}


@dataclass(frozen=True)
class Dequantized:
    """A box of a quantized weight."""

    source: Encoded
    spans: tuple[Span, ...]
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.spans)

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        inner = tuple((low + start, low + stop) for (low, _), (start, stop) in zip(self.spans, spans, strict=True))
        return replace(self, spans=inner)

    def fill(self, out: Words) -> None:
        """Read the blocks that the box touches, and keep the box."""
        outer = []
        for axis, (start, stop) in enumerate(self.spans):
            steps = [step for each in self.source.encoding.fields for along, step in each.follows if along == axis]
            step = int(np.lcm.reduce(steps))
            outer.append((start // step * step, min(-(-stop // step) * step, self.source.shape[axis])))
        fields = {name: read(tensor) for name, tensor in self.source.cut(tuple(outer)).fields.items()}
        numbers = plugins.load(QUANTIZERS, self.source.encoding.method).dequantize(fields)
        box = tuple(slice(start - low, stop - low) for (start, stop), (low, _) in zip(self.spans, outer, strict=True))
        np.copyto(out, np.ascontiguousarray(numbers[box], np.float32).view(words(self.dtype)))


def dequantized(tensor: LazyTensor) -> LazyTensor:
    if not isinstance(tensor, Encoded):
        return tensor
    return Dequantized(tensor, tuple((0, size) for size in tensor.shape))


def all_dequantized(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {name: dequantized(tensor) for name, tensor in tensors.items()}
