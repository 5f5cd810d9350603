"""The `config.json` of a TensorRT-LLM checkpoint, in TensorRT-LLM's words, as a spec and a plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput, UsageError
from nemoport.spec import (
    DTYPES,
    Attention,
    Block,
    Dense,
    LanguageModel,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    Norm,
    Plan,
    Rope,
    check_divisible,
)

FAMILIES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral", "Qwen2ForCausalLM": "qwen2"}

SAID = {"hidden_act": "silu", "position_embedding_type": "rope_gpt_neox"}
"""Keys of config.json that must have these values."""

SAID_OR_ABSENT = {
    "qk_layernorm": False,
    "residual_mlp": False,
    "lm_head_bias": False,
    "fc_after_embed": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "layer_idx_offset": 0,
}
"""Keys with these defaults, and no other value that runs here."""


def read(path: Path, window: int | None) -> tuple[ModelSpec, Plan, int | None]:
    """The model, its cut, and the axis along which the embedding is cut over the tp ranks (None: each has it whole)."""
    if not path.is_file():
        raise UnsupportedInput(f"{path.parent} is no TensorRT-LLM checkpoint: it has no {path.name}")
    try:
        config = json.loads(path.read_bytes())
        _refuse_unknown(config, path)
        spec, plan = _spec(config, window), _plan(config)
        check_divisible(spec, plan)
    except KeyError as error:
        raise DamagedInput(f"{path} does not say {error}; convert again") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError, UsageError) as error:
        raise DamagedInput(f"{path}: {error}; convert again") from error
    if (axis := config.get("embedding_sharding_dim", 0)) not in (0, 1):
        raise DamagedInput(f"{path} has embedding_sharding_dim {axis}, 0 or 1 needed; convert again")
    axis = axis if config.get("use_parallel_embedding", False) else None
    if spec.head.tied and plan.tp > 1 and axis != 0:
        raise UnsupportedInput(
            f"{path} shares the embedding table over tp={plan.tp}, which needs use_parallel_embedding "
            f"and embedding_sharding_dim 0; convert with an output matrix of its own"
        )
    if axis == 1 and spec.hidden_size % plan.tp:
        raise DamagedInput(f"{path}: hidden size {spec.hidden_size} does not divide over tp={plan.tp}; convert again")
    return spec, plan, axis if plan.tp > 1 else None


def _refuse_unknown(config: Mapping[str, Any], path: Path) -> None:
    if config["architecture"] not in FAMILIES:
        raise UnsupportedInput(
            f"{path} is a {config['architecture']}; the reference runs ranks of {', '.join(FAMILIES)}"
        )
    quantization = config.get("quantization") or {}
    for key in ("quant_algo", "kv_cache_quant_algo"):
        if quantization.get(key):
            raise UnsupportedInput(f"{path} has {key} {quantization[key]}; the reference runs ranks without one")
    if (config.get("moe") or {}).get("num_experts"):
        raise UnsupportedInput(f"{path} has experts; the reference runs ranks of dense models")
    if config.get("mapping", {}).get("cp_size", 1) != 1:
        raise UnsupportedInput(f"{path} has cp_size {config['mapping']['cp_size']}; the reference runs cp_size 1")
    for key, value in {**SAID, **SAID_OR_ABSENT}.items():
        if (found := config[key] if key in SAID else config.get(key, value)) != value:
            raise UnsupportedInput(f"{path} has {key} {found!r}; the reference runs {value!r}")
    if config["dtype"] not in DTYPES:
        raise UnsupportedInput(f"{path} has dtype {config['dtype']}; the reference runs {', '.join(DTYPES)}")
    if config.get("share_embedding_table", False) and config["mapping"]["pp_size"] > 1:
        raise UnsupportedInput(f"{path} shares the embedding table over pipeline stages, which TensorRT-LLM refuses")


def _spec(config: Mapping[str, Any], window: int | None) -> ModelSpec:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_size") or hidden // heads
    qwen = config["architecture"] == "Qwen2ForCausalLM"
    biased = config.get("attn_bias", qwen)
    dims = config.get("rotary_embedding_dim") or int(head_dim * config.get("rotary_pct", 1.0))
    if config["num_hidden_layers"] < 1:
        raise ValueError("a model without layers")
    if dims % 2 or not 0 < dims <= head_dim:
        raise ValueError(f"rotary_embedding_dim {dims} does not fit into a head_size of {head_dim}")
    attention = Attention(
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope=Rope(
            dims=dims,
            base=config.get("rotary_base", 10000.0),
            scaling=_scaling(config.get("rotary_scaling")),
        ),
        window=window,
        qkv_bias=biased,
        out_bias=biased and not qwen,
    )
    ffn = Dense(intermediate=config["intermediate_size"], bias=config.get("mlp_bias", False))
    return ModelSpec(
        family=FAMILIES[config["architecture"]],
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        max_positions=config["max_position_embeddings"],
        norm=Norm(kind="rms", eps=config["norm_epsilon"]),
        head=LanguageModel(tied=config.get("share_embedding_table", False)),
        blocks=(Block(mixer=attention, ffn=ffn),) * config["num_hidden_layers"],
    )


def _scaling(words: Mapping[str, Any] | None) -> LinearScaling | Llama3Scaling | None:
    if words is None:
        return None
    match words.get("rope_type", words.get("type")):
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=words["factor"])
        case "llama3":
            return Llama3Scaling(
                factor=words["factor"],
                low_freq_factor=words["low_freq_factor"],
                high_freq_factor=words["high_freq_factor"],
                original_max_positions=words["original_max_position_embeddings"],
            )
        case other:
            raise UnsupportedInput(f"rotary_scaling is of type {other}; the reference runs linear and llama3")


def _plan(config: Mapping[str, Any]) -> Plan:
    mapping = config["mapping"]
    plan = Plan(tp=mapping["tp_size"], pp=mapping["pp_size"], dtype=config["dtype"])
    if plan.tp < 1 or plan.pp < 1 or mapping["world_size"] != plan.world:
        raise ValueError(f"world_size {mapping['world_size']} is not tp_size {plan.tp} times pp_size {plan.pp}")
    return plan
