"""How compressed-tensors describes a quantization: `quantization_config` in `config.json`, as its 0.20 writes and reads
it (quantization/quant_scheme.py has the presets)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemoport.exporters.encoding import Encoding

NAME = "compressed-tensors"
VERSION = "0.20.0"


@dataclass(frozen=True)
class Scheme:
    """What it says of numbers: those of the weight, and those of its input."""

    format: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None


_STATIC = {"symmetric": True, "dynamic": False}
_DYNAMIC = {"symmetric": True, "dynamic": True}
_FLOAT8, _FLOAT4 = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "float"}
_INT8, _INT4 = {"num_bits": 8, "type": "int"}, {"num_bits": 4, "type": "int"}
_BY_TENSOR, _BY_ROW, _BY_TOKEN = {"strategy": "tensor"}, {"strategy": "channel"}, {"strategy": "token"}
_BY_SIXTEEN = {"strategy": "tensor_group", "group_size": 16}
_BLOCK = {"strategy": "block", "block_structure": [128, 128]}
_KV_CACHE = {**_FLOAT8, **_BY_TENSOR, **_STATIC}

SCHEMES: Mapping[str, Scheme] = {
    "fp8": Scheme("float-quantized", {**_FLOAT8, **_BY_TENSOR, **_STATIC}, {**_FLOAT8, **_BY_TENSOR, **_STATIC}),
    "fp8_dynamic": Scheme("float-quantized", {**_FLOAT8, **_BY_ROW, **_STATIC}, {**_FLOAT8, **_BY_TOKEN, **_DYNAMIC}),
    "fp8_block": Scheme(
        "float-quantized",
        {**_FLOAT8, **_BLOCK, **_STATIC},
        {**_FLOAT8, "strategy": "group", "group_size": 128, **_DYNAMIC},
    ),
    "int8": Scheme("pack-quantized", {**_INT8, **_BY_ROW, **_STATIC}),
    "int8_sq": Scheme("int-quantized", {**_INT8, **_BY_ROW, **_STATIC}, {**_INT8, **_BY_TOKEN, **_DYNAMIC}),
    "int4_awq": Scheme("pack-quantized", {**_INT4, "strategy": "group", **_STATIC}),
    "nvfp4": Scheme(
        "nvfp4-pack-quantized",
        {**_FLOAT4, **_BY_SIXTEEN, **_STATIC},
        {**_FLOAT4, **_BY_SIXTEEN, "symmetric": True, "dynamic": "local"},
    ),
    "nvfp4_weights": Scheme("nvfp4-pack-quantized", {**_FLOAT4, **_BY_SIXTEEN, **_STATIC}),
}
"""By encoding."""
_TOLD = ("num_bits", "type", "strategy", "symmetric", "dynamic", "block_structure")


def quantization_config(encoding: Encoding, kv_cache: str | None, excluded: Sequence[str]) -> dict[str, Any]:
    scheme = SCHEMES[encoding.method]
    group = {"group_size": encoding.group} if encoding.group else {}
    return {
        "config_groups": {
            "group_0": {
                "format": scheme.format,
                "input_activations": dict(scheme.inputs) if scheme.inputs else None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {**scheme.weights, **group},
            }
        },
        "format": scheme.format,
        "global_compression_ratio": None,
        "ignore": list(excluded),
        "kv_cache_scheme": _KV_CACHE if kv_cache else None,
        "quant_method": NAME,
        "quantization_status": "compressed",
        "version": VERSION,
    }


def method(said: Mapping[str, Any]) -> str | None:
    """The encoding that a description means; None where none here does."""
    groups = said.get("config_groups")
    if not isinstance(groups, Mapping) or len(groups) != 1:
        return None
    (group,) = groups.values()
    if not isinstance(group, Mapping) or group.get("targets") != ["Linear"] or group.get("output_activations"):
        return None
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping) or not isinstance(inputs, Mapping | None):
        return None
    written = group.get("format") or said.get("format")
    for name, scheme in SCHEMES.items():
        if (written, _told(weights), _told(inputs)) == (scheme.format, _told(scheme.weights), _told(scheme.inputs)):
            return None if weights.get("actorder") in ("group", True) else name
    return None


def _told(numbers: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: numbers[key] for key in _TOLD if numbers.get(key) is not None} if numbers else {}
