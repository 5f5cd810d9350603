"""Mamba-2 (arXiv:2405.21060) as its recurrence states it, one position after another.

Of each token x a gate z, inputs u, an entry B, an exit C and a step size dt are projected; u, B and C pass through a
short causal convolution and SiLU. A head keeps a matrix S [head_dim, state_dims]:

    S = exp(-exp(a) dt) S + dt u B^T        y = S C + d u        answer = out(rms_by_group(y * silu(z)))

Padding leaves the state alone: rows are turned so that their real tokens stand last, and its steps are nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemoport.reference.steps import Memory, Places
from nemoport.reference.weights import Weights
from nemoport.spec import Mamba

_CONVOLVED = ("x", "b", "c")


def mamba(mixer: Mamba, weights: Weights, name: str, x: Tensor, places: Places, memory: Memory) -> Tensor:
    """x [batch, length, hidden] to the same shape. State: the last `kernel - 1` inputs of the convolution [batch,
    channels, kernel - 1], and S of every head [batch, heads, head_dim, state_dims], float32 or wider."""
    real = places.real
    order = torch.argsort(real.to(torch.int8), dim=1, stable=True)
    turned = _gathered(x, order)
    z, u, b, c, dt = (weights.linear(f"{name}.{part}", turned) for part in ("z", "x", "b", "c", "dt"))
    at_work, new = real.gather(1, order), torch.cat([u, b, c], -1)
    before, state = memory.past() or _empty(mixer, new)
    convolved, before = _convolve(mixer, weights, name, new, at_work, before)
    u, b, c = torch.split(convolved.to(state.dtype), [u.shape[-1], b.shape[-1], c.shape[-1]], -1)
    step = F.softplus(dt.to(state.dtype) + weights.read(f"{name}.dt_bias").to(state.dtype)) * at_work[..., None]
    mixed, state = _scan(mixer, weights, name, u, b, c, step, state)
    memory.keep(before, state)
    gated = _grouped_norm(mixer, weights, name, mixed * F.silu(z.to(state.dtype)))
    answer = weights.linear(f"{name}.out", gated.to(x.dtype))
    return _gathered(answer, torch.argsort(order, dim=1))


def _empty(mixer: Mamba, example: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, channels = example.shape
    wide = torch.promote_types(example.dtype, torch.float32)
    return (
        example.new_zeros(batch, channels, mixer.kernel - 1),
        example.new_zeros(batch, mixer.heads, mixer.head_dim, mixer.state_dims, dtype=wide),
    )


def _convolve(
    mixer: Mamba, weights: Weights, name: str, new: Tensor, real: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """SiLU of the convolution of each channel, and the inputs that the next step needs. Those of the steps before go
    between padding and the real tokens of this one."""
    length = new.shape[1]
    joined = torch.cat([before.transpose(1, 2), new], 1)
    known = torch.cat([real.new_ones(len(real), before.shape[2]), real], 1)
    joined = _gathered(joined, torch.argsort(known.to(torch.int8), dim=1, stable=True)).transpose(1, 2)
    kernels = torch.cat([weights.read(f"{name}.conv_{part}.weight") for part in _CONVOLVED])
    bias = torch.cat([weights.read(f"{name}.conv_{part}.bias") for part in _CONVOLVED]) if mixer.conv_bias else None
    convolved = F.conv1d(joined, kernels, bias, groups=len(kernels))[..., -length:]
    return F.silu(convolved).transpose(1, 2), joined[..., joined.shape[-1] - before.shape[2] :]


def _scan(
    mixer: Mamba, weights: Weights, name: str, u: Tensor, b: Tensor, c: Tensor, step: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """[batch, length, heads * head_dim], and the state after the last position."""
    u = u.view(*u.shape[:2], mixer.heads, mixer.head_dim)
    entry, leave = (
        each.view(*u.shape[:2], mixer.groups, mixer.state_dims).repeat_interleave(mixer.heads // mixer.groups, 2)
        for each in (b, c)
    )
    decay = torch.exp(-torch.exp(weights.read(f"{name}.a_log").to(state.dtype)) * step)
    answers = []
    for at in range(u.shape[1]):
        entering = (step[:, at, :, None] * u[:, at])[..., None] * entry[:, at, :, None, :]
        state = decay[:, at, :, None, None] * state + entering
        answers.append((state * leave[:, at, :, None, :]).sum(-1))
    skipped = weights.read(f"{name}.d").to(state.dtype)[:, None] * u
    return (torch.stack(answers, 1) + skipped).flatten(2), state


def _grouped_norm(mixer: Mamba, weights: Weights, name: str, x: Tensor) -> Tensor:
    """RMSNorm over the channels of each group."""
    groups = x.view(*x.shape[:2], mixer.groups, -1)
    normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + mixer.norm_eps)
    return normed.flatten(-2) * weights.read(f"{name}.norm.weight").to(x.dtype)


def _gathered(x: Tensor, order: Tensor) -> Tensor:
    """x [batch, length, channels] with its positions in the order [batch, length]."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))
