"""Sharding: which axis of each canonical tensor is cut for tensor parallelism, as a table of axis names.

    "divide"   units must divide over tp; each rank takes its share
    "repeat"   as divide; when there are fewer units than ranks, consecutive ranks share one (KV heads)
    "pad"      zero rows are appended until it divides (the vocabulary)

An axis that is not in the table is whole on every rank, and so are the tensors in `whole`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from nemoport.exporters.tensor import LazyTensor, cut, pad
from nemoport.spec import Axis, TensorSpec

How = Literal["divide", "repeat", "pad"]


@dataclass(frozen=True)
class Sharding:
    axes: Mapping[str, How]
    whole: frozenset[str] = field(default_factory=frozenset)


def shard(
    tensor: LazyTensor, spec: TensorSpec, sharding: Sharding, tp: int, position: int
) -> tuple[LazyTensor, TensorSpec]:
    """One rank's share of a canonical tensor, with its local spec. The plan must have been found to divide."""
    if tp == 1 or spec.name in sharding.whole:
        return tensor, spec
    for index, axis in enumerate(spec.axes):
        if how := sharding.axes.get(axis.name):
            padded, share, start = _share(axis, how, tp, position)
            tensor = cut(pad(tensor, index, padded), index, start, start + share.size)
            return tensor, replace(spec, axes=(*spec.axes[:index], share, *spec.axes[index + 1 :]))
    return tensor, spec


def _share(axis: Axis, how: How, tp: int, position: int) -> tuple[int, Axis, int]:
    """The padded size of the whole axis, the rank's share of it, and where the share starts."""
    unit = axis.size // axis.units
    units = -(-axis.units // tp) * tp if how == "pad" else axis.units
    if how == "repeat" and units < tp:
        assert tp % units == 0, (axis, tp)
        return axis.size, Axis(axis.name, unit, 1), position * units // tp * unit
    assert units % tp == 0, (axis, tp)
    share = units // tp
    return units * unit, Axis(axis.name, share * unit, share), position * share * unit
