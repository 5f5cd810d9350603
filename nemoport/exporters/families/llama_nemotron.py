"""Llama-Nemotron (Super, Ultra): Llama whose blocks differ, in KV heads, in feed-forward size, and in what is skipped.

The blocks were chosen by a search (arXiv:2411.19146), and both worlds list them one by one as `block_configs`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nemoport.errors import UnsupportedInput
from nemoport.exporters import naming
from nemoport.exporters.configs import PRESENT, Config, Mark, Together, whole_number
from nemoport.exporters.dialects.huggingface import HUGGINGFACE_ROPE, RMS_EPS, huggingface, huggingface_sizes
from nemoport.exporters.dialects.megatron import (
    GATED,
    MEGATRON_ROPE,
    MEGATRON_SCALE,
    RMS,
    ROTARY,
    WHOLE_HEADS,
    centered,
    megatron,
)
from nemoport.exporters.dialects.rows import biased, without
from nemoport.exporters.rules import Column
from nemoport.exporters.words import Words, by_layer, collapsed, collapsed_present

_WORDS = ("mixer", "ffn", "kv_heads", "intermediate")
_MULTIPLE = 256
_JSON = "heterogeneous_layers_config_encoded_json"


def _words(blocks: list[Mapping[str, Any]], count: int, heads: int, hidden: int) -> Words:
    if len(blocks) != count:
        raise ValueError(f"{len(blocks)} blocks in {count} layers")
    kv_heads = [_kv_heads(_half(block, "attention"), heads) for block in blocks]
    widths = [_intermediate(_half(block, "ffn", "mlp"), hidden) for block in blocks]
    return {
        "mixer": collapsed(["attention" if each else None for each in kv_heads]),
        "ffn": collapsed(["dense" if each else None for each in widths]),
        "kv_heads": collapsed_present(kv_heads),
        "intermediate": collapsed_present(widths),
    }


def _half(block: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    half: Mapping[str, Any] = block[next((name for name in names if block.get(name)), names[0])]
    for key in ("replace_with_linear", "window_length", "num_sink_tokens"):
        if half.get(key):
            raise UnsupportedInput(f"a block of the config has {key} {half[key]!r}, which nemoport does not know")
    return half


def _kv_heads(attention: Mapping[str, Any], heads: int) -> int | None:
    if attention.get("no_op"):
        return None
    if groups := attention.get("num_query_groups"):
        return whole_number(groups)
    return whole_number(heads / whole_number(attention["n_heads_in_group"]))


def _intermediate(ffn: Mapping[str, Any], hidden: int) -> int | None:
    if ffn.get("no_op"):
        return None
    if width := ffn.get("ffn_hidden_size"):
        return whole_number(width)
    least = int(2 * ffn["ffn_mult"] * hidden / 3)
    return whole_number(-(-least // _MULTIPLE) * _MULTIPLE)


def _blocks(words: Words) -> list[dict[str, Any]]:
    heads, hidden = words["heads"], words["hidden_size"]
    each = zip(*(by_layer(words, word) for word in _WORDS), strict=True)
    return [
        {
            "attention": {
                "n_heads_in_group": heads // kv_heads if mixer else None,
                "no_op": mixer is None,
                "replace_with_linear": False,
            },
            "ffn": {
                "ffn_mult": 3 * intermediate / (2 * hidden) if ffn else None,
                "no_op": ffn is None,
                "replace_with_linear": False,
            },
        }
        for mixer, ffn, kv_heads, intermediate in each
    ]


def _of_megatron(config: Config) -> Words:
    blocks = json.loads(config[_JSON])["block_configs"]
    sizes = (whole_number(config[key]) for key in ("num_layers", "num_attention_heads", "hidden_size"))
    return _words(blocks, *sizes)


def _to_megatron(words: Words) -> dict[str, Any]:
    """With exact widths, which other writers give as multiples of the hidden size."""
    blocks = _blocks(words)
    for block, width in zip(blocks, by_layer(words, "intermediate"), strict=True):
        block["ffn"] |= {"ffn_hidden_size": width}
    return {_JSON: json.dumps({"block_configs": blocks})}


MEGATRON = megatron(
    *MEGATRON_ROPE,
    *MEGATRON_SCALE,
    Together(_WORDS, _of_megatron, _to_megatron),
    marks=(
        *RMS,
        *GATED,
        Mark("activation_func", "silu", absent="gelu"),
        *ROTARY,
        *WHOLE_HEADS,
        *centered(False),
        Mark("window_size", None),
        Mark("qk_layernorm", False, absent=False),
    ),
    blocks=(Mark(_JSON, PRESENT),),
    fixed={},
)


def _of_huggingface(config: Config) -> Words:
    sizes = (whole_number(config[key]) for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    return _words(config["block_configs"], *sizes)


_BLOCKS = Together(_WORDS, _of_huggingface, lambda words: {"block_configs": _blocks(words)})
HUGGINGFACE = huggingface(
    "nemotron-nas",
    "DeciLMForCausalLM",
    *without(huggingface_sizes(RMS_EPS), (_BLOCKS,)),
    _BLOCKS,
    *HUGGINGFACE_ROPE,
    *biased("attention_bias", "qkv_bias", "out_bias"),
    *biased("mlp_bias", "ffn_bias"),
    marks=(Mark("hidden_act", "silu", absent="silu"),),
    constants={"num_key_value_heads": None, "intermediate_size": None},
)

COLUMNS = {
    "megatron": Column(rules=naming.MEGATRON_GATED, dialects=(MEGATRON,), tied_copy="output_layer.weight"),
    "huggingface": Column(
        rules=naming.HUGGINGFACE,
        dialects=(HUGGINGFACE,),
        tied_copy="lm_head.weight",
        loads=("vLLM", "TensorRT-LLM 1.0 or later (PyTorch backend)", "transformers with the model's own code"),
    ),
}
