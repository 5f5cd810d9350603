"""Mixture of experts as a function of its input: whom the router chooses, and what the chosen ones add."""

from __future__ import annotations

import torch
from torch import Tensor

from nemoport.reference.layers import feed_forward
from nemoport.reference.weights import Weights
from nemoport.spec import Dense, FeedForward, Groups, Mixture, Router


def feed(ffn: FeedForward, weights: Weights, name: str, x: Tensor) -> Tensor:
    """x [batch, length, hidden] to the same shape, dense or of experts. Of a rank's share, that rank's summand."""
    return feed_forward(ffn, weights, name, x) if isinstance(ffn, Dense) else mixture(ffn, weights, name, x)


def mixture(mixed: Mixture, weights: Weights, name: str, x: Tensor) -> Tensor:
    """Each expert at hand is read if some token chose it, and sees those tokens only."""
    chosen, shares = route(mixed.router, weights, f"{name}.router", x)
    tokens = x.flatten(0, 1)
    out = torch.zeros_like(tokens)
    for expert in mixed.local:
        rows, places = (chosen == expert).nonzero(as_tuple=True)
        if rows.numel():
            made = feed_forward(mixed.expert, weights, f"{name}.experts.{expert}", tokens[rows])
            out.index_add_(0, rows, made * shares[rows, places, None].to(x.dtype))
    out = out.view_as(x)
    if mixed.shared:
        always = feed_forward(mixed.shared, weights, f"{name}.shared", x)
        if mixed.shared_gate:
            always = always * torch.sigmoid(weights.linear(f"{name}.shared_gate", x))
        out = out + always
    return out


def route(router: Router, weights: Weights, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen experts of x [batch, length, hidden] and what each counts for, [batch * length, top_k]; float32 or
    wider."""
    logits = weights.linear(name, x).flatten(0, 1)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.sigmoid() if router.score == "sigmoid" else wide.softmax(-1)
    merits = scores + weights.read(f"{name}.expert_bias").to(wide.dtype) if router.expert_bias else scores
    if router.groups:
        merits = merits.masked_fill(~eligible(router.groups, merits), -torch.inf)
    chosen = merits.topk(router.top_k, dim=-1).indices
    shares = scores.gather(-1, chosen)
    if router.normalized:
        shares = shares / shares.sum(-1, keepdim=True)
    return chosen, shares * router.scale


def eligible(groups: Groups, merits: Tensor) -> Tensor:
    """Whether each of merits [count, experts] stands in one of the best groups."""
    grouped = merits.view(len(merits), groups.count, -1)
    best = grouped.topk(groups.best, dim=-1).values.sum(-1).topk(groups.top, dim=-1).indices
    mine = torch.zeros_like(grouped, dtype=torch.bool)
    rows = torch.arange(len(merits), device=merits.device)[:, None]
    mine[rows, best] = True
    return mine.flatten(1)
