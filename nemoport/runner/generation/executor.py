"""What the engine asks of a decoder: logits and a state from tokens, and states put together and taken apart.

A state is a value that the executor makes and the engine only passes on. What is in it (keys and values, latents,
convolutions) and how it lies in memory is the executor's affair.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

StateT = TypeVar("StateT")


class Executor(Protocol, Generic[StateT]):
    """Called from one thread at a time."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence that the model knows."""

    @property
    def position_bytes(self) -> int:
        """What one position of one sequence takes in a state."""

    def prefill(self, tokens: Sequence[int], state: StateT | None) -> tuple[NDArray[np.float32], StateT]:
        """One sequence, from its beginning or continued: logits [vocabulary] after the last token, and its state."""

    def step(self, tokens: Sequence[int], state: StateT) -> tuple[NDArray[np.float32], StateT]:
        """One more token for each row of the state: logits [rows, vocabulary]."""

    def joined(self, states: Sequence[StateT]) -> StateT:
        """The rows of all, in this order."""

    def kept(self, state: StateT, rows: Sequence[int]) -> StateT:
        """These rows only, in this order; at least one."""
