"""A decoder graph of ONNX as an executor: it keeps its state in whatever tensors its signature names.

    inputs     input_ids, position_ids [batch, sequence]    attention_mask [batch, total]    past_NAME.PART ...
    outputs    logits [batch, sequence, vocab]                                               present.PART ...

An input of the state whose shape has an axis `past` grows along it, and begins empty; another is replaced whole, and
begins as zeros. Rows end at the same column: a shorter one has unseen positions before it. The state stays where the
graph runs, bound from one step to the next; it comes to the host when rows come or go.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from nemoport.runner.execution_providers import CUDA

Array = NDArray[Any]

_BATCH, _PAST = "batch", "past"
_TOKENS = ("input_ids", "attention_mask", "position_ids")
_LOGITS = "logits"
MAX_POSITIONS = "max_positions"
"""The key in the graph's metadata under which the length of its context is written."""
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}


@dataclass(frozen=True)
class Kept:
    """One tensor of the state: what it is called going in and coming out, its shape, and the axis that grows."""

    past: str
    present: str
    shape: tuple[int, ...]
    """1 for the batch, 0 for what has passed."""
    axis: int | None
    dtype: np.dtype[Any]

    @property
    def position_bytes(self) -> int:
        """Of one row; what does not grow takes none."""
        if self.axis is None:
            return 0
        return math.prod(self.shape[: self.axis] + self.shape[self.axis + 1 :]) * self.dtype.itemsize


@dataclass(frozen=True)
class Rows:
    """The state of some sequences: onnxruntime's values in the order of the signature, and how many positions each row
    has."""

    tensors: tuple[Any, ...]
    seen: tuple[int, ...]

    @property
    def width(self) -> int:
        return max(self.seen)


def is_decoder(session: Any) -> bool:
    """Whether text can be generated with this graph."""
    outputs = [node.name for node in session.get_outputs()]
    pasts = [node for node in session.get_inputs() if node.name not in _TOKENS]
    return (
        set(_TOKENS) <= {node.name for node in session.get_inputs()}
        and outputs.count(_LOGITS) == 1
        and {_present(node.name) for node in pasts} == set(outputs) - {_LOGITS}
        and all(node.type in _DTYPES for node in pasts)
        and all(isinstance(dim, int) or dim in (_BATCH, _PAST) for node in pasts for dim in node.shape)
        and MAX_POSITIONS in session.get_modelmeta().custom_metadata_map
    )


class GraphExecutor:
    def __init__(self, session: Any, run_options: Any = None) -> None:
        self._session, self._run_options, self._device = session, run_options, _device(session)
        self._kept = [_kept(node) for node in session.get_inputs() if node.name not in _TOKENS]
        self.max_positions = int(session.get_modelmeta().custom_metadata_map[MAX_POSITIONS])
        self.vocab_size = int(next(node.shape[-1] for node in session.get_outputs() if node.name == _LOGITS))
        self.position_bytes = sum(kept.position_bytes for kept in self._kept)

    def prefill(self, tokens: Sequence[int], state: Rows | None) -> tuple[NDArray[np.float32], Rows]:
        before = state or Rows(tuple(self._placed(np.zeros(kept.shape, kept.dtype)) for kept in self._kept), (0,))
        logits, after = self._run(np.array([tokens], np.int64), before)
        return logits[0], after

    def step(self, tokens: Sequence[int], state: Rows) -> tuple[NDArray[np.float32], Rows]:
        return self._run(np.array(tokens, np.int64)[:, np.newaxis], state)

    def joined(self, states: Sequence[Rows]) -> Rows:
        width = max(state.width for state in states)
        tensors = [
            np.concatenate([_widened(state.tensors[at].numpy(), kept.axis, width) for state in states])
            for at, kept in enumerate(self._kept)
        ]
        return Rows(tuple(map(self._placed, tensors)), tuple(seen for state in states for seen in state.seen))

    def kept(self, state: Rows, rows: Sequence[int]) -> Rows:
        seen = tuple(state.seen[row] for row in rows)
        tensors = [
            np.ascontiguousarray(_narrowed(tensor.numpy(), kept.axis, max(seen))[list(rows)])
            for tensor, kept in zip(state.tensors, self._kept, strict=True)
        ]
        return Rows(tuple(map(self._placed, tensors)), seen)

    def _placed(self, array: Array) -> Any:
        return ort.OrtValue.ortvalue_from_numpy(array, *self._device)

    def _run(self, tokens: Array, before: Rows) -> tuple[NDArray[np.float32], Rows]:
        """Logits [rows, vocabulary] after the last of the tokens [rows, length], and the state with them."""
        length, seen = tokens.shape[1], np.array(before.seen)[:, np.newaxis]
        unseen = before.width - seen
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("position_ids", seen + np.arange(length))
        binding.bind_cpu_input("attention_mask", (np.arange(before.width + length) >= unseen).astype(np.int64))
        binding.bind_output(_LOGITS, "cpu")
        for kept, tensor in zip(self._kept, before.tensors, strict=True):
            binding.bind_ortvalue_input(kept.past, tensor)
            binding.bind_output(kept.present, *self._device)
        self._session.run_with_iobinding(binding, self._run_options)
        logits, *tensors = binding.get_outputs()
        return logits.numpy()[:, -1].astype(np.float32, copy=False), Rows(
            tuple(tensors), tuple(count + length for count in before.seen)
        )


def _device(session: Any) -> tuple[str, int]:
    """Where its kernels run; TensorRT is given beside CUDA."""
    options = session.get_provider_options()
    return ("cuda", int(options[CUDA]["device_id"])) if CUDA in options else ("cpu", 0)


def _kept(node: Any) -> Kept:
    sizes = {_BATCH: 1, _PAST: 0}
    return Kept(
        past=node.name,
        present=_present(node.name),
        shape=tuple(sizes[dim] if isinstance(dim, str) else dim for dim in node.shape),
        axis=node.shape.index(_PAST) if _PAST in node.shape else None,
        dtype=_DTYPES[node.type],
    )


def _present(past: str) -> str:
    return f"present.{past.partition('.')[2]}"


def _widened(tensor: Array, axis: int | None, width: int) -> Array:
    """With unseen positions before the others."""
    if axis is None or tensor.shape[axis] == width:
        return tensor
    before = [(0, 0)] * tensor.ndim
    before[axis] = (width - tensor.shape[axis], 0)
    return np.pad(tensor, before)


def _narrowed(tensor: Array, axis: int | None, width: int) -> Array:
    """The last positions only."""
    if axis is None:
        return tensor
    return tensor[(slice(None),) * axis + (slice(tensor.shape[axis] - width, None),)]
