"""Megatron's words: configs of its writers brought to Megatron-core's own, and what they store beside weights.

A Megatron config here is a flat mapping in the words of `TransformerConfig` and `GPTModel` (megatron/core/transformer/
transformer_config.py, models/gpt/gpt_model.py), as `--config` takes it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from nemoport.exporters.formats.unpickle import EnumValue, Name
from nemoport.exporters.tensor import LazyTensor, cut, squeeze

SKIPPED = {
    "extra state of Transformer Engine": "*._extra_state*",
    "optimizer state": "optimizer.*",
    "chained optimizer state": "chained_*.optimizer.*",
    "random number generators": "rng_state*",
    "rerun state": "rerun_state_machine_state*",
    "rotary frequencies": "*rotary_pos_emb.inv_freq",
}
"""What is no weight: the rule's name, and the names it skips."""

_PREFIXES = ("module.", "model.")
"""Left by wrappers (Float16Module, NeMo's MegatronParallel), in any number."""

_STACK = "decoder.layers."
_PARALLEL = {"tp": "tensor", "pp": "pipeline", "ep": "expert"}

_ARGUMENTS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "norm_epsilon": ("layernorm_epsilon", lambda value: value),
    "untie_embeddings_and_output_weights": ("share_embeddings_and_output_weights", lambda value: not value),
    "swiglu": ("gated_linear_unit", lambda value: value),
    "max_position_embeddings": ("max_sequence_length", lambda value: value),
    "use_rope_scaling": ("rope_scaling", lambda value: value),
    "apply_layernorm_1p": ("layernorm_zero_centered_gamma", lambda value: value),
    "num_experts": ("num_moe_experts", lambda value: value),
    "rotary_seq_len_interpolation_factor": ("seq_len_interpolation_factor", lambda value: value),
}
"""Megatron-LM's argument -> Megatron-core's word (megatron/training/arguments.py)."""


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


def words_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A NeMo 2.0 or Megatron-Bridge model config, as its YAML shows it, in Megatron-core's words."""
    words = {key: plain(value) for key, value in config.items() if not key.startswith("_")}
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
    skipped = {name: rule for name in objects if (rule := _skipped_by(name))}
    unnamed = {name: "pickled object" for name in objects if name not in skipped}
    kept: dict[str, LazyTensor] = {}
    for name, tensor in stored.items():
        if rule := _skipped_by(name):
            skipped[name] = rule
            continue
        bare = _bare(name)
        place = bare.removeprefix(_STACK)
        if place != bare and not place.partition(".")[0].isdecimal():
            for layer in range(tensor.shape[0] if tensor.shape else 0):
                kept[f"{_STACK}{layer}.{place}"] = squeeze(cut(tensor, 0, layer, layer + 1))
        else:
            kept[bare] = tensor
    return kept, skipped | unnamed


def _skipped_by(name: str) -> str | None:
    bare = _bare(name)
    return next((rule for rule, pattern in SKIPPED.items() if fnmatch.fnmatchcase(bare, pattern)), None)


def _bare(name: str) -> str:
    while any(name.startswith(prefix) for prefix in _PREFIXES):
        name = name.partition(".")[2]
    return name
