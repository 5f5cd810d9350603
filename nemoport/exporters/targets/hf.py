"""`hf`: Hugging Face names, safetensors in shards of at most 5 GB, `config.json`, tokenizer. Loaded by transformers,
vLLM, SGLang, NIM and TensorRT-LLM's PyTorch backend; sharding is a runtime argument there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from nemoport.artifact import json_bytes
from nemoport.errors import UsageError
from nemoport.exporters import configs
from nemoport.exporters.checkpoint import Model, Output, Slot
from nemoport.exporters.encoding import Encoded, spread
from nemoport.exporters.formats import safetensors, sentence_transformers, tokenizer
from nemoport.exporters.formats.tree import Tree
from nemoport.exporters.rules import Column, written
from nemoport.exporters.source import column
from nemoport.exporters.tensor import cast, nbytes
from nemoport.spec import Embedding, LanguageModel, ModelSpec, Plan, tensors

SHARD = 5 * 10**9
"""Bytes of tensors in a file, as transformers' save_pretrained cuts them."""
DIALECTS = ("modelopt", "compressed-tensors")
"""In which quantized weights may be written, the usual one first."""
PASSES = ("deepseek",)
"""Those that it only passes on as they are."""
LOADS = ("transformers 4.43 or later", "vLLM", "SGLang", "TensorRT-LLM 1.0 or later (PyTorch backend)")


def output(model: Model, plan: Plan) -> Output:
    if plan.world > 1 or plan.ep > 1:
        raise UsageError(
            f"--to hf writes one model for any number of ranks, tp={plan.tp} pp={plan.pp} ep={plan.ep} was asked for; "
            "leave them out and give them to the runtime, or use --to trtllm"
        )
    table = column(model.spec.family, "huggingface", "it can be written as onnx")
    dtype = plan.dtype or model.dtype
    slots: list[Slot] = []
    for binding in written(table.rules, tensors(model.spec)):
        parts = tuple(part.name for part in binding.parts)
        tensor = binding.join([model.tensors[name] for name in parts])
        if isinstance(tensor, Encoded):
            assert model.quantized is not None
            fields = spread(binding.stored, tensor, model.quantized.dialect, dtype)
            slots.extend(Slot(name, each, parts, made) for name, each, made in fields)
            continue
        kept = cast(tensor, binding.dtype or plan.dtype or tensor.dtype)
        slots.append(Slot(binding.stored, kept, parts, f"cast to {kept.dtype}" if kept is not tensor else ""))
    special = tokenizer.special_ids(model.checkpoint.tokenizer) if model.checkpoint.tokenizer else {}
    special |= {key: model.checkpoint.config[key] for key in _IDS if model.checkpoint.config.get(key) is not None}
    config = _said(table, model.spec, dtype) | special
    # an absent key would mean what transformers takes for the family's
    config |= {key: None for key in _IDS if key in model.checkpoint.config and key not in special}
    config |= {key: value for key, value in model.checkpoint.config.items() if key in _LABELS and key in config}
    loads, sidecars = table.loads or LOADS, dict[str, bytes]()
    if isinstance(head := model.spec.head, Embedding):
        sidecars |= sentence_transformers.files(head, model.spec.hidden_size)
    if model.quantized:
        config |= {"quantization_config": model.quantized.config} if model.quantized.config else {}
        loads = model.quantized.encoding.loads[model.quantized.dialect]
        sidecars |= dict(model.quantized.files)
    sidecars |= {"config.json": json_bytes(config)}
    if isinstance(head, LanguageModel):
        sidecars |= {"generation_config.json": json_bytes(special)}
    if model.checkpoint.tokenizer:
        sidecars |= tokenizer.files(model.checkpoint.tokenizer)
    shards = _shards(sorted(slots, key=lambda slot: slot.name))
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        sidecars["model.safetensors.index.json"] = json_bytes(
            {
                "metadata": {"total_size": sum(nbytes(slot.tensor) for slot in slots)},
                "weight_map": {slot.name: name for name, shard in zip(names, shards, strict=True) for slot in shard},
            }
        )
    return Output(
        files=tuple(
            safetensors.file(name, safetensors.ordered(shard), {"format": "pt"})
            for name, shard in zip(names, shards, strict=True)
        ),
        sidecars=sidecars,
        loads=loads,
        dtype=dtype,
    )


def described(spec: ModelSpec, dtype: str, tree: Tree) -> dict[str, bytes]:
    """`config.json` and `generation_config.json` of a model that lies elsewhere, with its tokenizer in `tree`."""
    special = tokenizer.special_ids(tree)
    config = _said(column(spec.family, "huggingface", "it can be written as onnx"), spec, dtype) | special
    return {"config.json": json_bytes(config), "generation_config.json": json_bytes(special)}


def _said(table: Column, spec: ModelSpec, dtype: str) -> dict[str, Any]:
    return {**configs.write(table.dialects, spec, "convert it to onnx"), "torch_dtype": dtype}


_LABELS = ("id2label", "label2id")
"""Names that a spec only counts."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def _shards(slots: Iterable[Slot]) -> list[list[Slot]]:
    shards: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if shards[-1] and size + nbytes(slot.tensor) > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(slot)
        size += nbytes(slot.tensor)
    return shards
