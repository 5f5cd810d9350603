"""The two halves of a block as functions of their input, whole or as one rank's share of them.

Given the local sizes and weights of a rank they return that rank's summand of the output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from nemoport.reference.mamba import mamba
from nemoport.reference.rope import rotate
from nemoport.reference.steps import Memory, Places
from nemoport.reference.weights import Weights
from nemoport.spec import Activation, Attention, Dense, LatentAttention, Mamba, Mixer, Norm

ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
}


def mix(mixer: Mixer, norm: Norm, weights: Weights, name: str, x: Tensor, places: Places, memory: Memory) -> Tensor:
    """x [batch, length, hidden] to the same shape. `norm` is the model's."""
    match mixer:
        case Attention():
            return attention(mixer, norm, weights, name, x, places, memory)
        case LatentAttention():
            return latent_attention(mixer, weights, name, x, places, memory)
        case Mamba():
            return mamba(mixer, weights, name, x, places, memory)


def attention(
    mixer: Attention, norm: Norm, weights: Weights, name: str, x: Tensor, places: Places, memory: Memory
) -> Tensor:
    """The norms of q and k have the model's eps and centre."""
    q, k, v = (_heads(weights.linear(f"{name}.{part}", x), mixer.head_dim) for part in "qkv")
    if mixer.qk_norm:
        over_head = Norm(kind="rms", eps=norm.eps, zero_centered=norm.zero_centered)
        q, k = weights.norm(f"{name}.q_norm", over_head, q), weights.norm(f"{name}.k_norm", over_head, k)
    if mixer.rope:
        q, k = rotate(q, places.queries, mixer.rope), rotate(k, places.queries, mixer.rope)
    weights.observe(f"{name}.keys", k)
    weights.observe(f"{name}.values", v)
    k, v = memory.extend(k, v)
    sinks = weights.read(f"{name}.sinks") if mixer.sinks else None
    mixed = attend(q, k, v, places.visible(mixer.window, mixer.causal), mixer.scale, mixer.softcap, sinks)
    return weights.linear(f"{name}.o", mixed.transpose(1, 2).flatten(2))


def latent_attention(
    mixer: LatentAttention, weights: Weights, name: str, x: Tensor, places: Places, memory: Memory
) -> Tensor:
    """As the paper states it: keys and values of every head are made anew of the latents of all positions."""
    over_latent, rotated = Norm(kind="rms", eps=mixer.norm_eps), mixer.rope.dims
    if mixer.q_rank is None:
        q = weights.linear(f"{name}.q", x)
    else:
        of_queries = weights.norm(f"{name}.q_norm", over_latent, weights.linear(f"{name}.q_down", x))
        q = weights.linear(f"{name}.q_up", of_queries)
    q = _heads(q, mixer.q_dims)
    q = torch.cat([q[..., :-rotated], rotate(q[..., -rotated:], places.queries, mixer.rope)], dim=-1)
    latent = weights.norm(f"{name}.kv_norm", over_latent, weights.linear(f"{name}.kv_down", x))
    key = rotate(_heads(weights.linear(f"{name}.k_rope", x), rotated), places.queries, mixer.rope)
    (state,) = memory.extend(torch.cat([latent[:, None], key], dim=-1))
    latent, key = state[:, 0, :, :-rotated], state[..., -rotated:]
    k = _heads(weights.linear(f"{name}.k_up", latent), mixer.nope_dims)
    v = _heads(weights.linear(f"{name}.v_up", latent), mixer.v_dims)
    k = torch.cat([k, key.expand(-1, mixer.heads, -1, -1)], dim=-1)
    mixed = attend(q, k, v, places.visible(mixer.window), mixer.scale)
    return weights.linear(f"{name}.o", mixed.transpose(1, 2).flatten(2))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(q k scale) v for q [batch, heads, length, head_dim] and k, v [batch, kv_heads, positions, ...];
    query head i looks at KV head i // (heads / kv_heads). `scale` None is 1 / sqrt(head_dim). `sinks` [heads]: one more
    score for every query, whose value is nothing.

    In 16 bits a kernel computes it that never rounds the scores, as those that serve do; it has no softcap or sink."""
    if q.dtype.itemsize == 2 and softcap is None and sinks is None:
        return _fused(q, k, v, visible, scale)
    kv_heads, head_dim = k.shape[1], q.shape[-1]
    q = q.reshape(len(q), kv_heads, -1, *q.shape[2:])  # [batch, kv_heads, heads / kv_heads, length, head_dim]
    scores = q @ k[:, :, None].transpose(-1, -2) * (scale or 1 / math.sqrt(head_dim))
    scores = capped(scores, softcap)
    # The lowest number rather than -inf: a row of nothing but padding stays finite.
    scores = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if sinks is not None:
        wide = torch.cat([wide, sinks.to(wide.dtype).view(kv_heads, -1, 1, 1).expand(*wide.shape[:-1], 1)], dim=-1)
    shares = wide.softmax(-1)[..., : k.shape[2]].to(v.dtype)
    return (shares @ v[:, :, None]).flatten(1, 2)


def _fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None) -> Tensor:
    """As transformers has torch compute it: which kernel that is depends on how the mask is said."""
    causal = torch.equal(visible, torch.ones_like(visible).tril())
    mask = None if causal or bool(visible.all()) else visible[:, None]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )


def feed_forward(ffn: Dense, weights: Weights, name: str, x: Tensor) -> Tensor:
    """x [..., hidden] to the same shape."""
    act = ACTIVATIONS[ffn.activation]
    if ffn.gated:
        gate, up = weights.linear(f"{name}.gate", x), weights.linear(f"{name}.up", x)
        if ffn.limit is not None:
            gate, up = gate.clamp(max=ffn.limit), up.clamp(-ffn.limit, ffn.limit)
        inner = act(gate) * (up + ffn.up_offset)
    else:
        inner = act(weights.linear(f"{name}.up", x))
    return weights.linear(f"{name}.down", inner)


def capped(x: Tensor, softcap: float | None) -> Tensor:
    """Within (-softcap, softcap), and hardly changed near 0 (arXiv:2408.00118, section 2)."""
    return x if softcap is None else torch.tanh(x / softcap) * softcap


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[batch, length, heads * head_dim] to [batch, heads, length, head_dim]."""
    return x.view(*x.shape[:-1], -1, head_dim).transpose(1, 2)
