"""Models of every family, from its own tables: whatever its dialects can say, in awkward sizes. A new family has them
the moment it exists; a new word is an option more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from nemoport import plugins
from nemoport.errors import DamagedInput
from nemoport.exporters import source
from nemoport.exporters.configs import Dialect, Together
from nemoport.exporters.words import PLAIN, PerLayer, Words, spec_of
from nemoport.spec import Groups, LinearScaling, Llama3Scaling, ModelSpec, YarnScaling

LAYERS = 4
AWKWARD = {"hidden_size": 10, "heads": 10, "kv_heads": 5, "head_dim": 6}
EVEN = {"hidden_size": 60, "heads": 10, "kv_heads": 10, "head_dim": 6}
"""Where a format divides the hidden size by the heads."""
SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "max_positions": 77,
    "layers": LAYERS,
    "intermediate": 20,
    "eps": 1e-6,
    "rope_base": 5e4,
    "token_types": 2,
}
SSM = {"ssm_heads": 6, "ssm_head_dim": 5, "ssm_groups": 3, "ssm_state_dims": 7}
EXPERTS = {"experts": 10, "top_k": 3, "expert_intermediate": 20}
LATENT = {"q_rank": 14, "kv_rank": 9, "nope_dims": 6, "rope_dims": 4, "v_dims": 10, "latent_eps": 1e-6}

OPTIONS: Mapping[str, tuple[Any, ...]] = {
    "tied": (True, False),
    "kv_heads": (1, 2, 10),
    "qkv_bias": (True, False),
    "out_bias": (True, False),
    "ffn_bias": (True, False),
    "qk_norm": (True, False),
    "window": (5,),
    "rope_base": (3e3,),
    "rope_fraction": (4 / 6, 1.0),
    "rope_scaling": (
        LinearScaling(factor=3.0),
        Llama3Scaling(factor=4.0, original_max_positions=64),
        YarnScaling(factor=4.0, original_max_positions=16),
        YarnScaling(factor=4.0, original_max_positions=16, attention_factor=1.5, truncate=False),
        YarnScaling(
            factor=4.0, original_max_positions=16, beta_fast=9.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=0.9
        ),
    ),
    "rope_interleaved": (True, False),
    "q_rank": (None, 14),
    "ssm_heads": (15,),
    "ssm_groups": (1, 6),
    "ssm_kernel": (2,),
    "ssm_conv_bias": (True, False),
    "ssm_bias": (True, False),
    "scale": (24**-0.5, None),
    "softcap": (3.0, None),
    "logit_softcap": (4.0, None),
    "activation": ("gelu", "gelu_tanh", "relu2", "silu"),
    "ffn_limit": (0.5,),
    "router_normalized": (True, False),
    "router_score": ("sigmoid",),
    "router_scale": (2.5,),
    "expert_bias": (True,),
    "shared_intermediate": (30,),
    "pooling": ("avg", "cls", "last"),
    "normalized": (True, False),
    "matryoshka": (True, False),
    "labels": (1, 3),
    "temperature": (0.5,),
    "token_types": (1, 3),
}
TOGETHER: tuple[dict[str, Any], ...] = (
    {"router_normalized": False, "expert_groups": Groups(5, 3, 1)},
    {"router_score": "sigmoid", "expert_bias": True, "top_k": 4, "expert_groups": Groups(5, 2, 2), "router_scale": 2.5},
    {"ffn": PerLayer(("dense", "mixture", "mixture", "dense")), "intermediate": 20},
    {"ffn": PerLayer(("dense", "dense", "mixture", "mixture")), "intermediate": 20},
    {"ffn": "dense", "intermediate": 20},
    {"top_k": 4, "expert_groups": Groups(5, 2, 2)},
    {"top_k": 2, "expert_groups": Groups(5, 3, 1)},
)
"""Options that go together only."""


def _turns(first: Any, second: Any) -> PerLayer:
    return PerLayer((first, second) * (LAYERS // 2))


ALTERNATING = {
    "kv_heads": PerLayer((5, 10, None, 10)),
    "mixer": PerLayer(("attention", "attention", None, "attention")),
    "ffn": PerLayer(("dense", None, "dense", "dense")),
    "intermediate": PerLayer((256, None, 512, 256)),
    "window": _turns(5, None),
    "rope_base": _turns(3e2, 5e4),
    "rope_scaling": _turns(None, LinearScaling(factor=3.0)),
}
HYBRID = {
    "mixer": PerLayer(("mamba", None, "attention", None)),
    "ffn": PerLayer((None, "dense", None, "dense")),
}
HYBRID_OF_EXPERTS = HYBRID | {"ffn": PerLayer((None, "dense", None, "mixture"))}
BLOCKS = ("kv_heads", "mixer", "ffn", "intermediate")
BIASES = ("qkv_bias", "out_bias", "ffn_bias")

COLUMNS = tuple(
    (family, naming) for family, module in plugins.load_all(source.FAMILIES).items() for naming in module.COLUMNS
)


def models(family: str, naming: str) -> dict[str, ModelSpec]:
    """What the configs of a column can say, by what is special."""
    found: dict[str, ModelSpec] = {}
    for number, dialect in enumerate(source.column(family, naming, "give it one").dialects):
        for name, words in _said(dialect):
            spec = spec_of(family, words)
            if spec not in found.values():
                found[f"{number} {name}"] = spec
    return found


def _said(dialect: Dialect) -> Iterator[tuple[str, Words]]:
    spoken = {word for row in dialect.rows for word in (row.words if isinstance(row, Together) else (row.word,))}
    base = _base(dialect, spoken)
    yield "plain", base
    variations = [{word: value} for word in OPTIONS if word in spoken for value in OPTIONS[word]]
    variations += [{word: yes for word in BIASES if word in spoken} for yes in (True, False)]
    together = (("window",), BLOCKS, tuple(ALTERNATING))
    variations += [{word: ALTERNATING[word] for word in words if word in spoken} for words in together]
    variations += [changes for changes in TOGETHER if changes.keys() <= spoken]
    for changes in variations:
        words = {**base, **changes}
        if changes and dialect.saying(words):
            yield ", ".join(f"{word} {_short(value)}" for word, value in changes.items()), words


def _base(dialect: Dialect, spoken: set[str]) -> Words:
    """The plainest model that the dialect says: what it writes of a plain one says something."""
    hybrid = HYBRID_OF_EXPERTS if "experts" in spoken else HYBRID
    needed = product(({}, hybrid), (AWKWARD, EVEN), (False, True), (None, 24**-0.5), ("silu", "gelu_tanh"), (None, 30))
    for blocks, sizes, tied, scale, activation, shared in needed:
        of_start = {"tied": tied, "scale": scale, "activation": activation}
        of_start |= {"shared_intermediate": shared, "shared_gate": shared is not None}
        start = {**PLAIN, **SIZES, **LATENT, **SSM, **sizes, **of_start, **dialect.fixed}
        start |= {} if "rope_base" in spoken else {"rope_base": None}
        start |= EXPERTS | {"ffn": "mixture"} if "experts" in spoken else {}
        start |= blocks
        start |= {"embedding_scale": sizes["hidden_size"] ** 0.5} if "embedding_scale" in spoken else {}
        try:
            config = dialect.write(start)
            assert config is not None
            words = dialect.read(config)
        except DamagedInput:
            continue
        if dialect.saying(words) and all(words.get(word, size) == size for word, size in sizes.items()):
            return words
    raise AssertionError(f"{dialect.marks} says no model of these sizes")


def _short(value: Any) -> str:
    if isinstance(value, PerLayer):
        return "alternating"
    return str(value)[:8] if isinstance(value, bool | int | float | str | None) else type(value).__name__
