"""A decoder as flat words: `heads`, `kv_heads`, `rope_base`... `spec_of` makes a ModelSpec of them and `words_of` is
its inverse. Configs are read into words and written from them.

A word of a block is one value for all layers that have it. Where layers differ it is a `PerLayer`, one value a layer:
`window=PerLayer((4096, None, 4096, None))`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.spec import Attention, Block, Dense, LanguageModel, ModelSpec, Norm, Rope

Words = dict[str, Any]


class PerLayer(tuple[Any, ...]):
    """The values of one word in all layers, not all equal; None in a layer without the part that it is of."""


PLAIN: Mapping[str, Any] = {
    "norm": "rms",
    "zero_centered": False,
    "tied": False,
    "logit_softcap": None,
    "embedding_scale": None,
    "learned_positions": False,
    "mixer": "attention",
    "ffn": "dense",
    "post_norms": False,
    "rope_base": None,
    "rope_fraction": 1.0,
    "rope_scaling": None,
    "window": None,
    "scale": None,
    "softcap": None,
    "qkv_bias": False,
    "out_bias": False,
    "qk_norm": False,
    "activation": "silu",
    "gated": True,
    "ffn_bias": False,
}
"""What a word means that a config has no key for. `rope_base` None: heads are not rotated."""


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
        key = tuple(here[word] for word in (*_OF_BLOCK, *_OF_ATTENTION, *_OF_DENSE))
        if key not in made:
            made[key] = _block(here)
        blocks.append(made[key])
    return ModelSpec(
        family=family,
        vocab_size=words["vocab_size"],
        hidden_size=words["hidden_size"],
        max_positions=words["max_positions"],
        norm=Norm(kind=words["norm"], eps=words["eps"], zero_centered=words["zero_centered"]),
        head=LanguageModel(tied=words["tied"], softcap=words["logit_softcap"]),
        blocks=tuple(blocks),
        embedding_scale=words["embedding_scale"],
        learned_positions=words["learned_positions"],
    )


def words_of(spec: ModelSpec) -> Words:
    """The inverse of `spec_of`."""
    rows = [_words_of_block(block) for block in spec.blocks]
    of_blocks = {word: collapsed([row[word] for row in rows]) for word in _OF_BLOCK}
    for halves, its_words in (("mixer", _OF_ATTENTION), ("ffn", _OF_DENSE)):
        having = [row for row in rows if row[halves]]
        of_blocks |= {
            word: having[0][word]
            if len({row[word] for row in having}) == 1
            else PerLayer(row.get(word) for row in rows)
            for word in its_words
            if having
        }
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "max_positions": spec.max_positions,
        "layers": len(spec.blocks),
        "norm": spec.norm.kind,
        "eps": spec.norm.eps,
        "zero_centered": spec.norm.zero_centered,
        "tied": spec.head.tied,
        "logit_softcap": spec.head.softcap,
        "embedding_scale": spec.embedding_scale,
        "learned_positions": spec.learned_positions,
        **of_blocks,
    }


def differing(spec: ModelSpec) -> str:
    """How a model is not plain, in words."""
    words = words_of(spec)
    said = [f"{word} {_short(words[word])}" for word, value in PLAIN.items() if words.get(word, value) != value]
    return ", ".join(said) or "plain"


_OF_BLOCK = ("mixer", "ffn", "post_norms")
_OF_ATTENTION = (
    *("heads", "kv_heads", "head_dim", "rope_base", "rope_fraction", "rope_scaling"),
    *("window", "scale", "softcap", "qkv_bias", "out_bias", "qk_norm"),
)
_OF_DENSE = ("intermediate", "activation", "gated", "ffn_bias")


def _block(words: Mapping[str, Any]) -> Block:
    return Block(
        mixer=_attention(words) if words["mixer"] else None,
        ffn=_dense(words) if words["ffn"] else None,
        post_norms=words["post_norms"],
    )


def _attention(words: Mapping[str, Any]) -> Attention:
    heads, kv_heads, head_dim = (words[word] for word in ("heads", "kv_heads", "head_dim"))
    if heads % kv_heads:
        raise DamagedInput(f"{heads} heads do not divide over {kv_heads} KV heads; check the config")
    plain = {word: words[word] for word in ("window", "scale", "softcap", "qkv_bias", "out_bias", "qk_norm")}
    return Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, rope=_rope(words), **plain)


def _rope(words: Mapping[str, Any]) -> Rope | None:
    if words["rope_base"] is None:
        return None
    head_dim = words["head_dim"]
    dims = int(head_dim * words["rope_fraction"])
    if dims % 2 or not 0 < dims <= head_dim:
        raise DamagedInput(f"rotary embedding on {dims} of {head_dim} dimensions; an even part is needed")
    return Rope(dims=dims, base=words["rope_base"], scaling=words["rope_scaling"])


def _dense(words: Mapping[str, Any]) -> Dense:
    return Dense(
        intermediate=words["intermediate"],
        activation=words["activation"],
        gated=words["gated"],
        bias=words["ffn_bias"],
    )


def _words_of_block(block: Block) -> Words:
    words: Words = {"mixer": None, "ffn": None, "post_norms": block.post_norms}
    if mixer := block.mixer:
        rope = mixer.rope
        words |= {word: getattr(mixer, word) for word in _OF_ATTENTION if not word.startswith("rope")}
        words |= {
            "mixer": "attention",
            "rope_base": rope.base if rope else None,
            "rope_fraction": rope.dims / mixer.head_dim if rope else 1.0,
            "rope_scaling": rope.scaling if rope else None,
        }
    if ffn := block.ffn:
        words |= {"ffn": "dense", "intermediate": ffn.intermediate, "activation": ffn.activation}
        words |= {"gated": ffn.gated, "ffn_bias": ffn.bias}
    return words


def _short(value: Any) -> Any:
    return "differs from layer to layer" if isinstance(value, PerLayer) else value
