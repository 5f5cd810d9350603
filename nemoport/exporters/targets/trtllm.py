"""`trtllm`: TensorRT-LLM's per-rank checkpoint for a TP x PP layout, `config.json` and `rank{N}.safetensors`.

Loaded by TensorRT-LLM 0.8 to 1.2 (`trtllm-build`). Format, as tensorrt_llm 0.16 reads it (models/modeling_utils.py,
mapping.py): rank = stage * tp + position; equal blocks of layers a stage, renumbered from 0; the embedding on the first
stage, final norm and head on the last; q, k and v fused for each rank; KV heads repeated when there are fewer than
ranks; head rows padded with zeros until they divide; the embedding whole on every rank of its stage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from nemoport.artifact import json_bytes
from nemoport.exporters import configs
from nemoport.exporters.checkpoint import Model, Output, Slot, TensorFile
from nemoport.exporters.formats import safetensors, tokenizer
from nemoport.exporters.rules import Column, bindings
from nemoport.exporters.sharding import Sharding, shard
from nemoport.exporters.source import column
from nemoport.exporters.tensor import LazyTensor, cast
from nemoport.spec import LanguageModel, ModelSpec, Plan, TensorSpec, check_divisible, tensors

SHARDING = Sharding(
    axes={"heads": "divide", "kv_heads": "repeat", "ffn": "divide", "vocab": "pad"}, whole=frozenset({"embed.weight"})
)
GPUS_PER_NODE = 8


def output(model: Model, plan: Plan) -> Output:
    table = column(model.spec.family, "trtllm", "use --to hf, which TensorRT-LLM 1.0 and later load")
    dtype = plan.dtype or model.dtype
    config = _config(table, model.spec, plan, dtype)
    check_divisible(model.spec, plan)
    sidecars = {"config.json": json_bytes(config)}
    if model.checkpoint.tokenizer:
        sidecars |= tokenizer.files(model.checkpoint.tokenizer)
    windows = sorted({block.mixer.window for block in model.spec.blocks if block.mixer.window is not None})
    told = f", told --max_attention_window {windows[-1]} at run time" if windows else ""
    return Output(
        files=tuple(_rank(model, table, plan, dtype, rank) for rank in range(plan.world)),
        sidecars=sidecars,
        loads=(f"TensorRT-LLM 0.8 to 1.2 (trtllm-build){told}", "NIM 1.x"),
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
    shares = _shares(model, plan, rank)
    slots = []
    for binding in bindings(table.rules, {name: share.spec for name, share in shares.items()}):
        parts = [shares[part.name] for part in binding.parts]
        tensor = cast(binding.layout.join([part.tensor for part in parts], binding.parts), dtype)
        slots.append(Slot(binding.stored, tensor, tuple(part.name for part in parts), _transform(model, parts, dtype)))
    return safetensors.file(f"rank{rank}.safetensors", sorted(slots, key=lambda slot: slot.name))


def _shares(model: Model, plan: Plan, rank: int) -> dict[str, _Share]:
    """Every canonical tensor that a rank holds, by its name there."""
    stage, position = divmod(rank, plan.tp)
    layers = len(model.spec.blocks) // plan.pp
    held = {}
    for name, spec in tensors(_untied(model.spec)).items():
        local = _local_name(name, stage, layers, plan.pp)
        if local is not None:
            source = "embed.weight" if name == "head.weight" and model.spec.head.tied else name
            tensor, share = shard(model.tensors[source], spec, SHARDING, plan.tp, position)
            held[local] = _Share(source, tensor, TensorSpec(local, share.axes))
    return held


def _local_name(name: str, stage: int, layers: int, pp: int) -> str | None:
    """The name of a canonical tensor on a stage, or None where that stage does not hold it."""
    match name.split(".", 2):
        case ["layers", index, rest]:
            here = int(index) - stage * layers
            return f"layers.{here}.{rest}" if 0 <= here < layers else None
        case ["embed", *_]:
            return name if stage == 0 else None
        case _:
            return name if stage == pp - 1 else None


def _untied(spec: ModelSpec) -> ModelSpec:
    """The format wants the head written out: a shared table crashes TensorRT-LLM's loader (its issues 2467, 2772)."""
    return replace(spec, head=LanguageModel(tied=False))


def _said(spec: ModelSpec) -> ModelSpec:
    """What config.json can say: a sliding window is told to TensorRT-LLM at run time, as one number for all layers."""
    blocks = tuple(replace(block, mixer=replace(block.mixer, window=None)) for block in spec.blocks)
    return replace(_untied(spec), blocks=blocks)


def _transform(model: Model, parts: list[_Share], dtype: str) -> str:
    steps = [
        "shard" if any(part.tensor.shape != model.tensors[part.name].shape for part in parts) else "",
        "join rows" if len(parts) > 1 else "",
        f"cast to {dtype}" if any(part.tensor.dtype != dtype for part in parts) else "",
    ]
    return ", ".join(step for step in steps if step)


def _config(table: Column, spec: ModelSpec, plan: Plan, dtype: str) -> dict[str, Any]:
    """The keys of PretrainedConfig.to_dict in tensorrt_llm 0.16. Heads and vocabulary are the whole model's."""
    written = configs.write(table.dialects, _said(spec), "use --to hf, which TensorRT-LLM 1.0 and later load")
    mixer = spec.blocks[0].mixer
    assert mixer.rope is not None
    return {
        **written,
        "dtype": dtype,
        "logits_dtype": "float32",
        "rotary_embedding_dim": mixer.rope.dims,
        "qk_layernorm": mixer.qk_norm,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "fc_after_embed": False,
        "use_input_layernorm_in_first_layer": True,
        "use_last_layernorm": True,
        "layer_idx_offset": 0,
        "moe": {
            "num_experts": 0,
            "shared_expert_intermediate_size": 0,
            "top_k": 0,
            "normalization_mode": None,
            "sparse_mixer_epsilon": 0.01,
            "tp_mode": 0,
            "device_limited_n_group": 0,
            "device_limited_topk_group": 0,
            "device_limited_routed_scaling_factor": 1.0,
        },
        "runtime_defaults": None,
        "mapping": {
            "world_size": plan.world,
            "gpus_per_node": GPUS_PER_NODE,
            "cp_size": 1,
            "tp_size": plan.tp,
            "pp_size": plan.pp,
            "moe_tp_size": plan.tp,
            "moe_ep_size": 1,
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
