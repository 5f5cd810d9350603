"""`io.json`: NeMo 2.0's record of how the model was built, in Fiddle's serialization. Read as data, nothing is built.

Objects refer to each other by key; classes are named in `pyref`s. Only arguments that were given are recorded, so the
defaults of NeMo's config classes stand in a table here, from nemo/collections/llm/gpt/model/{llama,mistral,qwen2}.py of
NeMo 2.4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.formats.structured import mapping

_LLAMA: Mapping[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": "silu",
    "gated_linear_unit": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "share_embeddings_and_output_weights": False,
    "seq_length": 4096,
    "layernorm_epsilon": 1e-5,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "make_vocab_size_divisible_by": 128,
}
_LLAMA3 = {**_LLAMA, "num_query_groups": 8, "rotary_base": 500_000, "seq_length": 8192}
_LLAMA31 = {
    **_LLAMA3,
    "scale_factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "old_context_len": 8192,
    "seq_length": 131072,
}
_SIZES = {
    "7B": {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 11008, "num_attention_heads": 32},
    "8B": {"num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336, "num_attention_heads": 32},
    "70B": {"num_layers": 80, "hidden_size": 8192, "ffn_hidden_size": 28672, "num_attention_heads": 64},
    "405B": {"num_layers": 126, "hidden_size": 16384, "ffn_hidden_size": 53248, "num_attention_heads": 128},
}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LlamaConfig": _LLAMA,
    "Llama2Config7B": {**_LLAMA, **_SIZES["7B"], "num_query_groups": 32},
    "Llama2Config70B": {**_LLAMA, **_SIZES["70B"], "num_query_groups": 8},
    "Llama3Config": _LLAMA3,
    "Llama3Config8B": {**_LLAMA3, **_SIZES["8B"]},
    "Llama3Config70B": {**_LLAMA3, **_SIZES["70B"]},
    "Llama31Config": _LLAMA31,
    "Llama31Config8B": {**_LLAMA31, **_SIZES["8B"]},
    "Llama31Config70B": {**_LLAMA31, **_SIZES["70B"]},
    "Llama31Config405B": {**_LLAMA31, **_SIZES["405B"]},
}


def model_config(path: Path) -> Mapping[str, Any]:
    """The arguments of the model's config object, over the defaults of its class."""
    data = mapping(path)
    objects = data.get("objects")
    if not isinstance(objects, Mapping):
        raise DamagedInput(f"{path.name} has no objects; give the architecture with --config FILE")
    root = _attributes(objects, data.get("root"))
    config = _attributes(objects, _attributes(objects, root.get("model")).get("config"))
    if not config:
        raise DamagedInput(f"{path.name} records no model.config; give the architecture with --config FILE")
    kind = str(config.pop(_CLASS, "of no class"))
    if kind not in _DEFAULTS:
        raise UnsupportedInput(
            f"{path.name} records a config {kind}, whose defaults are not known; give them with --config FILE"
        )
    return {**_DEFAULTS[kind], **{name: _value(value) for name, value in config.items()}}


def lora(path: Path) -> Mapping[str, Any]:
    """The arguments of the LoRA that the model was given; NeMo's own defaults are 32 and 32 (nemo/collections/llm/
    peft/lora.py). Empty where there is none."""
    data = mapping(path)
    objects = data.get("objects")
    if not isinstance(objects, Mapping):
        return {}
    model = _attributes(objects, _attributes(objects, data.get("root")).get("model"))
    config = _attributes(objects, model.get("model_transform"))
    if not config:
        return {}
    kind = config.pop(_CLASS, "of no class")
    return {"_target_": kind, "dim": 32, "alpha": 32, **{name: _value(value) for name, value in config.items()}}


_CLASS = "__fn_or_cls__"


def _attributes(objects: Mapping[str, Any], reference: Any) -> dict[str, Any]:
    """The named arguments of the object that a reference points to, and its class under `_CLASS`."""
    found = objects.get(str(reference.get("key"))) if isinstance(reference, Mapping) else None
    items = found.get("items") if isinstance(found, Mapping) else None
    named: dict[str, Any] = {}
    for item in items if isinstance(items, list) else ():
        if isinstance(item, list) and len(item) == 2 and (match := re.fullmatch(r"Attr\(name='(\w+)'\)", str(item[0]))):
            named[match[1]] = item[1]
    if isinstance(found, Mapping) and (metadata := found.get("metadata")) and "fn_or_cls" not in named:
        inner = _attributes(objects, metadata) if isinstance(metadata, Mapping) and "key" in metadata else {}
        if isinstance(kind := inner.get("fn_or_cls"), Mapping):
            named[_CLASS] = kind.get("name")
    return named


def _value(entry: Any) -> Any:
    """A leaf's value; a named function or dtype by its last word; anything deeper is no part of the architecture."""
    if not isinstance(entry, Mapping):
        return entry
    if entry.get("type") == "leaf":
        return entry.get("value")
    return entry.get("name") if entry.get("type") == "pyref" else None
