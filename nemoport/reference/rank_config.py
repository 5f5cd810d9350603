"""The `config.json` of a TensorRT-LLM checkpoint, in TensorRT-LLM's words, as a spec and a plan."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput, UsageError
from nemoport.spec import (
    DTYPES,
    Activation,
    Attention,
    Block,
    Dense,
    LanguageModel,
    LinearScaling,
    Llama3Scaling,
    Mixture,
    ModelSpec,
    Norm,
    NormKind,
    Plan,
    Rope,
    Router,
    check_divisible,
)

Config = Mapping[str, Any]
Windows = int | Sequence[int] | None
"""`max_attention_window`: one for all layers, or several that they take in turns."""

GELU: dict[str, Activation] = dict.fromkeys(("gelu", "gelu_new", "gelu_pytorch_tanh"), "gelu_tanh")
"""TensorRT-LLM has one GELU, the approximation (functional.py), under all these names."""

LEARNED, ROTARY = "learned_absolute", "rope_gpt_neox"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What TensorRT-LLM's class of this name builds, as far as config.json does not say it."""

    family: str
    norm: NormKind
    """Of weights that hold the whole factor: those of LayerNorm1p and Gemma come with one added."""
    activations: Mapping[str, Activation]
    gated: bool
    biases: Callable[[Config], tuple[bool, bool, bool]]
    """Of q, k, v; of the output projection; of the feed-forward."""
    positions: tuple[str, ...] = (ROTARY,)
    demands: Mapping[str, Any] | None = None
    """Keys with these defaults, and no other value that runs here."""
    scales_embedding: bool = False
    post_norms: bool = False
    experts: bool = False
    """In the place of the feed-forward."""


def _llama(config: Config) -> tuple[bool, bool, bool]:
    biased = config.get("attn_bias", False)
    return biased, biased, config.get("mlp_bias", False)


def _qwen(config: Config) -> tuple[bool, bool, bool]:
    return config.get("attn_bias", True), False, config.get("mlp_bias", False)


def _gpt(config: Config) -> tuple[bool, bool, bool]:
    return (config.get("bias", True),) * 3


_SILU: dict[str, Activation] = {"silu": "silu"}
_OF_GPT = {
    "q_scaling": 1,
    "embedding_scale": None,
    "apply_query_key_layer_scaling": False,
    "inner_layernorm": False,
    "norm_before_bmm1": False,
}


def _of_llama(family: str, biases: Callable[[Config], tuple[bool, bool, bool]] = _llama) -> Architecture:
    return Architecture(family=family, norm="rms", activations=_SILU, gated=True, biases=biases)


def _of_gpt(family: str, activations: Mapping[str, Activation]) -> Architecture:
    return Architecture(
        family=family,
        norm="layer",
        activations=activations,
        gated=False,
        biases=_gpt,
        positions=(LEARNED, ROTARY),
        demands=_OF_GPT,
    )


def _of_gemma(post_norms: bool) -> Architecture:
    return Architecture(
        family="gemma",
        norm="rms",
        activations=GELU,
        gated=True,
        biases=_llama,
        scales_embedding=True,
        post_norms=post_norms,
        demands={"share_embedding_table": True, "inter_layernorms": post_norms},
    )


_GPT_ACTIVATIONS: Mapping[str, Activation] = {**GELU, "squared-relu": "relu2"}
ARCHITECTURES = {
    "LlamaForCausalLM": _of_llama("llama"),
    "MistralForCausalLM": _of_llama("mistral"),
    "MixtralForCausalLM": replace(_of_llama("mixtral"), activations={"swiglu": "silu"}, experts=True),
    "Qwen2ForCausalLM": _of_llama("qwen2", _qwen),
    "GPT2LMHeadModel": _of_gpt("gpt", _GPT_ACTIVATIONS),
    "GPTForCausalLM": _of_gpt("gpt", _GPT_ACTIVATIONS),
    "NemotronForCausalLM": _of_gpt("nemotron", _GPT_ACTIVATIONS),
    "Starcoder2ForCausalLM": _of_gpt("starcoder2", _GPT_ACTIVATIONS),
    "GemmaForCausalLM": _of_gemma(False),
    "Gemma2ForCausalLM": _of_gemma(True),
}

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


def read(path: Path, windows: Windows) -> tuple[ModelSpec, Plan, int | None]:
    """The model, its cut, and the axis along which the embedding is cut over the tp ranks (None: each has it whole)."""
    if not path.is_file():
        raise UnsupportedInput(f"{path.parent} is no TensorRT-LLM checkpoint: it has no {path.name}")
    try:
        config = json.loads(path.read_bytes())
        _refuse_unknown(config, path)
        spec, plan = _spec(config, windows), _plan(config)
        check_divisible(spec, plan)
    except KeyError as error:
        raise DamagedInput(f"{path} does not say {error}; convert again") from error
    except (ValueError, TypeError, AttributeError, ArithmeticError, UsageError) as error:
        raise DamagedInput(f"{path}: {error}; convert again") from error
    if (axis := config.get("embedding_sharding_dim", 0)) not in (0, 1):
        raise DamagedInput(f"{path} has embedding_sharding_dim {axis}, 0 or 1 needed; convert again")
    axis = axis if config.get("use_parallel_embedding", False) else None
    if spec.language_model.tied and plan.tp > 1 and axis != 0:
        raise UnsupportedInput(
            f"{path} shares the embedding table over tp={plan.tp}, which needs use_parallel_embedding "
            f"and embedding_sharding_dim 0; convert with an output matrix of its own"
        )
    if axis == 1 and spec.hidden_size % plan.tp:
        raise DamagedInput(f"{path}: hidden size {spec.hidden_size} does not divide over tp={plan.tp}; convert again")
    return spec, plan, axis if plan.tp > 1 else None


def _refuse_unknown(config: Config, path: Path) -> None:
    if (architecture := ARCHITECTURES.get(config["architecture"])) is None:
        raise UnsupportedInput(
            f"{path} is a {config['architecture']}; the reference runs ranks of {', '.join(ARCHITECTURES)}"
        )
    quantization = config.get("quantization") or {}
    for key in ("quant_algo", "kv_cache_quant_algo"):
        if quantization.get(key):
            raise UnsupportedInput(f"{path} has {key} {quantization[key]}; the reference runs ranks without one")
    if bool((config.get("moe") or {}).get("num_experts")) != architecture.experts:
        has, other = ("no experts", "with") if architecture.experts else ("experts", "without")
        raise UnsupportedInput(f"{path} has {has}; the reference runs ranks of a {config['architecture']} {other} them")
    if config.get("mapping", {}).get("cp_size", 1) != 1:
        raise UnsupportedInput(f"{path} has cp_size {config['mapping']['cp_size']}; the reference runs cp_size 1")
    known = {"hidden_act": architecture.activations, "position_embedding_type": architecture.positions}
    for key, values in known.items():
        if config[key] not in values:
            raise UnsupportedInput(f"{path} has {key} {config[key]!r}; the reference runs {', '.join(values)}")
    for key, value in {**SAID_OR_ABSENT, **(architecture.demands or {})}.items():
        if (found := config.get(key, value)) != value:
            raise UnsupportedInput(f"{path} has {key} {found!r}; the reference runs {value!r}")
    if config["dtype"] not in DTYPES:
        raise UnsupportedInput(f"{path} has dtype {config['dtype']}; the reference runs {', '.join(DTYPES)}")
    if config.get("share_embedding_table", False) and config["mapping"]["pp_size"] > 1:
        raise UnsupportedInput(f"{path} shares the embedding table over pipeline stages, which TensorRT-LLM refuses")


def _spec(config: Config, windows: Windows) -> ModelSpec:
    architecture = ARCHITECTURES[config["architecture"]]
    heads, hidden, layers = config["num_attention_heads"], config["hidden_size"], config["num_hidden_layers"]
    head_dim = config.get("head_size") or hidden // heads
    qkv_bias, out_bias, ffn_bias = architecture.biases(config)
    if layers < 1:
        raise ValueError("a model without layers")
    scalar = config.get("query_pre_attn_scalar")
    attention = Attention(
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        rope=_rope(config, head_dim) if config["position_embedding_type"] == ROTARY else None,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        scale=1 / math.sqrt(scalar) if scalar else None,
        softcap=config.get("attn_logit_softcapping"),
    )
    dense = Dense(
        intermediate=config.get("intermediate_size") or 4 * hidden,
        activation=architecture.activations[config["hidden_act"]],
        gated=architecture.gated,
        bias=ffn_bias,
    )
    ffn = _mixture(config["moe"], dense) if architecture.experts else dense
    each = (windows,) if windows is None or isinstance(windows, int) else windows
    return ModelSpec(
        family=architecture.family,
        vocab_size=config["vocab_size"],
        hidden_size=hidden,
        max_positions=config["max_position_embeddings"],
        norm=Norm(kind=architecture.norm, eps=config["norm_epsilon"]),
        head=LanguageModel(
            tied=config.get("share_embedding_table", False), softcap=config.get("final_logit_softcapping")
        ),
        blocks=tuple(
            Block(mixer=replace(attention, window=each[layer % len(each)]), ffn=ffn, post_norms=architecture.post_norms)
            for layer in range(layers)
        ),
        embedding_scale=math.sqrt(hidden) if architecture.scales_embedding else None,
        learned_positions=config["position_embedding_type"] == LEARNED,
    )


def _mixture(moe: Config, expert: Dense) -> Mixture:
    """`normalization_mode` 0 takes the softmax over all experts as it is, 1 divides by the sum of the chosen ones
    (layers/moe.py of tensorrt_llm 0.16, MoeConfig.ExpertScaleNormalizationMode)."""
    if (mode := moe["normalization_mode"]) not in (0, 1):
        raise UnsupportedInput(f"moe has normalization_mode {mode}; the reference runs 0 and 1")
    if moe.get("shared_expert_intermediate_size"):
        raise UnsupportedInput("moe has a shared expert; the reference runs ranks without one")
    router = Router(top_k=moe["top_k"], normalized=mode == 1)
    return Mixture(experts=moe["num_experts"], expert=expert, router=router)


def _rope(config: Config, head_dim: int) -> Rope:
    """GPT's classes turn `rotary_pct` of each head, whatever `rotary_embedding_dim` says; others have no such key."""
    dims = config.get("rotary_embedding_dim") or head_dim
    if "rotary_pct" in config:
        dims = int(head_dim * config["rotary_pct"])
    if dims % 2 or not 0 < dims <= head_dim:
        raise ValueError(f"rotary_embedding_dim {dims} does not fit into a head_size of {head_dim}")
    return Rope(dims=dims, base=config.get("rotary_base", 10000.0), scaling=_scaling(config.get("rotary_scaling")))


def _scaling(words: Config | None) -> LinearScaling | Llama3Scaling | None:
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


def _plan(config: Config) -> Plan:
    mapping = config["mapping"]
    ep = mapping.get("moe_ep_size", 1)
    plan = Plan(tp=mapping["tp_size"], pp=mapping["pp_size"], ep=max(ep, 1), dtype=config["dtype"])
    if plan.tp < 1 or plan.pp < 1 or mapping["world_size"] != plan.world:
        raise ValueError(f"world_size {mapping['world_size']} is not tp_size {plan.tp} times pp_size {plan.pp}")
    if ep > 1 and mapping["moe_tp_size"] * ep != plan.tp:
        raise ValueError(f"moe_tp_size {mapping['moe_tp_size']} times moe_ep_size {ep} is not tp_size {plan.tp}")
    return plan
