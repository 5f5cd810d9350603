"""Checkpoints that are quantized already, as NVIDIA ModelOpt and others leave them: recognised, never dequantized.

- Hugging Face: `hf_quant_config.json` beside the weights (ModelOpt), or `quantization_config` in `config.json`;
- Megatron: `modelopt_state/` beside the weights, or quantizers (`..._quantizer._amax`) among the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import distributed
from nemoport.exporters.formats.structured import mapping

DESCRIPTION, STATE = "hf_quant_config.json", "modelopt_state"
_QUANTIZER = "_quantizer."


@dataclass(frozen=True, kw_only=True)
class Quantization:
    where: str
    """What says so: a file, a directory or a tensor."""
    producer: str
    algorithm: str | None = None
    """In the producer's words: FP8, W4A16_AWQ, NVFP4. None where it does not say."""
    kv_cache: str | None = None

    def __str__(self) -> str:
        cache = f", KV cache {self.kv_cache}" if self.kv_cache else ""
        return f"{self.algorithm or 'an algorithm that it does not name'}{cache}, by {self.producer}"


def quantization(stored: Checkpoint) -> Quantization | None:
    """How a checkpoint is quantized; None where it is not. Looks at names and small files."""
    if (path := stored.path / DESCRIPTION).is_file():
        data = mapping(path)
        return _said(DESCRIPTION, _table(data.get("quantization")), _table(data.get("producer")))
    if said := stored.config.get("quantization_config"):
        return _said("quantization_config", _table(said), _table(_table(said).get("producer")))
    if (state := _state(stored.path)) is not None:
        return Quantization(where=f"{state.name}/", producer="modelopt")
    if name := next((name for name in stored.tensors if _QUANTIZER in name), None):
        return Quantization(where=name, producer="modelopt")
    return None


def _said(where: str, said: Mapping[str, Any], producer: Mapping[str, Any]) -> Quantization:
    """ModelOpt's words; other producers name a method and no more."""
    method = said.get("quant_method")
    words = [producer.get("name") or method or "a program that it does not name", producer.get("version")]
    return Quantization(
        where=where,
        producer=" ".join(str(word) for word in words if word),
        algorithm=_word(said.get("quant_algo") or method),
        kv_cache=_word(said.get("kv_cache_quant_algo") or _table(said.get("kv_cache_scheme")).get("type")),
    )


def _state(path: Path) -> Path | None:
    directory = distributed.locate(path)
    candidates = [directory / STATE] if directory else []
    return next((place for place in candidates if place.is_dir()), None)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _word(value: Any) -> str | None:
    return None if value is None else str(value)
