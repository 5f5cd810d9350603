"""What lets a token see others: the first half of a block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import ClassVar

from nemoport.spec.axes import Axis, Tensors
from nemoport.spec.rope import Rope, YarnScaling


@dataclass(frozen=True)
class State:
    """What a mixer keeps between steps, as [batch, *shape] under a name. None among the sizes stands for the positions
    so far; without it the state is replaced at each step."""

    name: str
    shape: tuple[int | None, ...]
    wide: bool = False
    """In float32, whatever is computed in."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention; query head i uses KV head i // (heads / kv_heads). `window`: a position sees itself
    and the `window - 1` before it. `qk_norm`: RMSNorm over each head of q and k, before rope, with the model's eps and
    centre. `causal` false: a position sees those after it too; it has no window. Scores are q k times `scale` (None:
    head_dim ** -0.5), then `softcap * tanh(scores / softcap)`. `sinks`: a number of each head stands among the scores
    of every query, and takes its share of the softmax away (arXiv:2508.10925)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope | None
    window: int | None = None
    causal: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    scale: float | None = None
    softcap: float | None = None
    sinks: bool = False

    @property
    def state(self) -> tuple[State, ...]:
        shape = (self.kv_heads, None, self.head_dim)
        return State("key", shape), State("value", shape)

    def share(self, tp: int) -> Attention:
        return replace(self, heads=self.heads // tp, kv_heads=max(1, self.kv_heads // tp))

    def tensors(self, hidden: Axis) -> Tensors:
        q = Axis("heads", self.heads * self.head_dim, self.heads)
        kv = Axis("kv_heads", self.kv_heads * self.head_dim, self.kv_heads)
        named: Tensors = {
            "q.weight": (q, hidden),
            "k.weight": (kv, hidden),
            "v.weight": (kv, hidden),
            "o.weight": (hidden, q),
        }
        if self.qkv_bias:
            named |= {"q.bias": (q,), "k.bias": (kv,), "v.bias": (kv,)}
        if self.out_bias:
            named |= {"o.bias": (hidden,)}
        if self.qk_norm:
            head = Axis("head_dim", self.head_dim, self.head_dim)
            named |= {"q_norm.weight": (head,), "k_norm.weight": (head,)}
        if self.sinks:
            named |= {"sinks": (Axis("heads", self.heads, self.heads),)}
        return named


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (arXiv:2405.04434, section 2.1). Of a position one latent is kept for all heads, and
    one rotated key:

        latent   = kv_norm(kv_down x)                   [kv_rank]
        k_rope   = rope(k_rope x)                       [rope.dims]
        query i  = q_i x, or q_up_i q_norm(q_down x)    [nope_dims; rope.dims, which are rotated]
        key i    = [k_up_i latent; k_rope]
        value i  = v_up_i latent                        [v_dims]

    Both norms are RMSNorms with an eps of their own. Scores are divided by the root of a query's size; YaRN multiplies
    them with the square of its temperature(mscale_all_dim)."""

    heads: int
    q_rank: int | None
    """None: queries are made of x itself."""
    kv_rank: int
    nope_dims: int
    """Of a head's query and key, what is not rotated."""
    v_dims: int
    rope: Rope
    norm_eps: float = 1e-6

    kv_heads: ClassVar[int] = 1
    """The latent: every rank has it whole."""
    window: ClassVar[None] = None

    @property
    def q_dims(self) -> int:
        return self.nope_dims + self.rope.dims

    @property
    def scale(self) -> float:
        scaling = self.rope.scaling
        hotter = scaling.temperature(scaling.mscale_all_dim) if isinstance(scaling, YarnScaling) else 1.0
        return hotter * hotter / sqrt(self.q_dims)

    @property
    def state(self) -> tuple[State, ...]:
        """The latent, normed, and after it the rotated key."""
        return (State("latent", (1, None, self.kv_rank + self.rope.dims)),)

    def share(self, tp: int) -> LatentAttention:
        return replace(self, heads=self.heads // tp)

    def tensors(self, hidden: Axis) -> Tensors:
        def of_heads(dims: int) -> Axis:
            return Axis("heads", self.heads * dims, self.heads)

        latent, rope = Axis("kv_latent", self.kv_rank, self.kv_rank), Axis("rope", self.rope.dims, self.rope.dims)
        if self.q_rank is None:
            named: Tensors = {"q.weight": (of_heads(self.q_dims), hidden)}
        else:
            of_queries = Axis("q_latent", self.q_rank, self.q_rank)
            named = {
                "q_down.weight": (of_queries, hidden),
                "q_norm.weight": (of_queries,),
                "q_up.weight": (of_heads(self.q_dims), of_queries),
            }
        return named | {
            "kv_down.weight": (latent, hidden),
            "k_rope.weight": (rope, hidden),
            "kv_norm.weight": (latent,),
            "k_up.weight": (of_heads(self.nope_dims), latent),
            "v_up.weight": (of_heads(self.v_dims), latent),
            "o.weight": (hidden, of_heads(self.v_dims)),
        }


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """Mamba-2 (arXiv:2405.21060). Of a token a gate z and inputs x are made [heads * head_dim], an entry b and an exit
    c [groups * state_dims], and a step dt for each head; x, b and c pass through a causal convolution of `kernel` taps
    a channel, and SiLU. A head i keeps S [head_dim, state_dims], and uses b and c of group i // (heads / groups):

        dt = softplus(dt + dt_bias)     S = exp(-exp(a_log) dt) S + dt x b^T     y = S c + d x
        answer = out(rms(y * silu(z)))    over the channels of each group
    """

    heads: int
    head_dim: int
    groups: int
    state_dims: int
    kernel: int = 4
    conv_bias: bool = True
    bias: bool = False
    norm_eps: float = 1e-5

    kv_heads: ClassVar[int] = 1
    window: ClassVar[None] = None
    rope: ClassVar[None] = None

    @property
    def channels(self) -> int:
        """Of the convolution: x, b and c."""
        return self.heads * self.head_dim + 2 * self.groups * self.state_dims

    @property
    def state(self) -> tuple[State, ...]:
        """What the convolution still needs of the tokens before, and S."""
        return (
            State("conv", (self.channels, self.kernel - 1)),
            State("ssm", (self.heads, self.head_dim, self.state_dims), wide=True),
        )

    def share(self, tp: int) -> Mamba:
        return replace(self, heads=self.heads // tp, groups=self.groups // tp)

    def tensors(self, hidden: Axis) -> Tensors:
        inner = Axis("ssm_heads", self.heads * self.head_dim, self.heads)
        of_group = Axis("ssm_groups", self.groups * self.state_dims, self.groups)
        a_head = Axis("ssm_heads", self.heads, self.heads)
        one, taps = Axis("channel", 1, 1), Axis("taps", self.kernel, self.kernel)
        projected = {"z": inner, "x": inner, "b": of_group, "c": of_group, "dt": a_head}
        convolved = {part: projected[part] for part in ("x", "b", "c")}
        named: Tensors = {f"{part}.weight": (axis, hidden) for part, axis in projected.items()}
        named |= {f"{part}.bias": (axis,) for part, axis in projected.items() if self.bias}
        named |= {f"conv_{part}.weight": (axis, one, taps) for part, axis in convolved.items()}
        named |= {f"conv_{part}.bias": (axis,) for part, axis in convolved.items() if self.conv_bias}
        named |= {"a_log": (a_head,), "d": (a_head,), "dt_bias": (a_head,), "norm.weight": (inner,)}
        return named | {"out.weight": (hidden, inner)} | ({"out.bias": (hidden,)} if self.bias else {})


Mixer = Attention | LatentAttention | Mamba
