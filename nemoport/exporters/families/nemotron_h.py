"""Nemotron-H, Nemotron Nano v2 and Nemotron 3 Nano: Mamba-2, attention without positions, feed-forward and experts, one
of them a layer, by a pattern.
"""

from __future__ import annotations

from typing import Any

from nemoport.exporters import layouts, naming
from nemoport.exporters.configs import (
    PRESENT,
    Config,
    Dialect,
    Key,
    Keys,
    Mark,
    Row,
    Together,
    choice,
    flag,
    number,
    whole_number,
)
from nemoport.exporters.dialects.huggingface import expert_groups, huggingface, huggingface_sizes
from nemoport.exporters.dialects.megatron import (
    MEGATRON_EXPERTS,
    NO_SINKS,
    RMS,
    UNGATED,
    WITH_EXPERTS,
    centered,
    megatron,
)
from nemoport.exporters.dialects.rows import Marks, biased, without
from nemoport.exporters.layouts import PADDED, STACKED
from nemoport.exporters.rules import Column
from nemoport.exporters.words import Words, by_layer, collapsed

_SHAPE = {"gated": False, "activation": "relu2"}
KINDS = {"M": ("mamba", None), "*": ("attention", None), "-": (None, "dense"), "E": (None, "mixture")}
"""Megatron-core's letters (ssm/mamba_hybrid_layer_allocation.py): what mixes and what feeds forward in such a layer."""
LETTERS = {halves: letter for letter, halves in KINDS.items()}
NAMED = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-", "moe": "E"}
"""transformers' names of layers, those of version 5 first."""


def _said(letters: str) -> Words:
    mixers, ffns = zip(*(KINDS[letter] for letter in letters), strict=True)
    return {"layers": len(letters), "mixer": collapsed(mixers), "ffn": collapsed(ffns)}


def _letters(words: Words) -> str:
    """A layer of another kind gets a letter that none is read from."""
    halves = zip(by_layer(words, "mixer"), by_layer(words, "ffn"), strict=True)
    return "".join(LETTERS.get(each, "?") for each in halves)


def _ssm(state: str, groups: str) -> tuple[Row, ...]:
    return (
        Key("ssm_head_dim", "mamba_head_dim", 64, whole_number),
        Key("ssm_state_dims", state, 128, whole_number),
        Key("ssm_groups", groups, 8, whole_number),
    )


# Megatron-core's MambaModel. The convolution has 4 taps and a bias there and the norm of the mixer an eps of 1e-5,
# whatever the config.


def _megatron_heads(config: Config) -> int:
    """None said: twice the hidden size, in heads."""
    said = config.get("mamba_num_heads") or 2 * config["hidden_size"] // config.get("mamba_head_dim", 64)
    return whole_number(said)


_PATTERN = Together(
    ("layers", "mixer", "ffn"),
    lambda config: _said(config["hybrid_override_pattern"]),
    lambda words: {"hybrid_override_pattern": _letters(words), "num_layers": words["layers"]},
)


def _megatron(*rows: Row, marks: Marks = ()) -> Dialect:
    return megatron(
        *rows,
        _PATTERN,
        *_ssm("mamba_state_dim", "mamba_num_groups"),
        Keys("ssm_heads", _megatron_heads, lambda heads: {"mamba_num_heads": heads}),
        marks=(
            *marks,
            *RMS,
            *centered(False),
            *UNGATED,
            *NO_SINKS,
            Mark("activation_func", "squared_relu", absent="gelu"),
            Mark("position_embedding_type", "none", absent="none"),
            Mark("qk_layernorm", False, absent=False),
        ),
        blocks=(Mark("hybrid_override_pattern", PRESENT),),
        fixed=_SHAPE,
    )


_EXPERTS = tuple(row for row in MEGATRON_EXPERTS if not isinstance(row, Together) or "ffn" not in row.words)
"""Without the rows that say which layers have some: the pattern does."""
MEGATRON = (_megatron(*_EXPERTS, marks=WITH_EXPERTS), _megatron())


# Hugging Face: a list of names in transformers 5, the pattern itself in the config that NVIDIA ships.


def _pattern(config: Config) -> Words:
    if names := config.get("layers_block_type"):
        return _said("".join(NAMED[name] for name in names))
    return _said(config["hybrid_override_pattern"])


def _to_pattern(words: Words) -> dict[str, Any]:
    letters = _letters(words)
    names = {letter: name for name, letter in reversed(NAMED.items())}
    return {
        "layers_block_type": [names.get(letter, letter) for letter in letters],
        "hybrid_override_pattern": letters,
        "num_hidden_layers": len(letters),
    }


_LAYERS = Together(("layers", "mixer", "ffn"), _pattern, _to_pattern)
_WIDTH = Key("intermediate", "intermediate_size", 21504, whole_number)
_QUERIES = Key("heads", "num_attention_heads", 32, whole_number)
_SIZES = huggingface_sizes(
    Key("eps", "layer_norm_epsilon", 1e-5, number),
    head_dim=Key("head_dim", "head_dim", 128, whole_number),
    positions=4096,
)


HUGGINGFACE = huggingface(
    "nemotron_h",
    "NemotronHForCausalLM",
    _WIDTH,
    _QUERIES,
    *without(_SIZES, (_LAYERS, _WIDTH, _QUERIES)),
    _LAYERS,
    Key("ssm_heads", "mamba_num_heads", 128, whole_number),
    *_ssm("ssm_state_size", "n_groups"),
    Key("ssm_kernel", "conv_kernel", 4, whole_number),
    Key("ssm_conv_bias", "use_conv_bias", True, flag),
    Key("ssm_bias", "use_bias", False, flag),
    Keys("ssm_eps", lambda config: number(config.get("layer_norm_epsilon", 1e-5)), lambda eps: {}),
    *biased("mlp_bias", "ffn_bias"),
    choice("activation", "mlp_hidden_act", {"relu2": "relu2", "silu": "silu"}, "relu2"),
    Key("experts", "n_routed_experts", 8, whole_number),
    Key("top_k", "num_experts_per_tok", 2, whole_number),
    Key("expert_intermediate", "moe_intermediate_size", 7688, whole_number),
    Key("shared_intermediate", "moe_shared_expert_intermediate_size", 7688, whole_number),
    expert_groups(best=2),
    Key("router_normalized", "norm_topk_prob", True, flag),
    Key("router_scale", "routed_scaling_factor", 1.0, number),
    marks=(
        Mark("moe_latent_size", None),
        Mark("mamba_hidden_act", "silu", absent="silu"),
        Mark("sliding_window", None),
        Mark("attention_bias", False, absent=False),
    ),
    fixed=_SHAPE | {"router_score": "sigmoid", "expert_bias": True},
)

_PROJECTED = ("attn.z.*", "attn.x.*", "attn.b.*", "attn.c.*", "attn.dt.*")
_CONVOLVED = ("attn.conv_x.*", "attn.conv_b.*", "attn.conv_c.*")
_MEGATRON_LAYER = "decoder.layers.{i}."
_MEGATRON_PIECES = {
    f"mixer.in_proj.*.{piece}": part for piece, part in zip(("z", "x", "B", "C", "dt"), _PROJECTED, strict=True)
} | {f"mixer.conv1d.*.{piece}": part for piece, part in zip(("x", "B", "C"), _CONVOLVED, strict=True)}
_MEGATRON_EXPERTS = {
    "mlp.shared_experts.linear_fc1.*": "ffn.shared.up.*",
    "mlp.experts.local_experts.{e}.linear_fc1.*": naming.EACH + "up.*",
    "mlp.experts.linear_fc1.*{e}": naming.EACH + "up.*",
}
"""The first linear of experts that have no gate."""
_HEADS = {"A_log": "attn.a_log", "D": "attn.d", "dt_bias": "attn.dt_bias", "norm.weight": "attn.norm.weight"}

_HUGGINGFACE_LAYER = "backbone.layers.{i}."
_HUGGINGFACE_HALVES = {
    "q_proj.*": "attn.q.*",
    "k_proj.*": "attn.k.*",
    "v_proj.*": "attn.v.*",
    "o_proj.*": "attn.o.*",
    "out_proj.*": "attn.out.*",
    "up_proj.*": "ffn.up.*",
    "down_proj.*": "ffn.down.*",
    **_HEADS,
    "gate.weight": "ffn.router.weight",
    "gate.e_score_correction_bias": "ffn.router.expert_bias",
    "experts.{e}.up_proj.*": naming.EACH + "up.*",
    "experts.{e}.down_proj.*": naming.EACH + "down.*",
    "shared_experts.up_proj.*": "ffn.shared.up.*",
    "shared_experts.down_proj.*": "ffn.shared.down.*",
}

COLUMNS = {
    "megatron": Column(
        rules=(
            *naming.MEGATRON,
            *naming.MEGATRON_EXPERTS,
            *naming.layer(_MEGATRON_LAYER, _MEGATRON_EXPERTS),
            *naming.layer(
                _MEGATRON_LAYER, {"mlp.experts.experts.linear_fc1.*": naming.EVERY + "up.*"}, layouts.EXPERTS
            ),
            *naming.rules({"decoder.final_norm.weight": "norm.weight"}),
            # Each by itself in a distributed checkpoint (MambaMixer.sharded_state_dict), else one below the other.
            *naming.layer(_MEGATRON_LAYER, _MEGATRON_PIECES),
            *naming.layer(_MEGATRON_LAYER, {"mixer.in_proj.*": _PROJECTED, "mixer.conv1d.*": _CONVOLVED}, STACKED),
            *naming.layer(_MEGATRON_LAYER, {f"mixer.{name}": part for name, part in _HEADS.items()}),
            *naming.layer(
                _MEGATRON_LAYER,
                {
                    "mixer.out_proj.*": "attn.out.*",
                    "mixer.in_proj.layer_norm_weight": "attn_norm.weight",
                    "norm.weight": "attn_norm.weight",
                },
            ),
        ),
        dialects=MEGATRON,
        tied_copy="output_layer.weight",
    ),
    "huggingface": Column(
        rules=(
            *naming.rules({"backbone.embeddings.weight": "embed.weight", "lm_head.weight": "head.weight"}, PADDED),
            *naming.rules({"backbone.norm_f.weight": "norm.weight"}),
            *naming.layer(_HUGGINGFACE_LAYER, {"norm.weight": "attn_norm.weight"}),
            *naming.layer(_HUGGINGFACE_LAYER, {"norm.weight": "ffn_norm.weight"}),
            *naming.layer(_HUGGINGFACE_LAYER + "mixer.", _HUGGINGFACE_HALVES),
            *naming.layer(_HUGGINGFACE_LAYER + "mixer.", {"in_proj.*": _PROJECTED, "conv1d.*": _CONVOLVED}, STACKED),
        ),
        dialects=(HUGGINGFACE,),
        tied_copy="lm_head.weight",
    ),
}
