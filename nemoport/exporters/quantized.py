"""Checkpoints that are quantized already, as NVIDIA ModelOpt and others leave them: recognised, never dequantized.
Those of ModelOpt, compressed-tensors and DeepSeek in Hugging Face's names are read, each weight with its scales.

- Hugging Face: `hf_quant_config.json` beside the weights (ModelOpt), or `quantization_config` in `config.json`;
- Megatron: `modelopt_state/` beside the weights, or quantizers (`..._quantizer._amax`) among the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemoport import plugins
from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.checkpoint import Checkpoint, Quantized
from nemoport.exporters.dequantized import QUANTIZERS, algorithms
from nemoport.exporters.dialects import compressed_tensors
from nemoport.exporters.encoding import FLOATS, SCALAR, Encoded, Encoding, Field, Form, Gathered, gather
from nemoport.exporters.exclusion import excludes
from nemoport.exporters.formats import distributed
from nemoport.exporters.formats.structured import mapping
from nemoport.exporters.quantizers import fp8_block
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
    dialect: str | None = None
    """Whose words and names it is in; None where nemoport does not read them."""

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
    excluded = said.get("exclude_modules") or said.get("ignore") or said.get("modules_to_not_convert") or ()
    cache = _table(said.get("kv_cache_scheme"))
    by_scheme = "FP8" if (cache.get("type"), cache.get("num_bits")) == ("float", 8) else cache.get("type")
    return Quantization(
        where=where,
        producer=" ".join(str(word) for word in words if word),
        algorithm=_word(said.get("quant_algo") or said.get("format") or method),
        kv_cache=_word(said.get("kv_cache_quant_algo") or by_scheme),
        group=group if type(group) is int and group > 0 else None,  # GPTQ says -1 for none
        excluded=tuple(map(str, excluded)) if isinstance(excluded, list | tuple) else (),
        dialect=_dialect(said, producer),
    )


def _dialect(said: Mapping[str, Any], producer: Mapping[str, Any]) -> str | None:
    if said.get("quant_method") == compressed_tensors.NAME:
        return compressed_tensors.NAME
    if said.get("quant_method") == "fp8" and said.get("weight_block_size"):
        return DEEPSEEK
    return "modelopt" if producer.get("name") == "modelopt" else None


def _state(path: Path) -> Path | None:
    directory = distributed.locate(path)
    candidates = [directory / STATE] if directory else []
    return next((place for place in candidates if place.is_dir()), None)


def _table(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _word(value: Any) -> str | None:
    return None if value is None else str(value)


def _of_cache(name: str, linear: str) -> Field:
    """ModelOpt names it after the projection even where that lies in `qkv_proj` with others: it renames the scale of
    the attention, whatever linears that has (`postprocess_state_dict` in modelopt/torch/export/quant_utils.py). vLLM
    takes it so (`maybe_remap_kv_scale_name`). compressed-tensors has it with the attention."""
    of = (linear, "qkv_proj")
    forms = {
        "modelopt": Form(f"{linear}.{name}", above=of),
        compressed_tensors.NAME: Form(name, single=True, above=of, dtypes=FLOATS),
    }
    return Field(name, ("float32",), SCALAR, forms, optional=True)


KV_CACHE: tuple[Field, ...] = (
    _of_cache("k_scale", "k_proj"),
    _of_cache("v_scale", "v_proj"),
    Field(
        "kv_scale",
        ("float32",),
        SCALAR,
        {"trtllm": Form("kv_cache_scaling_factor", single=True, above=("qkv",))},
        optional=True,
    ),
)
"""Scales of the cache, stored beside the projections that fill it: `k_proj.k_scale`, `v_proj.v_scale`. TensorRT-LLM has
one for both, with the attention."""


def encoding(stored: Checkpoint, said: Quantization) -> Encoding:
    """The encoding of a checkpoint's weights, else an error that says why they are not read."""
    what = f"{stored.path} is quantized ({said}; {said.where})"
    if stored.naming != "huggingface" or said.dialect is None:
        raise UnsupportedInput(
            f"{what}, and nemoport reads only what ModelOpt, compressed-tensors and DeepSeek write in Hugging Face's "
            "names, nor does it silently undo a quantization; give the checkpoint that it came from, or an export of "
            "it by one of these"
        )
    if said.kv_cache not in (None, "FP8"):
        raise UnsupportedInput(f"{what}; of KV caches nemoport knows the scales of FP8")
    found = _ENCODINGS[said.dialect](stored, said, what)
    return with_kv_cache(found, said.dialect) if said.kv_cache else found


def with_kv_cache(encoding: Encoding, dialect: str) -> Encoding:
    """The same weights beside scales for a cache of FP8."""
    return replace(encoding, fields=(*encoding.fields, *(each for each in KV_CACHE if dialect in each.forms)))


def _of_modelopt(stored: Checkpoint, said: Quantization, what: str) -> Encoding:
    known = algorithms()
    if said.algorithm not in known:
        raise UnsupportedInput(
            f"{what}; nemoport reads {', '.join(sorted(known))} and does not silently undo a quantization; "
            "give the checkpoint that it came from"
        )
    inside = _table(stored.config.get("quantization_config")).get("quant_algo", said.algorithm)
    if inside != said.algorithm:
        raise DamagedInput(f"{what}, but its config.json says {inside}; copy the checkpoint again")
    found: Encoding = known[said.algorithm].encoding(said.group)
    return found


def _of_compressed_tensors(stored: Checkpoint, said: Quantization, what: str) -> Encoding:
    config = _table(stored.config.get("quantization_config"))
    if (method := compressed_tensors.method(config)) is None or config.get("sparsity_config"):
        known = sorted({f"{scheme.format} as {name}" for name, scheme in compressed_tensors.SCHEMES.items()})
        raise UnsupportedInput(
            f"{what}; of compressed-tensors nemoport reads one symmetric scheme for every linear, {', '.join(known)}, "
            "and does not silently undo another; give the checkpoint that it came from"
        )
    found: Encoding = plugins.load(QUANTIZERS, method).encoding(said.group)
    return found


def _of_deepseek(stored: Checkpoint, said: Quantization, what: str) -> Encoding:
    size = _table(stored.config.get("quantization_config")).get("weight_block_size")
    if size != [fp8_block.BLOCK, fp8_block.BLOCK]:
        raise UnsupportedInput(f"{what} in blocks of {size}; nemoport reads 128 x 128")
    return fp8_block.encoding(None)


DEEPSEEK = "deepseek"
_ENCODINGS: Mapping[str, Callable[[Checkpoint, Quantization, str], Encoding]] = {
    "modelopt": _of_modelopt,
    compressed_tensors.NAME: _of_compressed_tensors,
    DEEPSEEK: _of_deepseek,
}


def gathered(stored: Checkpoint, said: Quantization) -> tuple[Gathered, Quantized]:
    """The stored tensors with each quantized weight as one, and what the model keeps of the description."""
    how = encoding(stored, said)
    assert said.dialect is not None
    description = stored.path / DESCRIPTION
    kept = Quantized(
        encoding=how,
        dialect=said.dialect,
        said={key: value for key, value in asdict(said).items() if value is not None},
        kv_cache=said.kv_cache,
        excluded=said.excluded,
        config=stored.config.get("quantization_config"),
        files={DESCRIPTION: description.read_bytes()} if description.is_file() else {},
    )
    return gather(stored.tensors, how, said.dialect), kept


def check_description(
    stored: Checkpoint, said: Quantization, tensors: Mapping[str, LazyTensor], sources: Mapping[str, tuple[str, ...]]
) -> None:
    """The description and the weights must agree on what is quantized: loaders believe the description."""
    for name, tensor in tensors.items():
        linear = sources[name][0].rpartition(".")[0]
        excluded = any(excludes(each, linear) for each in said.excluded)
        if isinstance(tensor, Encoded) and excluded:
            found = f"{linear} is, though it is excluded there"
        elif not isinstance(tensor, Encoded) and not excluded and _is_linear(name, tensor) and _lists_all(said):
            found = f"{linear} is plain {tensor.dtype}, and not excluded there"
        else:
            continue
        raise DamagedInput(
            f"{stored.path} is quantized ({said}; {said.where}), but {found}; the description is of another checkpoint"
        )


def _lists_all(said: Quantization) -> bool:
    """DeepSeek's own lists nothing: what has no scale is plain."""
    return said.dialect != DEEPSEEK


def _is_linear(name: str, tensor: LazyTensor) -> bool:
    """Of a layer; embedding and output matrix are never quantized unless they say so."""
    return name.startswith("layers.") and name.endswith(".weight") and len(tensor.shape) == 2
