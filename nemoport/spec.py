"""What a model is (`ModelSpec`), how a target wants it (`Plan`), and the canonical tensors that follow from both.

A spec is read from any config and written to any config. Canonical tensors are unfused, unsharded and finest-grained,
and are named by place: `embed.weight`, `positions.weight`, `layers.0.attn.q.weight`, `layers.0.ffn.gate.weight`,
`norm.weight`, `head.weight`. Every axis says what it counts (`heads`, `ffn`, `vocab`...), which is all that sharding
needs to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import groupby
from math import log, sqrt
from typing import Any, ClassVar, Literal

from nemoport.errors import UsageError

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu2"]
"""`gelu` is x * Phi(x) (arXiv:1606.08415), `gelu_tanh` its approximation by tanh, `quick_gelu` the one by
x * sigmoid(1.702 x); `relu2` is relu(x) squared (arXiv:2109.08668)."""
Score = Literal["softmax", "sigmoid"]
Pooling = Literal["avg", "cls", "last"]
"""One vector of a text's tokens: their mean, the first or the last one. Padding is none of them, on whichever side."""
VocabPolicy = Literal["true", "padded"]
Weights = Literal["model", "optimizer"]
"""Those that the model computes with, or the float32 copies of them that the optimizer kept."""

DTYPES = ("float32", "float16", "bfloat16")
"""The dtypes that `--dtype` takes."""


@dataclass(frozen=True)
class Axis:
    """One axis of a canonical tensor: `size` elements, made of `units` that must stay whole (heads, for example)."""

    name: str
    size: int
    units: int


@dataclass(frozen=True)
class TensorSpec:
    name: str
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """`rms`: x / rms(x) * w (arXiv:1910.07467). `layer`: (x - mean) / std * w + b (arXiv:1607.06450).
    `zero_centered`: the tensor holds w - 1 (LayerNorm1p, Gemma)."""

    kind: NormKind = "rms"
    eps: float = 1e-5
    zero_centered: bool = False

    def tensors(self, width: Axis) -> dict[str, tuple[Axis, ...]]:
        return {"weight": (width,)} if self.kind == "rms" else {"weight": (width,), "bias": (width,)}


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Position interpolation: every position is divided by `factor` (arXiv:2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling by wavelength: long waves are slowed by `factor`, short ones kept, a ramp between
    (Hugging Face `rope_type: llama3`; Megatron-core `RotaryEmbedding._apply_scaling`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): pairs that turn `beta_fast` times or more within the original context keep their
    frequency, those that turn `beta_slow` times or fewer are slowed by `factor`, and a straight ramp lies between, over
    the numbers of the pairs; `truncate` moves its ends outwards to whole pairs. Cosines and sines are multiplied with
    `attention_factor`; None: temperature(mscale) / temperature(mscale_all_dim), as DeepSeek-V2 has it."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def temperature(self, mscale: float) -> float:
        return 0.1 * mscale * log(self.factor) + 1.0 if self.factor > 1 else 1.0

    @property
    def magnitude(self) -> float:
        """What cosines and sines are multiplied with."""
        if self.attention_factor is not None:
            return self.attention_factor
        return self.temperature(self.mscale) / self.temperature(self.mscale_all_dim)


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | None


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding (arXiv:2104.09864) on the first `dims` of each head. Element j is paired with
    j + dims / 2 (half-split, `rotate_half`); `interleaved`: 2 j with 2 j + 1."""

    dims: int
    base: float = 10000.0
    scaling: RopeScaling = None
    interleaved: bool = False

    @property
    def magnitude(self) -> float:
        return self.scaling.magnitude if isinstance(self.scaling, YarnScaling) else 1.0


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

    def tensors(self, hidden: Axis) -> dict[str, tuple[Axis, ...]]:
        q = Axis("heads", self.heads * self.head_dim, self.heads)
        kv = Axis("kv_heads", self.kv_heads * self.head_dim, self.kv_heads)
        named: dict[str, tuple[Axis, ...]] = {
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

    def tensors(self, hidden: Axis) -> dict[str, tuple[Axis, ...]]:
        def of_heads(dims: int) -> Axis:
            return Axis("heads", self.heads * dims, self.heads)

        latent, rope = Axis("kv_latent", self.kv_rank, self.kv_rank), Axis("rope", self.rope.dims, self.rope.dims)
        if self.q_rank is None:
            named: dict[str, tuple[Axis, ...]] = {"q.weight": (of_heads(self.q_dims), hidden)}
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

    def tensors(self, hidden: Axis) -> dict[str, tuple[Axis, ...]]:
        inner = Axis("ssm_heads", self.heads * self.head_dim, self.heads)
        of_group = Axis("ssm_groups", self.groups * self.state_dims, self.groups)
        a_head = Axis("ssm_heads", self.heads, self.heads)
        one, taps = Axis("channel", 1, 1), Axis("taps", self.kernel, self.kernel)
        projected = {"z": inner, "x": inner, "b": of_group, "c": of_group, "dt": a_head}
        convolved = {part: projected[part] for part in ("x", "b", "c")}
        named: dict[str, tuple[Axis, ...]] = {f"{part}.weight": (axis, hidden) for part, axis in projected.items()}
        named |= {f"{part}.bias": (axis,) for part, axis in projected.items() if self.bias}
        named |= {f"conv_{part}.weight": (axis, one, taps) for part, axis in convolved.items()}
        named |= {f"conv_{part}.bias": (axis,) for part, axis in convolved.items() if self.conv_bias}
        named |= {"a_log": (a_head,), "d": (a_head,), "dt_bias": (a_head,), "norm.weight": (inner,)}
        return named | {"out.weight": (hidden, inner)} | ({"out.bias": (hidden,)} if self.bias else {})


Mixer = Attention | LatentAttention | Mamba


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Feed-forward: down(act(gate(x)) * up(x)) (gated, arXiv:2002.05202) or down(act(up(x))). A gated one may be
    clamped: gate(x) is at most `limit`, up(x) within -limit and limit; and `up_offset` is added to the latter."""

    intermediate: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    limit: float | None = None
    up_offset: float = 0.0

    def tensors(self, hidden: Axis) -> dict[str, tuple[Axis, ...]]:
        ffn = Axis("ffn", self.intermediate, self.intermediate)
        named: dict[str, tuple[Axis, ...]] = {"gate.weight": (ffn, hidden)} if self.gated else {}
        named |= {"up.weight": (ffn, hidden), "down.weight": (hidden, ffn)}
        if self.bias:
            named |= {"gate.bias": (ffn,)} if self.gated else {}
            named |= {"up.bias": (ffn,), "down.bias": (hidden,)}
        return named

    def share(self, plan: Plan, position: int) -> Dense:
        return replace(self, intermediate=self.intermediate // plan.tp)


@dataclass(frozen=True)
class Groups:
    """Experts stand in `count` equal groups, and only those of the `top` best groups may be chosen. A group is as good
    as the sum of its `best` highest scores: one in DeepSeek V2 (arXiv:2405.04434), two in V3 (arXiv:2412.19437)."""

    count: int
    top: int
    best: int


@dataclass(frozen=True, kw_only=True)
class Router:
    """Scores of a token are softmax or sigmoid of weight x (+ bias). The `top_k` experts with the highest are chosen,
    and what they add is multiplied with their scores; `normalized`: divided by the sum of those chosen; and with
    `scale`. A softmax over the chosen alone is a normalized one over all.

    `expert_bias` is added to the scores while experts are chosen, and only then (arXiv:2408.15664)."""

    top_k: int
    score: Score = "softmax"
    normalized: bool = True
    scale: float = 1.0
    bias: bool = False
    expert_bias: bool = False
    groups: Groups | None = None

    def tensors(self, experts: Axis, hidden: Axis) -> dict[str, tuple[Axis, ...]]:
        named: dict[str, tuple[Axis, ...]] = {"weight": (experts, hidden)}
        named |= {"bias": (experts,)} if self.bias else {}
        return named | ({"expert_bias": (experts,)} if self.expert_bias else {})


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Mixture of experts (arXiv:1701.06538): the chosen experts' outputs by their scores, plus what the `shared` one
    adds, which sees every token; `shared_gate`: multiplied with sigmoid(shared_gate x)."""

    experts: int
    expert: Dense
    router: Router
    shared: Dense | None = None
    shared_gate: bool = False
    held: tuple[int, int] | None = None
    """Of a rank: the first of its experts, and the one after its last. None: it has all."""

    @property
    def local(self) -> range:
        """The experts at hand, numbered as in the whole model."""
        return range(*(self.held or (0, self.experts)))

    def tensors(self, hidden: Axis) -> dict[str, tuple[Axis, ...]]:
        experts = Axis("experts", self.experts, self.experts)
        named = _below("router.", self.router.tensors(experts, hidden))
        each = self.expert.tensors(hidden)
        for expert in self.local:
            named |= _below(f"experts.{expert}.", each)
        if self.shared:
            named |= _below("shared.", self.shared.tensors(hidden))
        if self.shared_gate:
            named |= {"shared_gate.weight": (Axis("gate", 1, 1), hidden)}
        return named

    def share(self, plan: Plan, position: int) -> Mixture:
        """Expert ranks count first among the ranks of a stage: position = cut of each expert * ep + expert rank."""
        count = self.experts // plan.ep
        first = position % plan.ep * count
        return replace(
            self,
            held=(first, first + count),
            expert=replace(self.expert, intermediate=self.expert.intermediate // plan.expert_tp),
            shared=self.shared and self.shared.share(plan, position),
        )


FeedForward = Dense | Mixture


@dataclass(frozen=True, kw_only=True)
class Block:
    """x += mixer(attn_norm(x)); x += ffn(ffn_norm(x)). Where a half is None, its norm is not there either.
    `post_norms`: what each half adds is normed once more, by `attn_post_norm` and `ffn_post_norm`.
    `norm_after`: x = attn_norm(x + mixer(x)), x = ffn_norm(x + ffn(x)), as in the first transformers."""

    mixer: Mixer | None
    ffn: FeedForward | None
    post_norms: bool = False
    norm_after: bool = False

    def parts(self, norm: Norm, hidden: Axis) -> dict[str, dict[str, tuple[Axis, ...]]]:
        named: dict[str, dict[str, tuple[Axis, ...]]] = {}
        for name, half in (("attn", self.mixer), ("ffn", self.ffn)):
            if half:
                named |= {f"{name}_norm": norm.tensors(hidden), name: half.tensors(hidden)}
                named |= {f"{name}_post_norm": norm.tensors(hidden)} if self.post_norms else {}
        return named


@dataclass(frozen=True, kw_only=True)
class LanguageModel:
    """Logits over the vocabulary; `tied` uses the embedding as the output matrix. `softcap` bounds them:
    softcap * tanh(logits / softcap)."""

    tied: bool = False
    softcap: float | None = None

    def tensors(self, vocab: Axis, hidden: Axis) -> dict[str, tuple[Axis, ...]]:
        return {} if self.tied else {"head.weight": (vocab, hidden)}


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A vector for each text: its tokens pooled, then divided by its length (`normalized`). `matryoshka`: who asks may
    have its first `dimensions` alone, cut off before it is normalized (arXiv:2205.13147)."""

    pooling: Pooling = "avg"
    normalized: bool = True
    matryoshka: bool = False

    def tensors(self, vocab: Axis, hidden: Axis) -> dict[str, tuple[Axis, ...]]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Classifier:
    """Logits over labels for each text, or its one score: (head(x) + bias) / temperature, where x are its tokens
    pooled, and with a `pooler` tanh(pooler(x)), as BERT has it."""

    labels: int
    pooling: Pooling = "cls"
    pooler: bool = False
    bias: bool = False
    temperature: float = 1.0

    def tensors(self, vocab: Axis, hidden: Axis) -> dict[str, tuple[Axis, ...]]:
        labels = Axis("labels", self.labels, self.labels)
        named: dict[str, tuple[Axis, ...]] = {}
        if self.pooler:
            named |= {"pooler.weight": (hidden, hidden), "pooler.bias": (hidden,)}
        return named | {"head.weight": (labels, hidden)} | ({"head.bias": (labels,)} if self.bias else {})


Head = LanguageModel | Embedding | Classifier


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    family: str
    vocab_size: int
    hidden_size: int
    max_positions: int
    norm: Norm
    head: Head
    blocks: tuple[Block, ...]
    embedding_scale: float | None = None
    """What embeddings are multiplied with, in the dtype that is computed in."""
    learned_positions: bool = False
    """A row of `positions.weight` is added to each embedding."""
    first_position: int = 0
    """The row of a text's first token."""
    token_types: int = 0
    """Rows of `token_types.weight`, of which one is added to each embedding: question and answer, for example."""
    embedding_norm: bool = False
    """Embeddings are normed before the first block."""
    final_norm: bool = True
    """What the last block gives is normed."""

    @property
    def language_model(self) -> LanguageModel:
        """The head of a model that writes text; who asks knows that it does."""
        assert isinstance(self.head, LanguageModel), self.head
        return self.head

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return self.max_positions - self.first_position

    @property
    def mixers(self) -> tuple[Mixer, ...]:
        """Of the blocks that have one."""
        return tuple(block.mixer for block in self.blocks if block.mixer)

    def shard(self, plan: Plan, rank: int) -> ModelSpec:
        """The model as one rank sees it: its stage's blocks, its share of heads and of the feed-forward.

        Ranks count tensor parallelism first: rank = stage * tp + position. The vocabulary stays global, since
        whether it is cut is the target's choice. `check_divisible` must hold.
        """
        layers = len(self.blocks) // plan.pp
        stage, position = divmod(rank, plan.tp)
        mine = self.blocks[stage * layers : (stage + 1) * layers]
        return replace(self, blocks=tuple(_share(block, plan, position) for block in mine))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is quantized."""

    method: str
    """The module in `quantizers/`."""
    kv_cache: str | None = None
    exclude: tuple[str, ...] = ()
    """Patterns of linears that stay as they are, beside those that always do."""
    calibration: str | None = None
    """What its statistics were taken from: a digest of the tokens, or of the statistics themselves."""
    requantize: bool = False
    """The source is quantized already and is undone first."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a target cuts and casts a model. `ep` divides `tp`; the world is tp * pp ranks, of which ep at a time have
    other experts, and tp / ep cut the same ones. dtype None keeps each tensor's own."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    dtype: str | None = None
    vocab: VocabPolicy = "true"
    weights: Weights = "model"
    recipe: Recipe | None = None

    @property
    def world(self) -> int:
        return self.tp * self.pp

    @property
    def expert_tp(self) -> int:
        """Over how many ranks an expert is cut."""
        return self.tp // self.ep


def tensors(spec: ModelSpec) -> dict[str, TensorSpec]:
    """Every canonical tensor of the model, by name, in reading order."""
    return {tensor.name: tensor for tensor in _tensors(spec)}


def check_divisible(spec: ModelSpec, plan: Plan) -> None:
    """Refuse, before anything is read, a plan that does not divide the model."""
    if (layers := len(spec.blocks)) % plan.pp:
        raise UsageError(f"{layers} layers do not divide over pp={plan.pp}; use pp {_divisors(layers)}")
    for mixer in dict.fromkeys(spec.mixers):
        heads, kv_heads = mixer.heads, mixer.kv_heads
        if heads % plan.tp:
            raise UsageError(f"{heads} heads do not divide over tp={plan.tp}; use tp {_divisors(heads)}")
        if kv_heads % plan.tp and plan.tp % kv_heads:
            fit = [tp for tp in range(1, heads + 1) if heads % tp == 0 and not (kv_heads % tp and tp % kv_heads)]
            raise UsageError(
                f"{kv_heads} KV heads neither divide over tp={plan.tp} nor repeat to it; use tp {_either(fit)}"
            )
    if plan.tp % plan.ep:
        raise UsageError(f"tp={plan.tp} does not divide over ep={plan.ep}; use ep {_divisors(plan.tp)}")
    feeding = dict.fromkeys(block.ffn for block in spec.blocks if block.ffn)
    if plan.ep > 1 and not any(isinstance(ffn, Mixture) for ffn in feeding):
        raise UsageError(f"ep={plan.ep} was asked for a model without experts; use ep 1")
    for ffn in feeding:
        if isinstance(ffn, Mixture):
            _check_experts(ffn, plan)
        width = _width(ffn)
        if width % plan.tp:
            shared = [*(mixer.heads for mixer in spec.mixers), width]
            fit = [tp for tp in range(1, min(shared) + 1) if not any(size % tp for size in shared)]
            raise UsageError(f"feed-forward size {width} does not divide over tp={plan.tp}; use tp {_either(fit)}")


def parameter_count(spec: ModelSpec) -> int:
    total = 0
    for tensor in tensors(spec).values():
        count = 1
        for size in tensor.shape:
            count *= size
        total += count
    return total


def to_json(value: Any) -> Any:
    """A spec or plan as JSON data. Unions carry their class in `kind`; runs of equal blocks are written once."""
    if isinstance(value, ModelSpec):
        data = {field.name: to_json(getattr(value, field.name)) for field in fields(value) if field.name != "blocks"}
        return data | {"blocks": [{"repeat": len(list(run)), **to_json(block)} for block, run in groupby(value.blocks)]}
    if is_dataclass(value):
        data = {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
        return {"kind": type(value).__name__, **data} if type(value).__name__ in _KINDS else data
    return value


def plan_from_json(data: Mapping[str, Any]) -> Plan:
    recipe = data.get("recipe")
    exclude = tuple(recipe["exclude"]) if recipe else ()
    return Plan(**{**data, "recipe": Recipe(**{**recipe, "exclude": exclude}) if recipe else None})


def spec_from_json(data: Mapping[str, Any]) -> ModelSpec:
    blocks = tuple(
        block
        for row in data["blocks"]
        for block in [Block(**{key: _from_json(value) for key, value in row.items() if key != "repeat"})]
        * row["repeat"]
    )
    norm, head = Norm(**data["norm"]), _from_json(data["head"])
    return ModelSpec(**{**data, "norm": norm, "head": head, "blocks": blocks})


_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        *(Attention, LatentAttention, Mamba, Dense, Mixture, Router, Groups),
        *(LanguageModel, Embedding, Classifier),
        *(LinearScaling, Llama3Scaling, YarnScaling),
    )
}


def _from_json(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    data = {key: _from_json(value) for key, value in data.items()}
    if kind := data.pop("kind", None):
        return _KINDS[kind](**data)
    return Rope(**data)


def _tensors(spec: ModelSpec) -> Iterator[TensorSpec]:
    vocab = Axis("vocab", spec.vocab_size, spec.vocab_size)
    hidden = Axis("hidden", spec.hidden_size, spec.hidden_size)
    yield TensorSpec("embed.weight", (vocab, hidden))
    if spec.learned_positions:
        yield TensorSpec("positions.weight", (Axis("positions", spec.max_positions, spec.max_positions), hidden))
    if spec.token_types:
        yield TensorSpec("token_types.weight", (Axis("types", spec.token_types, spec.token_types), hidden))
    for name, axes in spec.norm.tensors(hidden).items() if spec.embedding_norm else ():
        yield TensorSpec(f"embed_norm.{name}", axes)
    for i, block in enumerate(spec.blocks):
        for part, named in block.parts(spec.norm, hidden).items():
            for name, axes in named.items():
                yield TensorSpec(f"layers.{i}.{part}.{name}", axes)
    for name, axes in spec.norm.tensors(hidden).items() if spec.final_norm else ():
        yield TensorSpec(f"norm.{name}", axes)
    for name, axes in spec.head.tensors(vocab, hidden).items():
        yield TensorSpec(name, axes)


def _share(block: Block, plan: Plan, position: int) -> Block:
    mixer, ffn = block.mixer, block.ffn
    return replace(
        block,
        mixer=mixer and mixer.share(plan.tp),
        ffn=ffn and ffn.share(plan, position),
    )


def _check_experts(mixture: Mixture, plan: Plan) -> None:
    if (count := mixture.experts) % plan.ep:
        raise UsageError(f"{count} experts do not divide over ep={plan.ep}; use ep {_divisors(count)}")
    if (width := mixture.expert.intermediate) % plan.expert_tp:
        raise UsageError(
            f"experts of size {width} do not divide over the {plan.expert_tp} ranks that tp={plan.tp} and "
            f"ep={plan.ep} leave for each; use a tp / ep of {_divisors(width)}"
        )


def _width(ffn: FeedForward) -> int:
    """What tensor parallelism cuts, of experts that of the shared one."""
    if isinstance(ffn, Dense):
        return ffn.intermediate
    return ffn.shared.intermediate if ffn.shared else 0


def _below(prefix: str, named: Mapping[str, tuple[Axis, ...]]) -> dict[str, tuple[Axis, ...]]:
    return {prefix + name: axes for name, axes in named.items()}


def _divisors(number: int) -> str:
    return _either([candidate for candidate in range(1, number + 1) if number % candidate == 0])


def _either(numbers: list[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
