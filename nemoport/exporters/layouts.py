"""Layouts: how canonical tensors lie inside one stored tensor. Each is a pair of inverses, `split` and `join`.

Reading uses `split`; writing, and tests that make checkpoints, use `join`. Both work on lazy tensors, so they say where
rows go and read none. The parts' specs give what a layout needs to know: sizes, and units that stay whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemoport.exporters.derived import interleave, shift, strided, transpose
from nemoport.exporters.tensor import LazyTensor, concat, cut, stack, unstacked
from nemoport.spec import TensorSpec

Split = Callable[[LazyTensor, Sequence[TensorSpec]], tuple[LazyTensor, ...]]
Join = Callable[[Sequence[LazyTensor], Sequence[TensorSpec]], LazyTensor]


@dataclass(frozen=True)
class Layout:
    name: str
    split: Split
    join: Join
    padded: bool = False
    """The stored tensor may have more rows than the parts: training pads vocabularies."""
    whole_rows: bool = True
    """It moves rows and changes none, so what belongs to each row (a scale) can go with it."""


def _rows(tensor: LazyTensor, sizes: Sequence[int]) -> tuple[LazyTensor, ...]:
    """Consecutive bands of rows."""
    bands, start = [], 0
    for size in sizes:
        bands.append(cut(tensor, 0, start, start + size))
        start += size
    return tuple(bands)


def _split_groups(stored: LazyTensor, parts: Sequence[TensorSpec]) -> tuple[LazyTensor, ...]:
    groups = parts[-1].axes[0].units
    bands = _rows(stored, [part.shape[0] // groups for part in parts] * groups)
    return tuple(concat(bands[i :: len(parts)], 0) for i in range(len(parts)))


def _join_groups(tensors: Sequence[LazyTensor], parts: Sequence[TensorSpec]) -> LazyTensor:
    groups = parts[-1].axes[0].units
    bands = [_rows(tensor, [tensor.shape[0] // groups] * groups) for tensor in tensors]
    return concat([bands[i][group] for group in range(groups) for i in range(len(tensors))], 0)


def _of_experts(name: str, each: int, split: Split, join: Join) -> Layout:
    """A stack of what each expert has: `each` parts of one expert, then those of the next."""

    def split_stack(stored: LazyTensor, parts: Sequence[TensorSpec]) -> tuple[LazyTensor, ...]:
        found = [split(one, parts[expert * each : (expert + 1) * each]) for expert, one in enumerate(unstacked(stored))]
        return tuple(tensor for tensors in found for tensor in tensors)

    def join_stack(tensors: Sequence[LazyTensor], parts: Sequence[TensorSpec]) -> LazyTensor:
        starts = range(0, len(parts), each)
        return stack([join(tensors[start : start + each], parts[start : start + each]) for start in starts])

    return Layout(name, split_stack, join_stack, whole_rows=False)


def _split_turns(stored: LazyTensor, parts: Sequence[TensorSpec]) -> tuple[LazyTensor, ...]:
    return tuple(strided(stored, start, len(parts)) for start in range(len(parts)))


WHOLE = Layout("whole", lambda stored, _: (stored,), lambda tensors, _: tensors[0])

PADDED = Layout("padded rows", lambda stored, parts: (cut(stored, 0, 0, parts[0].shape[0]),), WHOLE.join, padded=True)
"""[v v v 0 0]: rows beyond the true vocabulary are not part of the model."""

STACKED = Layout(
    "stacked rows",
    lambda stored, parts: _rows(stored, [part.shape[0] for part in parts]),
    lambda tensors, _: concat(tensors, 0),
)
"""[gate; up] or [q; k; v]."""

QUERY_GROUPS = Layout("query groups", _split_groups, _join_groups)
"""[q q k v | q q k v]: for each KV head its queries, its key, its value, as Megatron fuses them."""

TRANSPOSED = Layout(
    "transposed",
    lambda stored, parts: _rows(transpose(stored), [part.shape[0] for part in parts]),
    lambda tensors, _: transpose(concat(tensors, 0)),
    whole_rows=False,
)
"""[in, out], as GPT-2's Conv1D has it; of several parts [q k v] side by side."""

PLUS_ONE = Layout(
    "plus one",
    lambda stored, _: (shift(stored, -1.0),),
    lambda tensors, _: shift(tensors[0], 1.0),
    whole_rows=False,
)
"""1 + w of a zero-centred norm whose canonical tensor holds w."""

EXPERTS = _of_experts("a stack of experts", 1, WHOLE.split, WHOLE.join)
"""[expert, ...], the down-projections for example."""

EXPERTS_STACKED = _of_experts("a stack of experts, rows stacked", 2, STACKED.split, STACKED.join)
"""[expert, gate; up, ...]."""

EXPERTS_TRANSPOSED = _of_experts("a stack of experts, transposed", 1, TRANSPOSED.split, TRANSPOSED.join)
"""[expert, in, out]."""

EXPERTS_IN_TURNS = _of_experts(
    "a stack of experts, rows in turns", 2, _split_turns, lambda tensors, _: interleave(tensors)
)
"""[expert, gate up gate up ...], as GPT-OSS has its biases."""

EXPERTS_IN_TURNS_TRANSPOSED = _of_experts(
    "a stack of experts, columns in turns, transposed",
    2,
    lambda stored, parts: _split_turns(transpose(stored), parts),
    lambda tensors, _: transpose(interleave(tensors)),
)
"""[expert, in, gate up gate up ...]."""
