"""Twins of ModelOpt's exports: a tiny llama quantized here, with torch, in the layout that ModelOpt 0.47 writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemoport.spec import Attention, Block, Dense, LanguageModel, ModelSpec, Norm, Rope

from . import made
from .fixtures import DATA

CKPT = DATA / "trtllm/ckpt"
SPEC = ModelSpec(
    family="llama",
    vocab_size=131,
    hidden_size=256,
    max_positions=128,
    norm=Norm(eps=1e-6),
    head=LanguageModel(),
    blocks=(
        Block(
            mixer=Attention(heads=8, kv_heads=4, head_dim=32, rope=Rope(dims=32)),
            ffn=Dense(intermediate=512),
        ),
    )
    * 2,
)
SMALL = replace(SPEC, hidden_size=128, blocks=(replace(SPEC.blocks[0], ffn=Dense(intermediate=384)),) * 2)

Fields = dict[str, Tensor]
"""What follows the name of a linear, and its tensor."""
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fp8(w: Tensor, amax: Tensor, linear: str) -> tuple[Fields, Tensor]:
    scale = amax / 448
    weight = (w / scale).to(torch.float8_e4m3fn)
    return {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor(0.25)}, weight.float() * scale


def int8(w: Tensor, amax: Tensor, linear: str) -> tuple[Fields, Tensor]:
    scale = w.abs().amax(1) / 127
    weight = (w / scale[:, None]).round().to(torch.int8)
    return {"weight": weight, "weight_scale": scale}, weight.float() * scale[:, None]


def int8_sq(w: Tensor, amax: Tensor, linear: str) -> tuple[Fields, Tensor]:
    before = torch.linspace(0.5, 2, w.shape[1]).bfloat16()
    fields, numbers = int8(w / before, amax, linear)
    more = {"pre_quant_scale": before, "input_scale": torch.tensor(1 / 127)}
    return fields | more, numbers * before


def _int4(w: Tensor) -> tuple[Fields, Tensor]:
    scale = w.reshape(len(w), -1, 128).abs().amax(2) / 7
    whole = scale.repeat_interleave(128, 1)
    q = (w / whole).round().clamp(-8, 7).to(torch.int32)
    return {"weight": ((q[0::2] & 15) | (q[1::2] & 15) << 4).to(torch.uint8), "weight_scale": scale}, q * whole


def int4_awq(w: Tensor, amax: Tensor, linear: str) -> tuple[Fields, Tensor]:
    """Where a norm feeds the layer, its weight has the pre-scale."""
    if linear not in ("o_proj", "down_proj"):
        return _int4(w)
    before = torch.linspace(0.5, 2, w.shape[1]).bfloat16()
    fields, numbers = _int4(w / before)
    return fields | {"pre_quant_scale": before}, numbers * before


def nvfp4(w: Tensor, amax: Tensor, linear: str) -> tuple[Fields, Tensor]:
    whole = amax / (6 * 448)
    scale = (w.reshape(len(w), -1, 16).abs().amax(2) / (6 * whole)).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    each = scale.float().repeat_interleave(16, 1) * whole
    code = (w / each)[..., None].sub(E2M1).abs().argmin(-1).to(torch.uint8)
    fields = {"weight": code[:, 0::2] | code[:, 1::2] << 4, "weight_scale": scale, "weight_scale_2": whole}
    return fields | {"input_scale": torch.tensor(0.125)}, E2M1[code.long()] * each


@dataclass(frozen=True)
class Method:
    quantize: Callable[[Tensor, Tensor, str], tuple[Fields, Tensor]]
    said: dict[str, Any]


METHODS = {
    "fp8": Method(fp8, {"quant_algo": "FP8"}),
    "int4_awq": Method(
        int4_awq, {"quant_algo": "W4A16_AWQ", "group_size": 128, "has_zero_point": False, "pre_quant_scale": True}
    ),
    "nvfp4": Method(nvfp4, {"quant_algo": "NVFP4", "group_size": 16}),
    "int8": Method(int8, {"quant_algo": "W8A16"}),
    "int8_sq": Method(int8_sq, {"quant_algo": "W8A8_SQ_PER_CHANNEL"}),
}


@dataclass(frozen=True)
class Twin:
    path: Path
    numbers: dict[str, Tensor]
    """What the stored tensors stand for, by the names of the weights."""


def save(path: Path, method: str, spec: ModelSpec = SPEC, *, shared: bool = True, kv_cache: bool = False) -> Twin:
    """`shared`: weights that runtimes fuse have the same scales, as if their loader had seen to it."""
    generator = torch.Generator().manual_seed(7)
    stored: dict[str, Tensor] = {}
    numbers: dict[str, Tensor] = {}
    plain = {
        binding.stored: torch.randn(binding.shape, generator=generator) / 16
        for binding in made.bound(spec, "huggingface")
    }
    for name, w in plain.items():
        if "proj" not in name:
            stored[name] = numbers[name] = (w + ("norm" in name)).bfloat16()
            continue
        head, linear, _ = name.rsplit(".", 2)
        group = next((group for group in FUSED if linear in group), (linear,)) if shared else (linear,)
        amax = torch.stack([plain[f"{head}.{each}.weight"].abs().max() for each in group]).max()
        fields, numbers[name] = METHODS[method].quantize(w, amax, linear)
        stored |= {f"{head}.{linear}.{suffix}": tensor for suffix, tensor in fields.items()}
        if kv_cache and linear in ("k_proj", "v_proj"):
            stored[f"{head}.{linear}.{linear[0]}_scale"] = torch.tensor(0.5)
    path.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in stored.items()},
        path / "model.safetensors",
        {"format": "pt"},
    )
    _describe(path, method, spec, "FP8" if kv_cache else None)
    return Twin(path, numbers)


def _describe(path: Path, method: str, spec: ModelSpec, kv_cache: str | None) -> None:
    """In ModelOpt's own words where it wrote a fixture, with the numbers of this model."""
    template = CKPT / (f"hf_{method}" if (CKPT / f"hf_{method}").is_dir() else "hf_fp8")
    description = json.loads((template / "hf_quant_config.json").read_text())
    description["quantization"] |= METHODS[method].said | {"kv_cache_quant_algo": kv_cache}
    (path / "hf_quant_config.json").write_text(json.dumps(description, indent=4))
    inside = json.loads((template / "config.json").read_text())["quantization_config"]
    inside |= {"quant_algo": METHODS[method].said["quant_algo"]}
    config = made.config(spec, "huggingface") | {"torch_dtype": "bfloat16", "quantization_config": inside}
    (path / "config.json").write_text(json.dumps(config))


every_method = pytest.mark.parametrize("method", METHODS)


def stored_bytes(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]:
    return {
        name: (tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in load_file(path).items()
    }
