"""Runs of a model: logits of given tokens at once, and greedy continuation step by step."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemoport.errors import UsageError
from nemoport.reference.decoder import Runs
from nemoport.reference.steps import Cache, places


@torch.inference_mode()
def logits(model: Runs, vocab_size: int, tokens: NDArray[Any], mask: NDArray[Any] | None) -> NDArray[np.float32]:
    ids, real = prompt(model.device, vocab_size, tokens, mask)
    answer: NDArray[np.float32] = model.logits(model.hidden(ids, places(real), None)).cpu().numpy()
    return answer


@torch.inference_mode()
def greedy(
    model: Runs,
    vocab_size: int,
    tokens: NDArray[Any],
    mask: NDArray[Any] | None,
    max_tokens: int,
    stop: Collection[int],
) -> NDArray[np.int64]:
    ids, real = prompt(model.device, vocab_size, tokens, mask)
    if max_tokens < 1:
        raise UsageError(f"max_tokens is {max_tokens}; generation makes at least one token")
    cache, where = Cache(), places(real)
    rows = torch.arange(len(ids), device=model.device)
    last = (real * torch.arange(real.shape[1], device=model.device)).argmax(1)
    stops = torch.tensor(sorted(stop), dtype=torch.int64, device=model.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=model.device)
    chosen: list[Tensor] = []
    while True:
        hidden = model.hidden(ids, where, cache)
        best = model.logits(hidden[..., rows, last, :]).argmax(-1)
        chosen.append(torch.where(ended, chosen[-1], best) if chosen else best)
        ended = ended | torch.isin(chosen[-1], stops)
        if len(chosen) == max_tokens or bool(ended.all()):
            answer: NDArray[np.int64] = torch.stack(chosen, dim=1).cpu().numpy()
            return answer
        ids = chosen[-1][:, None]
        where, last = places(torch.ones_like(ids, dtype=torch.bool), where), torch.zeros_like(last)


@torch.inference_mode()
def sampled(model: Runs, vocab_size: int, rows: int, length: int, seed: int) -> NDArray[np.int64]:
    """The likeliest token after Gumbel's noise is one drawn from the distribution, which needs no softmax."""
    numbers = np.random.default_rng(seed)
    tokens = numbers.integers(0, vocab_size, (rows, 1), dtype=np.int64)
    cache, where = Cache(), None
    while tokens.shape[1] < length:
        ids, real = prompt(model.device, vocab_size, tokens[:, -1:], None)
        where = places(real, where)
        answer = model.logits(model.hidden(ids, where, cache))[:, -1].cpu().numpy()
        chosen = (answer + numbers.gumbel(size=answer.shape)).argmax(-1)
        tokens = np.concatenate([tokens, chosen[:, None]], axis=1)
    return tokens


def prompt(
    device: torch.device, vocab_size: int, tokens: NDArray[Any], mask: NDArray[Any] | None
) -> tuple[Tensor, Tensor]:
    """Tokens and mask as tensors; padding may be any number, and becomes token 0."""
    if tokens.ndim != 2 or not tokens.size:
        raise UsageError(f"tokens have shape {list(tokens.shape)}; the reference takes [batch, length], none empty")
    if mask is not None and mask.shape != tokens.shape:
        raise UsageError(f"the mask has shape {list(mask.shape)}, the tokens {list(tokens.shape)}; they must agree")
    real = np.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    outside = tokens[real & ((tokens < 0) | (tokens >= vocab_size))]
    if outside.size:
        raise UsageError(f"token {outside[0]} is outside of the vocabulary of {vocab_size}")
    ids = torch.from_numpy(np.where(real, tokens, 0).astype(np.int64))
    return ids.to(device), torch.from_numpy(real).to(device)
