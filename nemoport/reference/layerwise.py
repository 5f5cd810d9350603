"""A decoder run layer by layer: every batch goes through one before any goes through the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemoport.exporters.tensor import LazyTensor
from nemoport.reference.decoder import enter, run_block
from nemoport.reference.generate import prompt
from nemoport.reference.steps import Memory, places
from nemoport.reference.weights import Observer, Weights
from nemoport.spec import ModelSpec

ALL = 1 << 62
"""Bytes of one layer that are kept while the batches go through it."""


def run(
    spec: ModelSpec,
    lazy: Mapping[str, LazyTensor],
    batches: Sequence[NDArray[Any]],
    dtype: str,
    device: str,
    observe: Observer,
) -> Iterator[int]:
    ends = Weights(lazy, dtype=dtype, device=device)
    states, where = [], []
    with torch.inference_mode():
        for tokens in batches:
            ids, real = prompt(ends.device, spec.vocab_size, tokens, np.ones(tokens.shape, bool))
            where.append(places(real))
            states.append(enter(spec, ends, ends.gather("embed.weight", ids), where[-1]))
    for layer, block in enumerate(spec.blocks):
        with torch.inference_mode():
            weights = Weights(lazy, dtype=dtype, device=device, keep=ALL, observe=observe)
            for index, at in enumerate(where):
                name = f"layers.{layer}"
                states[index] = run_block(block, spec.norm, weights, name, states[index], at, Memory(None, layer))
        yield layer
