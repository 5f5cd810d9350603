"""Megatron's words: configs of its writers brought to Megatron-core's own, and what they store beside weights.

A Megatron config here is a flat mapping in the words of `TransformerConfig` and `GPTModel` (megatron/core/transformer/
transformer_config.py, models/gpt/gpt_model.py), as `--config` takes it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.exporters.configs import MOST_LAYERS
from nemoport.exporters.formats.unpickle import EnumValue, Name
from nemoport.exporters.tensor import LazyTensor, unstacked

MASTERS = "float32 weights of the optimizer"
SKIPPED = {
    "extra state of Transformer Engine": "*._extra_state*",
    MASTERS: "*optimizer.state.fp32_param.*",
    "optimizer state": "optimizer.*",
    "chained optimizer state": "chained_*.optimizer.*",
    "random number generators": "rng_state*",
    "rerun state": "rerun_state_machine_state*",
    "rotary frequencies": "*rotary_pos_emb.inv_freq",
    "multi-token prediction": "mtp.*",
}
"""What is no weight: the rule's name, and the names it skips."""

_PREFIXES = ("module.", "model.")
"""Left by wrappers (Float16Module, NeMo's MegatronParallel), in any number."""

_STACK = "decoder.layers."
_MASTER = "optimizer.state.fp32_param."
_PARALLEL = {"tp": "tensor", "pp": "pipeline", "ep": "expert"}

_ARGUMENTS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "norm_epsilon": ("layernorm_epsilon", lambda value: value),
    "untie_embeddings_and_output_weights": ("share_embeddings_and_output_weights", lambda value: not value),
    "swiglu": ("gated_linear_unit", lambda value: value),
    "max_position_embeddings": ("max_sequence_length", lambda value: value),
    "use_rope_scaling": ("rope_scaling", lambda value: value),
    "apply_layernorm_1p": ("layernorm_zero_centered_gamma", lambda value: value),
    "num_experts": ("num_moe_experts", lambda value: value),
    "bias_gelu_fusion": ("bias_activation_fusion", lambda value: value),
    "rotary_seq_len_interpolation_factor": ("seq_len_interpolation_factor", lambda value: value),
}
"""Megatron-LM's argument -> Megatron-core's word (megatron/training/arguments.py)."""


_YAML: Mapping[str, tuple[str, Any]] = {
    "rotary_percentage": ("rotary_percent", 1.0),
    "encoder_seq_length": ("max_sequence_length", None),
    "override_vocab_size": ("vocab_size", None),
    "bias": ("add_bias_linear", True),
    "qkv_bias": ("add_qkv_bias", False),
    "share_embeddings_and_output_weights": ("share_embeddings_and_output_weights", True),
    "position_embedding_type": ("position_embedding_type", "learned_absolute"),
    "bias_activation_fusion": ("bias_activation_fusion", True),
}
"""NeMo 1.0's word -> Megatron-core's, and what NeMo takes an absent one for (megatron_gpt_model.py). The others are
the same in both, and mean the same when absent."""
_NORMS: Mapping[Any, tuple[str, bool]] = {
    "rmsnorm": ("RMSNorm", False),
    "layernorm": ("LayerNorm", False),
    "low_precision_layernorm": ("LayerNorm", False),
    "layernorm1p": ("LayerNorm", True),
}
"""NeMo 1.0's normalization -> Megatron-core's, and whether its weights are stored less one."""
_ACTIVATIONS: Mapping[Any, tuple[str, bool]] = {
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "reglu": ("relu", True),
    "squared-relu": ("squared_relu", False),
}
"""NeMo 1.0's activation, `fast-` or not -> Megatron-core's, and whether it is gated."""
_NEMO_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
"""What `scale_positional_embedding` means: Llama 3.1's numbers are constants of NeMo 1.0, the factor 8 mostly is."""


def words_of_yaml(config: Mapping[str, Any]) -> dict[str, Any]:
    """NeMo 1.0's `model_config.yaml` in Megatron-core's words."""
    words = dict(config)
    for key, (word, absent) in _YAML.items():
        value = words.pop(key, None)
        words[word] = absent if value is None else value
    norm = str(words.get("normalization") or "layernorm").lower()
    words["normalization"], centered = _NORMS.get(norm, (norm, False))
    words["layernorm_zero_centered_gamma"] = words.get("layernorm_zero_centered_gamma") or centered
    activation = str(words.pop("activation", None) or "gelu").removeprefix("fast-")
    if activation == "gelu" and words.get("openai_gelu"):
        activation = "openai_gelu"
    words["activation_func"], words["gated_linear_unit"] = _ACTIVATIONS.get(activation, (activation, False))
    if words.get("scale_positional_embedding"):
        words |= {"scale_factor": words.get("scale_factor") or 8.0} | _NEMO_ROPE
    if words["max_sequence_length"] is None:
        words["max_sequence_length"] = words.get("max_position_embeddings")
    return words


def words_of_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron-LM's `args` in Megatron-core's words."""
    words = {key: plain(value) for key, value in arguments.items()}
    for argument, (word, convert) in _ARGUMENTS.items():
        if argument in words:
            words[word] = convert(words[argument])
    words["activation_func"] = next(
        (name for flag, name in (("swiglu", "silu"), ("squared_relu", "squared_relu")) if words.get(flag)), "gelu"
    )
    if not words.get("group_query_attention"):  # num_query_groups is 1 then, and means nothing
        words["num_query_groups"] = words.get("num_attention_heads")
    return words


SEES_BOTH_WAYS = "get_nv_embedding_layer_spec"
"""The function by which NeMo's embedding models and rerankers make layers without a causal mask."""


def words_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A NeMo 2.0 or Megatron-Bridge model config, as its YAML shows it, in Megatron-core's words."""
    words = {key: plain(value) for key, value in config.items() if not key.startswith("_")}
    if words.get("transformer_layer_spec") == SEES_BOTH_WAYS:
        words["attn_mask_type"] = "padding"
    return words | {"max_sequence_length": words.get("seq_length")}


def plain(value: Any) -> Any:
    """A value without its class: `{_target_: torch.nn.functional.silu}` is "silu", torch.bfloat16 is "bfloat16"."""
    if isinstance(value, Mapping) and isinstance(target := value.get("_target_"), str):
        return None if value.get("_call_") else target.rpartition(".")[2]
    if isinstance(value, Name):
        return value.name
    if isinstance(value, EnumValue):
        return value.args[0] if value.args else None
    return value


def trained(words: Mapping[str, Any]) -> dict[str, int]:
    """The parallel layout of the training run, as far as the config tells."""
    sizes = {short: words.get(f"{name}_model_parallel_size") for short, name in _PARALLEL.items()}
    return {short: size for short, size in sizes.items() if isinstance(size, int)}


def weights(stored: Mapping[str, LazyTensor], objects: Iterable[str]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors under Megatron-core's names, stacked layers taken apart; and what is skipped, by which rule."""
    skipped = {name: rule for name in objects if (rule := skipped_by(name))}
    unnamed = {name: "pickled object" for name in objects if name not in skipped}
    kept: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        if rule := skipped_by(name):
            skipped[name] = rule
        else:
            kept |= _layers(bare(name), tensor)
    return kept, skipped | unnamed


def masters(stored: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The optimizer's float32 copies, under the names of the weights that they are the masters of."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        if skipped_by(name) == MASTERS:
            found |= _layers(bare(name.partition(_MASTER)[2]), tensor)
    return found


def _layers(name: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
    """A stack of layers taken apart; any other tensor as it is."""
    place = name.removeprefix(_STACK)
    if place == name or place.partition(".")[0].isdecimal():
        return {name: tensor}
    if not tensor.shape or not 0 < tensor.shape[0] <= MOST_LAYERS:
        raise DamagedInput(f"{name} has shape {list(tensor.shape)}, its first axis should be the layers")
    return {f"{_STACK}{layer}.{place}": one for layer, one in enumerate(unstacked(tensor))}


def skipped_by(name: str) -> str | None:
    """The rule that skips a stored thing, if one does."""
    """The rule that skips a name, if one does."""
    place = bare(name)
    return next((rule for rule, pattern in SKIPPED.items() if fnmatch.fnmatchcase(place, pattern)), None)


def bare(name: str) -> str:
    """A name without what wrappers put before it."""
    while any(name.startswith(prefix) for prefix in _PREFIXES):
        name = name.partition(".")[2]
    return name
