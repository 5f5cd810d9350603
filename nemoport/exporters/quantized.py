"""Checkpoints that are quantized already, as NVIDIA ModelOpt and others leave them: recognised, never dequantized.
Those of ModelOpt in Hugging Face's names are read, each weight with its scales.

- Hugging Face: `hf_quant_config.json` beside the weights (ModelOpt), or `quantization_config` in `config.json`;
- Megatron: `modelopt_state/` beside the weights, or quantizers (`..._quantizer._amax`) among the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.checkpoint import Checkpoint, Quantized
from nemoport.exporters.dequantized import algorithms
from nemoport.exporters.encoding import SCALAR, Encoded, Encoding, Field, Form, Gathered, gather
from nemoport.exporters.formats import distributed
from nemoport.exporters.formats.structured import mapping
from nemoport.exporters.tensor import LazyTensor

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
    group: int | None = None
    """Inputs that share a scale, where it says."""
    excluded: tuple[str, ...] = ()
    """Patterns of the linears that are not quantized."""

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
    groups = _table(_table(_table(said.get("config_groups")).get("group_0")).get("weights"))
    group = said.get("group_size") or groups.get("group_size")
    excluded = said.get("exclude_modules") or said.get("ignore") or ()
    return Quantization(
        where=where,
        producer=" ".join(str(word) for word in words if word),
        algorithm=_word(said.get("quant_algo") or method),
        kv_cache=_word(said.get("kv_cache_quant_algo") or _table(said.get("kv_cache_scheme")).get("type")),
        group=group if type(group) is int and group > 0 else None,  # GPTQ says -1 for none
        excluded=tuple(map(str, excluded)) if isinstance(excluded, list | tuple) else (),
    )


def _state(path: Path) -> Path | None:
    directory = distributed.locate(path)
    candidates = [directory / STATE] if directory else []
    return next((place for place in candidates if place.is_dir()), None)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _word(value: Any) -> str | None:
    return None if value is None else str(value)


KV_CACHE = (
    Field("k_scale", ("float32",), SCALAR, {"modelopt": Form("k_scale")}, optional=True),
    Field("v_scale", ("float32",), SCALAR, {"modelopt": Form("v_scale")}, optional=True),
)
"""Scales of the cache, stored beside the projections that fill it: `k_proj.k_scale`, `v_proj.v_scale`."""


def encoding(stored: Checkpoint, said: Quantization) -> Encoding:
    """The encoding of a checkpoint's weights, else an error that says why they are not read."""
    known = algorithms()
    what = f"{stored.path} is quantized ({said}; {said.where})"
    if stored.naming != "huggingface" or not said.producer.startswith("modelopt"):
        raise UnsupportedInput(
            f"{what}, and nemoport reads only what ModelOpt writes in Hugging Face's names, nor does it silently undo "
            "a quantization; give the checkpoint that it came from, or ModelOpt's export of it"
        )
    if said.algorithm not in known:
        raise UnsupportedInput(
            f"{what}; nemoport reads {', '.join(sorted(known))} and does not silently undo a quantization; "
            "give the checkpoint that it came from"
        )
    inside = _table(stored.config.get("quantization_config")).get("quant_algo", said.algorithm)
    if inside != said.algorithm:
        raise DamagedInput(f"{what}, but its config.json says {inside}; copy the checkpoint again")
    if said.kv_cache not in (None, "FP8"):
        raise UnsupportedInput(f"{what}; of KV caches nemoport knows the scales of FP8")
    found: Encoding = known[said.algorithm].encoding(said.group)
    return replace(found, fields=(*found.fields, *KV_CACHE)) if said.kv_cache else found


def gathered(stored: Checkpoint, said: Quantization) -> tuple[Gathered, Quantized]:
    """The stored tensors with each quantized weight as one, and what the model keeps of the description."""
    how = encoding(stored, said)
    description = stored.path / DESCRIPTION
    kept = Quantized(
        encoding=how,
        said={key: value for key, value in asdict(said).items() if value is not None},
        kv_cache=said.kv_cache,
        excluded=said.excluded,
        config=stored.config.get("quantization_config"),
        files={DESCRIPTION: description.read_bytes()} if description.is_file() else {},
    )
    return gather(stored.tensors, how, "modelopt"), kept


def check_description(
    stored: Checkpoint, said: Quantization, tensors: Mapping[str, LazyTensor], sources: Mapping[str, tuple[str, ...]]
) -> None:
    """The description and the weights must agree on what is quantized: loaders believe the description."""
    for name, tensor in tensors.items():
        linear = sources[name][0].rpartition(".")[0]
        excluded = any(fnmatchcase(linear, each) or linear.startswith(f"{each}.") for each in said.excluded)
        if isinstance(tensor, Encoded) and excluded:
            found = f"{linear} is, though it is excluded there"
        elif not isinstance(tensor, Encoded) and not excluded and _is_linear(name, tensor):
            found = f"{linear} is plain {tensor.dtype}, and not excluded there"
        else:
            continue
        raise DamagedInput(
            f"{stored.path} is quantized ({said}; {said.where}), but {found}; the description is of another checkpoint"
        )


def _is_linear(name: str, tensor: LazyTensor) -> bool:
    """Of a layer; embedding and output matrix are never quantized unless they say so."""
    return name.startswith("layers.") and name.endswith(".weight") and len(tensor.shape) == 2
