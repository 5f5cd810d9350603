"""Nemotron-H and Nemotron Nano v2: Mamba-2, attention without positions, and feed-forward, one of them a layer, by a
pattern.
"""

from __future__ import annotations

from typing import Any

from nemoport.exporters import naming
from nemoport.exporters.configs import (
    PRESENT,
    Config,
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
from nemoport.exporters.dialects.huggingface import huggingface, huggingface_sizes
from nemoport.exporters.dialects.megatron import RMS, UNGATED, centered, megatron
from nemoport.exporters.dialects.rows import biased, without
from nemoport.exporters.layouts import PADDED, STACKED
from nemoport.exporters.rules import Column
from nemoport.exporters.words import Words, by_layer, collapsed

_SHAPE = {"gated": False, "activation": "relu2"}
KINDS = {"M": ("mamba", None), "*": ("attention", None), "-": (None, "dense")}
"""Megatron-core's letters (ssm/mamba_hybrid_layer_allocation.py): what mixes and what feeds forward in such a layer."""
LETTERS = {halves: letter for letter, halves in KINDS.items()}
NAMED = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "mlp": "-"}
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


# Megatron-core's MambaModel. The convolution has 4 taps and a bias there, whatever the config.


def _megatron_heads(config: Config) -> int:
    """None said: twice the hidden size, in heads."""
    said = config.get("mamba_num_heads") or 2 * config["hidden_size"] // config.get("mamba_head_dim", 64)
    return whole_number(said)


MEGATRON = megatron(
    Together(
        ("layers", "mixer", "ffn"),
        lambda config: _said(config["hybrid_override_pattern"]),
        lambda words: {"hybrid_override_pattern": _letters(words), "num_layers": words["layers"]},
    ),
    *_ssm("mamba_state_dim", "mamba_num_groups"),
    Keys("ssm_heads", _megatron_heads, lambda heads: {"mamba_num_heads": heads}),
    marks=(
        *RMS,
        *centered(False),
        *UNGATED,
        Mark("activation_func", "squared_relu", absent="gelu"),
        Mark("position_embedding_type", "none", absent="none"),
        Mark("qk_layernorm", False, absent=False),
    ),
    blocks=(Mark("hybrid_override_pattern", PRESENT),),
    fixed=_SHAPE,
)


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
HUGGINGFACE = huggingface(
    "nemotron_h",
    "NemotronHForCausalLM",
    *without(
        huggingface_sizes(
            Key("eps", "layer_norm_epsilon", 1e-5, number),
            head_dim=Key("head_dim", "head_dim", 128, whole_number),
            positions=4096,
        ),
        (_LAYERS,),
    ),
    _LAYERS,
    Key("ssm_heads", "mamba_num_heads", 128, whole_number),
    *_ssm("ssm_state_size", "n_groups"),
    Key("ssm_kernel", "conv_kernel", 4, whole_number),
    Key("ssm_conv_bias", "use_conv_bias", True, flag),
    Key("ssm_bias", "use_bias", False, flag),
    *biased("attention_bias", "qkv_bias", "out_bias"),
    *biased("mlp_bias", "ffn_bias"),
    choice("activation", "mlp_hidden_act", {"relu2": "relu2", "silu": "silu"}, "relu2"),
    marks=(Mark("mamba_hidden_act", "silu", absent="silu"), Mark("sliding_window", None)),
    fixed=_SHAPE,
)

_PROJECTED = ("attn.z.*", "attn.x.*", "attn.b.*", "attn.c.*", "attn.dt.*")
_CONVOLVED = ("attn.conv_x.*", "attn.conv_b.*", "attn.conv_c.*")
_MEGATRON_LAYER = "decoder.layers.{i}."
_MEGATRON_PIECES = {
    f"mixer.in_proj.*.{piece}": part for piece, part in zip(("z", "x", "B", "C", "dt"), _PROJECTED, strict=True)
} | {f"mixer.conv1d.*.{piece}": part for piece, part in zip(("x", "B", "C"), _CONVOLVED, strict=True)}
_HEADS = {"A_log": "attn.a_log", "D": "attn.d", "dt_bias": "attn.dt_bias", "norm.weight": "attn.norm.weight"}

_HUGGINGFACE_LAYER = "backbone.layers.{i}."
_HUGGINGFACE_HALVES = {
    "q_proj.*": "attn.q.*",
    "k_proj.*": "attn.k.*",
    "v_proj.*": "attn.v.*",
    "o_proj.*": "attn.o.*",
    "out_proj.*": "attn.o.*",
    "up_proj.*": "ffn.up.*",
    "down_proj.*": "ffn.down.*",
    **_HEADS,
}

COLUMNS = {
    "megatron": Column(
        rules=(
            *naming.MEGATRON,
            *naming.rules({"decoder.final_norm.weight": "norm.weight"}),
            # Each by itself in a distributed checkpoint (MambaMixer.sharded_state_dict), else one below the other.
            *naming.layer(_MEGATRON_LAYER, _MEGATRON_PIECES),
            *naming.layer(_MEGATRON_LAYER, {"mixer.in_proj.*": _PROJECTED, "mixer.conv1d.*": _CONVOLVED}, STACKED),
            *naming.layer(_MEGATRON_LAYER, {f"mixer.{name}": part for name, part in _HEADS.items()}),
            *naming.layer(
                _MEGATRON_LAYER,
                {
                    "mixer.out_proj.*": "attn.o.*",
                    "mixer.in_proj.layer_norm_weight": "attn_norm.weight",
                    "norm.weight": "attn_norm.weight",
                },
            ),
        ),
        dialects=(MEGATRON,),
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
