"""`trtllm`: TensorRT-LLM's per-rank checkpoint for a TP x PP layout, `config.json` and `rank{N}.safetensors`.

Loaded by TensorRT-LLM 0.8 to 1.2 (`trtllm-build`). Format, as tensorrt_llm 0.16 reads it (models/modeling_utils.py,
mapping.py): rank = stage * tp + position; equal blocks of layers a stage, renumbered from 0; the embedding on the first
stage, final norm and head on the last; q, k and v fused for each rank; KV heads repeated when there are fewer than
ranks; head rows padded with zeros until they divide; the embedding whole on every rank of its stage. Of experts, ep
neighbouring ranks hold each a run of them, and tp / ep ranks cut the same ones among them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nemoport.artifact import json_bytes
from nemoport.errors import UnsupportedInput
from nemoport.exporters import configs, methods
from nemoport.exporters.checkpoint import Model, Output, Quantized, Slot, TensorFile
from nemoport.exporters.encoding import SCALAR, Encoded, check_shared, spread
from nemoport.exporters.formats import safetensors, tokenizer
from nemoport.exporters.layouts import Layout
from nemoport.exporters.rules import Binding, Column, written
from nemoport.exporters.sharding import Sharding, shard
from nemoport.exporters.source import column
from nemoport.exporters.tensor import LazyTensor, cast
from nemoport.spec import Attention, ModelSpec, Plan, TensorSpec, attention_windows, check_divisible, tensors

SHARDING = Sharding(
    axes={"heads": "divide", "kv_heads": "repeat", "ffn": "divide", "vocab": "pad"}, whole=frozenset({"embed.weight"})
)
ONE_TABLE = replace(SHARDING, whole=frozenset())
"""Where the embedding is the output matrix, both are cut."""
GPUS_PER_NODE = 8
DIALECT = "trtllm"
DIALECTS = (DIALECT,)
"""In which quantized weights are written."""
LOADS = ("TensorRT-LLM 0.8 to 1.2 (trtllm-build)", "NIM 1.x")
SHARED = (("ffn.gate.weight", "ffn.up.weight"),)
"""Weights of a layer that are stored apart and must agree on what is one number: TensorRT-LLM may fuse them."""
PRE_SCALE = "pre_scale"


def output(model: Model, plan: Plan) -> Output:
    table = column(model.spec.family, "trtllm", "use --to hf, which TensorRT-LLM 1.0 and later load")
    dtype = plan.dtype or model.dtype
    config = _config(table, model.spec, plan, dtype)
    check_divisible(model.spec, plan)
    if model.quantized:
        _check_quantized(model, model.quantized)
        config["quantization"] |= _quantization(model.quantized)
    if plan.pp > 1 and not table.own_head:
        raise UnsupportedInput(
            f"TensorRT-LLM's {config['architecture']} takes its embedding for the output matrix and has no pipeline "
            f"stages, pp={plan.pp} was asked for; use pp 1"
        )
    sidecars = {"config.json": json_bytes(config)}
    if model.checkpoint.tokenizer:
        sidecars |= tokenizer.files(model.checkpoint.tokenizer)
    windows = [str(window) for window in attention_windows(model.spec)]
    told = f", told --max_attention_window {' '.join(windows)} at run time" if windows else ""
    first, *others = model.quantized.encoding.loads[DIALECT] if model.quantized else LOADS
    return Output(
        files=tuple(_rank(model, table, plan, dtype, rank) for rank in range(plan.world)),
        sidecars=sidecars,
        loads=(first + told, *others),
        dtype=dtype,
    )


@dataclass(frozen=True)
class _Share:
    """A canonical tensor as one rank holds it."""

    name: str
    """Its name in the whole model; the rank may number layers differently."""
    tensor: LazyTensor
    spec: TensorSpec


def _rank(model: Model, table: Column, plan: Plan, dtype: str, rank: int) -> TensorFile:
    shares = _shares(model, table, plan, rank)
    slots: list[Slot] = []
    for binding in written(table.rules, {name: share.spec for name, share in shares.items()}):
        parts = [shares[part.name] for part in binding.parts]
        names, joined = tuple(part.name for part in parts), binding.join([part.tensor for part in parts])
        if isinstance(joined, Encoded):
            _check_grouped(binding, joined, plan.tp)
            what = _transform(model, parts, binding.layout, joined.dtype)
            fields = spread(binding.stored, joined, DIALECT, dtype)
            slots.extend(Slot(name, each, names, made or what) for name, each, made in fields)
            continue
        kept = binding.dtype or dtype
        what = _transform(model, parts, binding.layout, kept)
        slots.append(Slot(binding.stored, cast(joined, kept), names, what))
    return safetensors.file(f"rank{rank}.safetensors", safetensors.ordered(slots))


def _shares(model: Model, table: Column, plan: Plan, rank: int) -> dict[str, _Share]:
    """Every canonical tensor that a rank holds, by its name there."""
    stage, position = divmod(rank, plan.tp)
    layers = len(model.spec.blocks) // plan.pp
    held = {}
    sharding = SHARDING if table.own_head else ONE_TABLE
    mine = tensors(_headed(table, model.spec).shard(plan, rank))
    for name, spec in tensors(_headed(table, model.spec)).items():
        local = _local_name(name, stage, layers, plan.pp)
        if local in mine:
            source = "embed.weight" if name == "head.weight" and model.spec.language_model.tied else name
            cuts = (plan.expert_tp, position // plan.ep) if ".experts." in name else (plan.tp, position)
            tensor, share = shard(model.tensors[source], spec, sharding, *cuts)
            held[local] = _Share(source, tensor, TensorSpec(local, share.axes))
    return held


def _local_name(name: str, stage: int, layers: int, pp: int) -> str | None:
    """The name of a canonical tensor on a stage, or None where that stage does not hold it."""
    match name.split(".", 2):
        case ["layers", index, rest]:
            here = int(index) - stage * layers
            return f"layers.{here}.{rest}" if 0 <= here < layers else None
        case ["embed" | "positions", *_]:
            return name if stage == 0 else None
        case _:
            return name if stage == pp - 1 else None


def _headed(table: Column, spec: ModelSpec) -> ModelSpec:
    """The format wants the head written out: a shared table crashes TensorRT-LLM's loader (its issues 2467, 2772)."""
    return replace(spec, head=replace(spec.language_model, tied=False)) if table.own_head else spec


def _said(table: Column, spec: ModelSpec) -> ModelSpec:
    """What config.json can say: sliding windows are told to TensorRT-LLM at run time."""
    blocks = tuple(
        replace(block, mixer=replace(block.mixer, window=None)) if isinstance(block.mixer, Attention) else block
        for block in spec.blocks
    )
    return replace(_headed(table, spec), blocks=blocks)


def _transform(model: Model, parts: list[_Share], layout: Layout, dtype: str) -> str:
    steps = [
        "shard" if any(part.tensor.shape != model.tensors[part.name].shape for part in parts) else "",
        "join rows" if len(parts) > 1 and layout.whole_rows else "",
        layout.name if not layout.whole_rows else "",
        f"cast to {dtype}" if any(part.tensor.dtype != dtype for part in parts) else "",
    ]
    return ", ".join(step for step in steps if step)


def _check_quantized(model: Model, quantized: Quantized) -> None:
    """Refuse what the format has no place for."""
    what = f"{model.checkpoint.path} is quantized ({quantized.encoding.method})"
    if quantized.kv_cache and quantized.dialect != DIALECT:
        raise UnsupportedInput(f"{what} with scales for k and v apart, TensorRT-LLM's cache has one; use --to hf")
    for name, spec in tensors(model.spec).items():
        linear, encoded = len(spec.axes) > 1, isinstance(model.tensors[name], Encoded)
        if linear and encoded != name.startswith("layers."):
            found = "is quantized too" if encoded else "is not"
            raise UnsupportedInput(f"{what} and {name} {found}, which --to trtllm does not write yet; use --to hf")
    if quantized.dialect == DIALECT:
        return  # made for this format
    for index in range(len(model.spec.blocks)):
        for names in SHARED:
            found_here = [model.tensors.get(f"layers.{index}.{name}") for name in names]
            if len(encoded_here := [tensor for tensor in found_here if isinstance(tensor, Encoded)]) == len(names):
                for each in quantized.encoding.fields:
                    if each.follows == SCALAR:
                        check_shared(each, encoded_here)


def _check_grouped(binding: Binding, tensor: Encoded, tp: int) -> None:
    if tensor.encoding.method not in methods.PADDED_BY_TRTLLM:
        return
    unit = methods.unit(tensor.encoding, tp)
    for size, axis in zip(tensor.shape, binding.parts[0].axes, strict=True):
        if (whole := size * (tp if axis.name in SHARDING.axes else 1)) % unit:
            raise UnsupportedInput(
                f"{binding.stored} has {whole} {axis.name} at tp={tp}, which do not divide by {unit}, and "
                "TensorRT-LLM's loader pads them and refuses the file; use a smaller tp, or --to hf"
            )


def _quantization(quantized: Quantized) -> dict[str, Any]:
    """The keys in which it differs from plain weights. Linears outside of the layers are never quantized."""
    found = {
        "quant_algo": quantized.said["algorithm"],
        "kv_cache_quant_algo": quantized.kv_cache,
        "exclude_modules": ["lm_head"],
    }
    if quantized.encoding.group:
        found |= {"group_size": quantized.encoding.group}
    if any(each.name == PRE_SCALE for each in quantized.encoding.fields):
        found |= {"pre_quant_scale": True}
    return found


def _config(table: Column, spec: ModelSpec, plan: Plan, dtype: str) -> dict[str, Any]:
    """The keys of PretrainedConfig.to_dict in tensorrt_llm 0.16. Heads and vocabulary are the whole model's."""
    written = configs.write(table.dialects, _said(table, spec), "use --to hf, which TensorRT-LLM 1.0 and later load")
    mixer = spec.mixers[0]
    assert isinstance(mixer, Attention), "no dialect of this format says another"
    return {
        **written,
        "dtype": dtype,
        "logits_dtype": "float32",
        "rotary_embedding_dim": mixer.head_dim,
        "qk_layernorm": mixer.qk_norm,
        "use_parallel_embedding": plan.tp > 1 and not table.own_head,
        "embedding_sharding_dim": 0,
        "runtime_defaults": None,
        "mapping": {
            "world_size": plan.world,
            "gpus_per_node": GPUS_PER_NODE,
            "cp_size": 1,
            "tp_size": plan.tp,
            "pp_size": plan.pp,
            "moe_tp_size": plan.expert_tp,
            "moe_ep_size": plan.ep,
        },
        "quantization": {
            "quant_algo": None,
            "kv_cache_quant_algo": None,
            "group_size": 128,
            "smoothquant_val": 0.5,
            "clamp_val": None,
            "use_meta_recipe": False,
            "has_zero_point": False,
            "pre_quant_scale": False,
            "exclude_modules": None,
        },
    }
