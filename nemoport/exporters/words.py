"""A model as flat words: `heads`, `kv_heads`, `rope_base`... `spec_of` makes a ModelSpec of them and `words_of` is
its inverse. Configs are read into words and written from them.

A word of a block is one value for all layers that have it. Where layers differ it is a `PerLayer`, one value a layer:
`window=PerLayer((4096, None, 4096, None))`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.spec import (
    Attention,
    Block,
    Classifier,
    Dense,
    Embedding,
    FeedForward,
    Head,
    LanguageModel,
    LatentAttention,
    Mamba,
    Mixer,
    Mixture,
    ModelSpec,
    Norm,
    Rope,
    Router,
)

Words = dict[str, Any]


class PerLayer(tuple[Any, ...]):
    """The values of one word in all layers, not all equal; None in a layer without the part that it is of."""


PLAIN: Mapping[str, Any] = {
    "norm": "rms",
    "zero_centered": False,
    "tied": False,
    "logit_softcap": None,
    "labels": None,
    "pooling": None,
    "pooler": False,
    "head_bias": False,
    "temperature": 1.0,
    "normalized": False,
    "matryoshka": False,
    "embedding_scale": None,
    "embedding_norm": False,
    "learned_positions": False,
    "first_position": 0,
    "token_types": 0,
    "final_norm": True,
    "mixer": "attention",
    "ffn": "dense",
    "post_norms": False,
    "norm_after": False,
    "rope_base": None,
    "rope_fraction": 1.0,
    "rope_scaling": None,
    "rope_interleaved": False,
    "latent_eps": 1e-6,
    "window": None,
    "causal": True,
    "scale": None,
    "softcap": None,
    "qkv_bias": False,
    "out_bias": False,
    "qk_norm": False,
    "sinks": False,
    "ssm_kernel": 4,
    "ssm_conv_bias": True,
    "ssm_bias": False,
    "ssm_eps": 1e-5,
    "activation": "silu",
    "gated": True,
    "ffn_bias": False,
    "ffn_limit": None,
    "up_offset": 0.0,
    "router_score": "softmax",
    "router_normalized": True,
    "router_scale": 1.0,
    "router_bias": False,
    "expert_bias": False,
    "expert_groups": None,
    "shared_intermediate": None,
    "shared_gate": False,
}
"""What a word means that a config has no key for. `rope_base` None: heads are not rotated. `shared_intermediate` None:
no expert sees every token. A model with `labels` is a classifier, one with a `pooling` and no labels embeds, any other
writes text."""


def collapsed(values: Sequence[Any]) -> Any:
    """One value for all layers where they agree."""
    return values[0] if len(set(values)) == 1 else PerLayer(values)


def collapsed_present(values: Sequence[Any]) -> Any:
    """The same over the layers that have the part: None where one has not."""
    present = {value for value in values if value is not None}
    return present.pop() if len(present) == 1 else PerLayer(values)


def by_layer(words: Mapping[str, Any], word: str) -> list[Any]:
    """A word's value in each layer: the inverse of `collapsed`."""
    value = words[word]
    return list(value) if isinstance(value, PerLayer) else [value] * int(words["layers"])


def spec_of(family: str, words: Mapping[str, Any]) -> ModelSpec:
    layers = words["layers"]
    if odd := [word for word, value in words.items() if isinstance(value, PerLayer) and len(value) != layers]:
        raise DamagedInput(f"the config has {layers} layers and says {odd[0]} of {len(words[odd[0]])}; correct it")
    made: dict[tuple[Any, ...], Block] = {}
    blocks = []
    for layer in range(layers):
        here = {word: value[layer] if isinstance(value, PerLayer) else value for word, value in words.items()}
        key = tuple(here.get(word) for word in (*_OF_BLOCK, *_OF_A_HALF))
        if key not in made:
            made[key] = _block(here)
        blocks.append(made[key])
    return ModelSpec(
        family=family,
        vocab_size=words["vocab_size"],
        hidden_size=words["hidden_size"],
        max_positions=words["max_positions"],
        norm=Norm(kind=words["norm"], eps=words["eps"], zero_centered=words["zero_centered"]),
        head=_head(words),
        blocks=tuple(blocks),
        **{word: words[word] for word in _OF_ENDS},
    )


def words_of(spec: ModelSpec) -> Words:
    """The inverse of `spec_of`."""
    rows = [_words_of_block(block) for block in spec.blocks]
    of_blocks = {word: collapsed([row[word] for row in rows]) for word in _OF_BLOCK}
    for word in _OF_A_HALF:
        having = [row for row in rows if word in row]
        if having:
            same = len({row[word] for row in having}) == 1
            of_blocks[word] = having[0][word] if same else PerLayer(row.get(word) for row in rows)
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "max_positions": spec.max_positions,
        "layers": len(spec.blocks),
        "norm": spec.norm.kind,
        "eps": spec.norm.eps,
        "zero_centered": spec.norm.zero_centered,
        **{word: getattr(spec, word) for word in _OF_ENDS},
        **_words_of_head(spec.head),
        **of_blocks,
    }


def differing(spec: ModelSpec) -> str:
    """How a model is not plain, in words."""
    words = words_of(spec)
    said = [f"{word} {_short(words[word])}" for word, value in PLAIN.items() if words.get(word, value) != value]
    return ", ".join(said) or "plain"


def relevant(words: Words) -> Words:
    """Without the words of parts that no layer has: a config may say them all the same."""
    kinds = {half: set(by_layer(words, half)) for half in ("mixer", "ffn")}
    absent = {word for half, of, its in _HALVES if not kinds[half] & of for word in its}
    return {word: value for word, value in words.items() if word not in absent}


_OF_ENDS = ("embedding_scale", "embedding_norm", "learned_positions", "first_position", "token_types", "final_norm")
_OF_HEAD = {
    LanguageModel: {"tied": "tied", "logit_softcap": "softcap"},
    Embedding: {"pooling": "pooling", "normalized": "normalized", "matryoshka": "matryoshka"},
    Classifier: {
        "labels": "labels",
        "pooling": "pooling",
        "pooler": "pooler",
        "head_bias": "bias",
        "temperature": "temperature",
    },
}
"""Our word, the head's own."""
_OF_BLOCK = ("mixer", "ffn", "post_norms", "norm_after")
_AS_IT_IS = ("window", "causal", "scale", "softcap", "qkv_bias", "out_bias", "qk_norm", "sinks")
_OF_ATTENTION = ("kv_heads", "head_dim", "rope_fraction", *_AS_IT_IS)
_OF_LATENT = ("q_rank", "kv_rank", "nope_dims", "v_dims", "rope_dims", "latent_eps")
_OF_MAMBA = {
    "ssm_heads": "heads",
    "ssm_head_dim": "head_dim",
    "ssm_groups": "groups",
    "ssm_state_dims": "state_dims",
    "ssm_kernel": "kernel",
    "ssm_conv_bias": "conv_bias",
    "ssm_bias": "bias",
    "ssm_eps": "norm_eps",
}
_OF_MIXER = ("heads", "rope_base", "rope_scaling", "rope_interleaved")
_OF_FFN = ("activation", "gated", "ffn_bias", "ffn_limit", "up_offset")
_OF_DENSE = ("intermediate",)
_OF_MIXTURE = (
    *("experts", "top_k", "expert_intermediate", "shared_intermediate", "shared_gate"),
    *("router_score", "router_normalized", "router_scale", "router_bias", "expert_bias", "expert_groups"),
)
_HALVES = (
    ("mixer", {"attention", "latent"}, _OF_MIXER),
    ("mixer", {"attention"}, _OF_ATTENTION),
    ("mixer", {"latent"}, _OF_LATENT),
    ("mixer", {"mamba"}, tuple(_OF_MAMBA)),
    ("ffn", {"dense", "mixture"}, _OF_FFN),
    ("ffn", {"dense"}, _OF_DENSE),
    ("ffn", {"mixture"}, _OF_MIXTURE),
)
"""Half of a block, the kinds of it, and the words that these have. All experts are of one kind, as the dense ones."""
_OF_A_HALF = tuple(word for *_, its in _HALVES for word in its)


def _head(words: Mapping[str, Any]) -> Head:
    kind: Any = Classifier if words["labels"] else Embedding if words["pooling"] else LanguageModel
    head: Head = kind(**{its: words[our] for our, its in _OF_HEAD[kind].items()})
    return head


def _words_of_head(head: Head) -> Words:
    plain = {word: PLAIN[word] for each in _OF_HEAD.values() for word in each}
    return plain | {our: getattr(head, its) for our, its in _OF_HEAD[type(head)].items()}


def _block(words: Mapping[str, Any]) -> Block:
    return Block(
        mixer=_MIXERS[words["mixer"]](words) if words["mixer"] else None,
        ffn=_FFNS[words["ffn"]](words) if words["ffn"] else None,
        post_norms=words["post_norms"],
        norm_after=words["norm_after"],
    )


def _attention(words: Mapping[str, Any]) -> Attention:
    heads, kv_heads, head_dim = (words[word] for word in ("heads", "kv_heads", "head_dim"))
    if heads % kv_heads:
        raise DamagedInput(f"{heads} heads do not divide over {kv_heads} KV heads; check the config")
    rope = None
    if words["rope_base"] is not None:
        rope = _rope(words, int(head_dim * words["rope_fraction"]), head_dim)
    plain = {word: words[word] for word in _AS_IT_IS}
    return Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=rope, **plain)


def _latent(words: Mapping[str, Any]) -> LatentAttention:
    plain = {word: words[word] for word in ("heads", "q_rank", "kv_rank", "nope_dims", "v_dims")}
    rope = _rope(words, words["rope_dims"], words["rope_dims"])
    return LatentAttention(rope=rope, norm_eps=words["latent_eps"], **plain)


def _mamba(words: Mapping[str, Any]) -> Mamba:
    if words["ssm_heads"] % words["ssm_groups"]:
        raise DamagedInput(
            f"{words['ssm_heads']} heads do not divide over {words['ssm_groups']} groups; check the config"
        )
    return Mamba(**{field: words[word] for word, field in _OF_MAMBA.items()})


_MIXERS: Mapping[str, Callable[[Mapping[str, Any]], Mixer]] = {
    "attention": _attention,
    "latent": _latent,
    "mamba": _mamba,
}


def _rope(words: Mapping[str, Any], dims: int, head_dim: int) -> Rope:
    if dims % 2 or not 0 < dims <= head_dim:
        raise DamagedInput(f"rotary embedding on {dims} of {head_dim} dimensions; an even part is needed")
    base, scaling, interleaved = (words[f"rope_{word}"] for word in ("base", "scaling", "interleaved"))
    return Rope(dims=dims, base=base, scaling=scaling, interleaved=interleaved)


def _dense(words: Mapping[str, Any]) -> Dense:
    return _of_size(words, words["intermediate"])


def _of_size(words: Mapping[str, Any], intermediate: int) -> Dense:
    return Dense(
        intermediate=intermediate,
        activation=words["activation"],
        gated=words["gated"],
        bias=words["ffn_bias"],
        limit=words["ffn_limit"],
        up_offset=words["up_offset"],
    )


def _mixture(words: Mapping[str, Any]) -> Mixture:
    experts, top_k, groups, shared = (
        words[word] for word in ("experts", "top_k", "expert_groups", "shared_intermediate")
    )
    eligible = experts if groups is None else experts // groups.count * groups.top
    if top_k > eligible or (groups and (experts % groups.count or not 0 < groups.best <= experts // groups.count)):
        raise DamagedInput(f"{top_k} of {experts} experts cannot be chosen ({groups or 'no groups'}); check the config")
    return Mixture(
        experts=experts,
        expert=_of_size(words, words["expert_intermediate"]),
        router=Router(
            top_k=top_k,
            score=words["router_score"],
            normalized=words["router_normalized"],
            scale=words["router_scale"],
            bias=words["router_bias"],
            expert_bias=words["expert_bias"],
            groups=groups,
        ),
        shared=None if shared is None else _of_size(words, shared),
        shared_gate=words["shared_gate"],
    )


_FFNS: Mapping[str, Callable[[Mapping[str, Any]], FeedForward]] = {"dense": _dense, "mixture": _mixture}


def _words_of_block(block: Block) -> Words:
    words: Words = {"mixer": None, "ffn": None, "post_norms": block.post_norms, "norm_after": block.norm_after}
    match block.mixer:
        case Attention() as mixer:
            words |= {"mixer": "attention", **_words_of_attention(mixer)}
        case LatentAttention() as mixer:
            words |= {"mixer": "latent", **_words_of_latent(mixer)}
        case Mamba() as mixer:
            words |= {"mixer": "mamba", **{word: getattr(mixer, field) for word, field in _OF_MAMBA.items()}}
    match block.ffn:
        case Dense() as ffn:
            words |= {"ffn": "dense", "intermediate": ffn.intermediate, **_words_of_ffn(ffn)}
        case Mixture() as ffn:
            words |= {"ffn": "mixture", **_words_of_mixture(ffn), **_words_of_ffn(ffn.expert)}
    return words


def _words_of_attention(mixer: Attention) -> Words:
    plain = {word: getattr(mixer, word) for word in ("heads", *_OF_ATTENTION) if word != "rope_fraction"}
    fraction = mixer.rope.dims / mixer.head_dim if mixer.rope else 1.0
    return plain | {"rope_fraction": fraction} | _words_of_rope(mixer.rope)


def _words_of_latent(mixer: LatentAttention) -> Words:
    plain = {word: getattr(mixer, word) for word in ("heads", "q_rank", "kv_rank", "nope_dims", "v_dims")}
    return plain | {"rope_dims": mixer.rope.dims, "latent_eps": mixer.norm_eps} | _words_of_rope(mixer.rope)


def _words_of_rope(rope: Rope | None) -> Words:
    if rope is None:
        return {word: PLAIN[word] for word in ("rope_base", "rope_scaling", "rope_interleaved")}
    return {"rope_base": rope.base, "rope_scaling": rope.scaling, "rope_interleaved": rope.interleaved}


def _words_of_ffn(ffn: Dense) -> Words:
    return {
        "activation": ffn.activation,
        "gated": ffn.gated,
        "ffn_bias": ffn.bias,
        "ffn_limit": ffn.limit,
        "up_offset": ffn.up_offset,
    }


def _words_of_mixture(mixture: Mixture) -> Words:
    router = mixture.router
    return {
        "experts": mixture.experts,
        "top_k": router.top_k,
        "expert_intermediate": mixture.expert.intermediate,
        "shared_intermediate": mixture.shared and mixture.shared.intermediate,
        "shared_gate": mixture.shared_gate,
        "router_score": router.score,
        "router_normalized": router.normalized,
        "router_scale": router.scale,
        "router_bias": router.bias,
        "expert_bias": router.expert_bias,
        "expert_groups": router.groups,
    }


def _short(value: Any) -> Any:
    return "differs from layer to layer" if isinstance(value, PerLayer) else value
