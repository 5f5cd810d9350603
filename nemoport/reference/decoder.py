"""The meaning of a `ModelSpec`: a plain decoder, written from the papers, that reads one matrix at a time.

x = embed[tokens] + positions;  x += mixer(attn_norm(x));  x += ffn(ffn_norm(x)) ...;  logits = norm(x) @ head
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nemoport.errors import UsageError
from nemoport.reference.experts import feed
from nemoport.reference.layers import capped, mix
from nemoport.reference.steps import Cache, Memory, Places
from nemoport.reference.weights import Weights
from nemoport.spec import Block, ModelSpec, Norm

HEAD_ROWS = 16384
"""Rows of the output matrix in memory at once: a vocabulary is often the largest tensor of a model."""


class Runs(Protocol):
    """A model that answers tokens, whole or in ranks. `tokens` are int64 [batch, length]."""

    @property
    def device(self) -> torch.device: ...

    def hidden(self, tokens: Tensor, places: Places, cache: Cache | None) -> Tensor:
        """[..., batch, length, hidden] before the last norm; ranks lead, where there are several. With a cache,
        `tokens` continue those of the steps before, whose state it holds."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 [batch, ..., vocab_size] of any of the places in `hidden`."""
        ...


@dataclass(frozen=True)
class Decoder:
    spec: ModelSpec
    weights: Weights

    @property
    def device(self) -> torch.device:
        return self.weights.device

    def hidden(self, tokens: Tensor, places: Places, cache: Cache | None) -> Tensor:
        x = enter(self.spec, self.weights, self.weights.gather("embed.weight", tokens), places)
        for layer, block in enumerate(self.spec.blocks):
            x = run_block(block, self.spec.norm, self.weights, f"layers.{layer}", x, places, Memory(cache, layer))
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        x = leave(self.spec, self.weights, hidden)
        answer = project(self.weights, "embed" if self.spec.language_model.tied else "head", x)[
            ..., : self.spec.vocab_size
        ]
        return capped(answer, self.spec.language_model.softcap)


def enter(spec: ModelSpec, weights: Weights, embedded: Tensor, places: Places) -> Tensor:
    """What the first block sees of embeddings [batch, length, hidden]."""
    x = embedded
    if spec.embedding_scale is not None:
        x = x * torch.tensor(spec.embedding_scale, dtype=x.dtype)  # rounded to it, as where the model was trained
    if spec.learned_positions:
        if (last := int(places.queries.max())) >= spec.longest:
            raise UsageError(f"position {last} is outside of the table of {spec.longest} learned positions")
        x = x + weights.gather("positions.weight", places.queries + spec.first_position)
    return weights.norm("embed_norm", spec.norm, x) if spec.embedding_norm else x


def leave(spec: ModelSpec, weights: Weights, x: Tensor) -> Tensor:
    """What the head sees of the last block's."""
    return weights.norm("norm", spec.norm, x) if spec.final_norm else x


def run_block(
    block: Block, norm: Norm, weights: Weights, name: str, x: Tensor, places: Places, memory: Memory
) -> Tensor:
    """One layer, x [batch, length, hidden] to the same shape."""
    if block.mixer:
        seen = x if block.norm_after else weights.norm(f"{name}.attn_norm", norm, x)
        mixed = mix(block.mixer, norm, weights, f"{name}.attn", seen, places, memory)
        x = x + (weights.norm(f"{name}.attn_post_norm", norm, mixed) if block.post_norms else mixed)
        x = weights.norm(f"{name}.attn_norm", norm, x) if block.norm_after else x
    if block.ffn:
        seen = x if block.norm_after else weights.norm(f"{name}.ffn_norm", norm, x)
        fed = feed(block.ffn, weights, f"{name}.ffn", seen)
        x = x + (weights.norm(f"{name}.ffn_post_norm", norm, fed) if block.post_norms else fed)
        x = weights.norm(f"{name}.ffn_norm", norm, x) if block.norm_after else x
    return x


def project(weights: Weights, name: str, x: Tensor) -> Tensor:
    """x @ the output matrix `name`, a run of its rows at a time; float32."""
    weights.observe("head", x)
    rows = weights.lazy[f"{name}.weight"].shape[0]
    out = torch.empty((*x.shape[:-1], rows), dtype=torch.float32, device=x.device)
    for start in range(0, rows, HEAD_ROWS):
        stop = min(start + HEAD_ROWS, rows)
        out[..., start:stop] = F.linear(x, weights.rows(f"{name}.weight", start, stop))
    return out
