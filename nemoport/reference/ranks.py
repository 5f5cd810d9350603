"""A sharded model run by simulating every rank in one process.

Each rank computes with its own tensors only and has its own copy of the activations, as on its own GPU; what ranks
exchange is written out: `all_reduce` after attention and feed-forward, gathers around the vocabulary, and the hand-over
from stage to stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemoport.reference.decoder import enter, project
from nemoport.reference.experts import feed
from nemoport.reference.layers import capped, mix
from nemoport.reference.steps import Cache, Memory, Places
from nemoport.reference.weights import Weights
from nemoport.spec import Block, ModelSpec, Plan


@dataclass(frozen=True)
class RankedDecoder:
    """`hidden` is that of every rank of the last stage, stacked: [tp, batch, length, hidden]."""

    spec: ModelSpec
    plan: Plan
    embedding_axis: int | None
    ranks: tuple[Weights, ...]

    @property
    def device(self) -> torch.device:
        return self.ranks[0].device

    def hidden(self, tokens: Tensor, places: Places, cache: Cache | None) -> Tensor:
        ranks = self._stage(0)
        x = [enter(self.spec, rank, part, places) for rank, part in zip(ranks, self._embed(tokens), strict=True)]
        for stage in range(self.plan.pp):
            for layer, blocks in enumerate(zip(*self._local(stage), strict=True)):
                x = self._block(blocks, stage, layer, x, places, cache)
        return torch.stack(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """The ranks of the last stage each have a run of the vocabulary's rows; the padding comes last and goes."""
        name = "embed" if self.spec.language_model.tied else "head"
        ranks = self._stage(self.plan.pp - 1)
        normed = [rank.norm("norm", self.spec.norm, x) for rank, x in zip(ranks, hidden, strict=True)]
        parts = [project(rank, name, x) for rank, x in zip(ranks, normed, strict=True)]
        return capped(torch.cat(parts, dim=-1)[..., : self.spec.vocab_size], self.spec.language_model.softcap)

    def _embed(self, tokens: Tensor) -> list[Tensor]:
        ranks = self._stage(0)
        match self.embedding_axis:
            case None:
                return [rank.gather("embed.weight", tokens) for rank in ranks]
            case 0:
                return all_reduce([_embed_rows(rank, position, tokens) for position, rank in enumerate(ranks)])
            case _:
                return [torch.cat([rank.gather("embed.weight", tokens) for rank in ranks], dim=-1)] * len(ranks)

    def _block(
        self, blocks: Sequence[Block], stage: int, layer: int, x: list[Tensor], places: Places, cache: Cache | None
    ) -> list[Tensor]:
        """`blocks`: what each rank of the stage has of the layer."""
        ranks, norm, name = self._stage(stage), self.spec.norm, f"layers.{layer}"
        if blocks[0].mixer:
            parts = []
            for position, (rank, block) in enumerate(zip(ranks, blocks, strict=True)):
                assert block.mixer
                memory = Memory(cache, (stage, position, layer))
                normed = rank.norm(f"{name}.attn_norm", norm, x[position])
                parts.append(mix(block.mixer, norm, rank, f"{name}.attn", normed, places, memory))
            x = add(x, self._post_norm(blocks[0], ranks, f"{name}.attn_post_norm", all_reduce(parts)))
        if blocks[0].ffn:
            parts = []
            for position, (rank, block) in enumerate(zip(ranks, blocks, strict=True)):
                assert block.ffn
                normed = rank.norm(f"{name}.ffn_norm", norm, x[position])
                parts.append(feed(block.ffn, rank, f"{name}.ffn", normed))
            x = add(x, self._post_norm(blocks[0], ranks, f"{name}.ffn_post_norm", all_reduce(parts)))
        return x

    def _post_norm(self, block: Block, ranks: Sequence[Weights], name: str, x: list[Tensor]) -> list[Tensor]:
        if not block.post_norms:
            return x
        return [rank.norm(name, self.spec.norm, part) for rank, part in zip(ranks, x, strict=True)]

    def _stage(self, stage: int) -> tuple[Weights, ...]:
        return self.ranks[stage * self.plan.tp : (stage + 1) * self.plan.tp]

    def _local(self, stage: int) -> list[tuple[Block, ...]]:
        """The layers of a stage as each of its ranks sees them; ranks have other experts, and else other weights."""
        first = stage * self.plan.tp
        return [self.spec.shard(self.plan, rank).blocks for rank in range(first, first + self.plan.tp)]


def all_reduce(parts: Sequence[Tensor]) -> list[Tensor]:
    """Every rank gets the sum of all."""
    return [torch.stack(list(parts)).sum(0)] * len(parts)


def add(x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(x, y, strict=True)]


def _embed_rows(rank: Weights, position: int, tokens: Tensor) -> Tensor:
    """The embeddings of the tokens whose rows this rank has, zero for the others."""
    rows = rank.lazy["embed.weight"].shape[0]
    local = tokens - position * rows
    here = (local >= 0) & (local < rows)
    return rank.gather("embed.weight", local.where(here, 0)) * here[..., None]
