"""How NVIDIA ModelOpt's exports for Hugging Face describe a quantization: `hf_quant_config.json`, and
`quantization_config` in `config.json`. As ModelOpt 0.47 writes both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemoport import __version__
from nemoport.exporters.encoding import Encoding

PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Whose layout it is: vLLM, SGLang and TensorRT-LLM know a checkpoint by this name, and some refuse another."""
ALWAYS_EXCLUDED = ("lm_head", "model.embed_tokens")
_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}
_FP4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
GROUPS: Mapping[str, Mapping[str, Any]] = {
    "FP8": {"input_activations": _FP8, "weights": _FP8},
    "NVFP4": {"input_activations": _FP4, "weights": _FP4},
    "W4A16_NVFP4": {"weights": _FP4},
}
"""What it says of numbers, by algorithm; of the others, nothing."""


def description(algorithm: str, encoding: Encoding, kv_cache: str | None, excluded: Sequence[str]) -> dict[str, Any]:
    """`hf_quant_config.json`."""
    said: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": kv_cache}
    if encoding.group:
        said |= {"group_size": encoding.group}
    if any(each.name == "pre_scale" for each in encoding.fields) and encoding.group:
        said |= {"has_zero_point": False, "pre_quant_scale": True}
    return {
        "producer": PRODUCER,
        "quantization": said | {"exclude_modules": list(excluded)},
        "written_by": f"nemoport {__version__}",
    }


def quantization_config(algorithm: str, kv_cache: str | None, excluded: Sequence[str]) -> dict[str, Any]:
    """The same in `config.json`."""
    groups = {"config_groups": {"group_0": {**GROUPS[algorithm], "targets": ["Linear"]}}} if algorithm in GROUPS else {}
    cache = {"kv_cache_scheme": _FP8} if kv_cache else {}
    return {
        **groups,
        "ignore": list(excluded),
        "quant_algo": algorithm,
        **cache,
        "producer": PRODUCER,
        "quant_method": "modelopt",
    }
