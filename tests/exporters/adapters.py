"""Adapters to merge: the fixture's, and others that are made up in each writer's words."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from nemoport.exporters import convert, source, stream
from nemoport.exporters.tensor import Held, LazyTensor
from nemoport.spec import ModelSpec, Plan, tensors

from .fixtures import HUGGINGFACE, LLAMA, MEGATRON
from .made import SPECS, bound, save_huggingface, torch_tensor

ADAPTER = MEGATRON / "lora/bridge_adapter"
BASE = LLAMA["torch_dist at tp 2 pp 2"]
WEIGHTS = "adapter_model.safetensors"
Numbers = dict[str, Tensor]


def merged(
    to: str, destination: Path, adapter: Path = ADAPTER, mode: Any = "merge", base: Path = HUGGINGFACE, **plan: Any
) -> Path:
    job = convert.plan(base, to, destination, plan=Plan(**plan), adapter=adapter, adapter_mode=mode)
    stream.run(job)
    return destination


def random_numbers(spec: ModelSpec) -> dict[str, LazyTensor]:
    """Every canonical tensor in float32, of ordinary numbers."""
    bits = np.random.default_rng(11)
    return {name: Held(bits.normal(0, 0.3, t.shape).astype(np.float32), "float32") for name, t in tensors(spec).items()}


def random_pair(out: int, inner: int, *, seed: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    """A and B, in bfloat16, whose products are exact in float64."""
    bits = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inner, generator=bits), torch.randn(out, rank, generator=bits)
    return a.bfloat16(), b.bfloat16()


def megatron_factors(spec: ModelSpec) -> dict[str, tuple[Tensor, Tensor]]:
    """A pair for every linear of every layer, as Megatron fuses them."""
    linears = [each for each in bound(spec, "megatron") if ".linear_" in each.stored and len(each.shape) == 2]
    return {
        each.stored.removesuffix(".weight"): random_pair(*each.shape, seed=seed) for seed, each in enumerate(linears)
    }


def save_adapter(
    directory: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    said: Mapping[str, Any],
    more: Mapping[str, Tensor] | None = None,
) -> Path:
    """A LoRA in Megatron's names, a key a layer, written by torch; its scaling in lora.json."""
    named = {
        f"module.{linear}.adapter.linear_{side}.weight": factor.clone()
        for linear, pair in factors.items()
        for side, factor in zip(("in", "out"), pair, strict=True)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_distributed(
            named | {name: tensor.clone() for name, tensor in (more or {}).items()},
            checkpoint_id=directory,
            no_dist=True,
        )
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (directory / "lora.json").write_text(json.dumps(said))
    return directory


def fit(
    directory: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    said: Mapping[str, Any],
    spec: ModelSpec = SPECS["llama"]["plain"],
    more: Mapping[str, Tensor] | None = None,
) -> None:
    base = save_huggingface(directory / "base", spec, random_numbers(spec))
    source.model(base, adapter=save_adapter(directory / "adapter", factors, said, more))


def save_peft(directory: Path, base: Path, options: Mapping[str, Any]) -> None:
    """An adapter of every linear, trained by chance, as peft saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import transformers

        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=linears, **options))
        bits = torch.Generator().manual_seed(3)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=bits)
        adapted.save_pretrained(directory)


def merged_by_peft(base: Path, adapter: Path) -> Numbers:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged: Numbers = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return merged


def sum_of(weight: LazyTensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    whole = torch_tensor(weight)
    return (whole.double() + scale * (b.double() @ a.double())).to(whole.dtype)
