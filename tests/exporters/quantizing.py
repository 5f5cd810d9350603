"""Models to quantize, statistics of them, and what ModelOpt made of one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from safetensors.torch import load_file
from torch import Tensor

from nemoport import calibration, plugins
from nemoport.exporters import convert, statistics, stream
from nemoport.exporters.dequantized import QUANTIZERS
from nemoport.exporters.dtypes import real
from nemoport.exporters.methods import rows
from nemoport.exporters.quantizers import int4_awq
from nemoport.exporters.statistics import Statistics
from nemoport.exporters.tensor import Held, LazyTensor
from nemoport.spec import Attention, Block, Dense, ModelSpec, Plan, Recipe, Rope, tensors

from .fixtures import DATA
from .modelopt import SPEC

JUDGE = DATA / "modelopt"
EXPORTS: dict[str, Any] = json.loads((JUDGE / "exports.json").read_text())
METHODS = tuple(row.method for row in rows() if row.dialect == "modelopt" and row.loads)
WIDE = replace(
    SPEC,
    hidden_size=512,
    blocks=(
        Block(
            mixer=Attention(heads=8, kv_heads=4, head_dim=64, rope=Rope(dims=64)),
            ffn=Dense(intermediate=512),
        ),
    ),
)
"""Divides by the groups of int4 at tp 4."""


def quantized(
    path: Path, to: str, out: Path, method: str, *, stats: Path | None = None, workers: int = 2, **plan: Any
) -> Path:
    recipe = Recipe(method=method, **{key: plan.pop(key) for key in ("kv_cache", "exclude") if key in plan})
    found = calibration.from_statistics(stats) if stats and (recipe.kv_cache or needs(method, to)) else None
    job = convert.plan(path, to, out, plan=Plan(recipe=recipe, **plan), calibration=found)
    stream.run(replace(job, workers=workers))
    return out


def needs(method: str, to: str) -> bool:
    module = plugins.load(QUANTIZERS, method)
    return bool(module.NEEDS["modelopt" if to == "hf" else "trtllm"])


def digest(tensor: Tensor) -> list[Any]:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), blake3(content).hexdigest()[:32]]


def digests(path: Path) -> dict[str, list[Any]]:
    return {name: digest(tensor) for name, tensor in load_file(path).items()}


def digests_of(wanted: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {name: row[:3] for name, row in wanted.items()}


def statistics_for(spec: ModelSpec, path: Path) -> Path:
    """Made up, of awkward sizes: positive, no two channels alike."""
    random = np.random.default_rng(5)
    arrays = {}
    sizes = np.exp(random.standard_normal(4096)).astype(np.float32)
    for name, tensor in tensors(spec).items():
        if len(tensor.shape) == 2 and name.startswith("layers."):
            linear = name.removesuffix(".weight")
            arrays[f"{linear}/amax"] = sizes[: tensor.shape[1]]
            arrays[f"{linear}/mean"] = sizes[: tensor.shape[1]] * np.float32(0.3)
            arrays[f"{linear}/losses"] = random.random(len(int4_awq.EXPONENTS)).astype(np.float32)
            if linear.endswith("attn.q"):
                mixer = linear.removesuffix(".q")
                arrays |= {f"{mixer}/keys": np.array(700, np.float32), f"{mixer}/values": np.array(900, np.float32)}
    path.write_bytes(statistics.to_bytes(Statistics(arrays)))
    return path


def normal(spec: ModelSpec) -> dict[str, LazyTensor]:
    """Weights as a model has them: small, and norms about what changes nothing."""
    random = np.random.default_rng(8)
    found: dict[str, LazyTensor] = {}
    for name, tensor in tensors(spec).items():
        numbers = random.standard_normal(tensor.shape) / (16 if len(tensor.shape) == 2 else 8)
        centre = name.endswith("norm.weight") and not spec.norm.zero_centered
        found[name] = Held((numbers + centre).astype(real("bfloat16")), "bfloat16")
    return found
