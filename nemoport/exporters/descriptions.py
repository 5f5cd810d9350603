"""What lies beside quantized weights and says how they were quantized, by dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemoport import plugins
from nemoport.artifact import json_bytes
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.dialects import compressed_tensors, modelopt
from nemoport.exporters.encoding import Encoded, Encoding
from nemoport.exporters.rules import bindings
from nemoport.exporters.source import FAMILIES
from nemoport.exporters.tensor import LazyTensor
from nemoport.spec import LanguageModel
from nemoport.spec import tensors as specs_of

DESCRIPTION = "hf_quant_config.json"
Described = tuple[Mapping[str, Any], Mapping[str, bytes]]
"""`quantization_config` of config.json, and files."""


def described(
    dialect: str, algorithm: str, encoding: Encoding, kv_cache: str | None, excluded: Sequence[str]
) -> Described:
    """`algorithm` is ModelOpt's word."""
    if dialect == compressed_tensors.NAME:
        return compressed_tensors.quantization_config(encoding, kv_cache, excluded), {}
    said = modelopt.description(algorithm, encoding, kv_cache, excluded)
    return modelopt.quantization_config(algorithm, kv_cache, excluded), {DESCRIPTION: json_bytes(said)}


def left_plain(model: Model, tensors: Mapping[str, LazyTensor]) -> list[str]:
    """What a description lists as not quantized, in Hugging Face's names: the ends, and plain matrices of layers."""
    writes = isinstance(model.spec.head, LanguageModel)
    specs, found = specs_of(model.spec), set(modelopt.ALWAYS_EXCLUDED if writes else ())
    column = plugins.load(FAMILIES, model.spec.family).COLUMNS.get("huggingface")
    for binding in bindings(column.rules, specs) if column else ():
        for part in binding.parts:
            spec = specs[part.name]
            plain = part.name.startswith("layers.") and part.name.endswith(".weight") and len(spec.axes) == 2
            if plain and not isinstance(tensors[part.name], Encoded):
                found.add(binding.stored.removesuffix(".weight"))
    return sorted(found)
