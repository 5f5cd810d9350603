"""Checkpoints made of random canonical tensors, with the layouts read backwards: `join` writes what `split` reads."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nemoport.exporters import configs, source
from nemoport.exporters.dtypes import words
from nemoport.exporters.rules import Binding, bindings
from nemoport.exporters.tensor import Held, LazyTensor, read
from nemoport.spec import (
    Attention,
    Block,
    Dense,
    LanguageModel,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    Norm,
    Rope,
    tensors,
)

_ATTENTION = Attention(heads=10, kv_heads=5, head_dim=6, rope=Rope(dims=6, base=5e5))


def _llama(*, tied: bool = False, ffn_bias: bool = False, scaling: Any = None, **mixer: Any) -> ModelSpec:
    """Awkward on purpose: five groups, heads of 6, hidden 10 (not heads x 6), 131 tokens."""
    rope = Rope(dims=6, base=5e5, scaling=scaling)
    block = Block(mixer=replace(_ATTENTION, rope=rope, **mixer), ffn=Dense(intermediate=14, bias=ffn_bias))
    return ModelSpec(
        family="llama",
        vocab_size=131,
        hidden_size=10,
        max_positions=77,
        norm=Norm(eps=1e-6),
        head=LanguageModel(tied=tied),
        blocks=(block,) * 3,
    )


SPECS: Mapping[str, Mapping[str, ModelSpec]] = {
    "llama": {
        "plain": _llama(),
        "tied": _llama(tied=True),
        "window": _llama(window=5),
        "qkv bias": _llama(qkv_bias=True),
        "every bias": _llama(qkv_bias=True, out_bias=True, ffn_bias=True),
        "attention bias": _llama(qkv_bias=True, out_bias=True),
        "qk norm, tied": _llama(qk_norm=True, tied=True),
        "one group": _llama(kv_heads=1),
        "no groups": _llama(kv_heads=10),
        "llama 3 scaling": _llama(scaling=Llama3Scaling(factor=4.0, original_max_positions=64)),
        "linear scaling": _llama(scaling=LinearScaling(factor=3.0)),
    }
}
"""Models whose every corner is looked at; those of other families are in `tests/families`."""
SAID = {
    ("llama", "megatron"): set(SPECS["llama"]) - {"attention bias"},
    ("llama", "huggingface"): set(SPECS["llama"]),
    ("llama", "trtllm"): set(SPECS["llama"]) - {"window", "qk norm, tied"},
}
"""The models that the configs of a naming can say; the others must be refused."""


def random_tensors(spec: ModelSpec, dtype: str = "bfloat16", seed: int = 1234) -> dict[str, LazyTensor]:
    """Every canonical tensor, of random bits."""
    bits = np.random.default_rng(seed)
    top = 2 ** (8 * words(dtype).itemsize)
    return {
        name: Held(bits.integers(0, top, tensor.shape, dtype=np.uint64).astype(words(dtype)), dtype)
        for name, tensor in tensors(spec).items()
    }


def bound(spec: ModelSpec, naming: str) -> list[Binding]:
    """The stored tensors of a model in one naming, each canonical tensor once."""
    column, seen, found = source.column(spec.family, naming, "give it one"), set[str](), []
    for binding in bindings(column.rules, tensors(spec)):
        if not seen & (parts := {part.name for part in binding.parts}):
            seen |= parts
            found.append(binding)
    return found


def stored(spec: ModelSpec, naming: str, canonical: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {
        binding.stored: binding.layout.join([canonical[part.name] for part in binding.parts], binding.parts)
        for binding in bound(spec, naming)
    }


def config(spec: ModelSpec, naming: str) -> dict[str, Any]:
    return configs.write(source.column(spec.family, naming, "give it one").dialects, spec, "make another")


def torch_tensor(tensor: LazyTensor) -> torch.Tensor:
    whole = np.ascontiguousarray(read(tensor)).view(words(tensor.dtype))
    return torch.from_numpy(whole.view(f"i{whole.itemsize}")).view(getattr(torch, tensor.dtype))


def save_huggingface(directory: Path, spec: ModelSpec, canonical: Mapping[str, LazyTensor]) -> Path:
    directory.mkdir(parents=True)
    named = {name: torch_tensor(tensor).clone() for name, tensor in stored(spec, "huggingface", canonical).items()}
    save_file(named, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config(spec, "huggingface")))
    return directory


def save_torch_dist(
    directory: Path, spec: ModelSpec, canonical: Mapping[str, LazyTensor], prefix: str = "", more: Any = None
) -> Path:
    """What torch itself writes, a key a layer."""
    from torch.distributed.checkpoint.state_dict_saver import save

    named = {
        prefix + name: torch_tensor(tensor).clone() for name, tensor in stored(spec, "megatron", canonical).items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(named | (more or {}), checkpoint_id=directory, no_dist=True)
    return directory


def save_sparse(directory: Path, spec: ModelSpec, dtype: str = "bfloat16") -> Path:
    """A Hugging Face model of any size that takes no room."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config(spec, "huggingface")))
    shapes = {binding.stored: binding.shape for binding in bound(spec, "huggingface")}
    save_holes(directory / "model.safetensors", shapes, dtype)
    return directory


def save_holes(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str = "bfloat16",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A safetensors file whose numbers are a hole, all zeros."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    code, width = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}[dtype]
    for name, shape in shapes.items():
        end = position + math.prod(shape) * width
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        os.truncate(file.fileno(), 8 + len(text) + position)


def save_filled(directory: Path, **sizes: Any) -> Path:
    """As `save_sparse`, with random numbers."""
    save_sparse(directory, sized(**sizes))
    path = directory / "model.safetensors"
    with path.open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        file.seek(start)
        bits = np.random.default_rng(5)
        while (left := path.stat().st_size - file.tell()) > 0:
            file.write(bits.bytes(min(left, 2**24)))
            file.flush()
    return directory


def sized(*, layers: int, hidden: int, ffn: int, vocab: int, heads: int = 8) -> ModelSpec:
    mixer = Attention(heads=heads, kv_heads=2, head_dim=hidden // heads, rope=Rope(dims=hidden // heads))
    return ModelSpec(
        family="llama",
        vocab_size=vocab,
        hidden_size=hidden,
        max_positions=128,
        norm=Norm(eps=1e-6),
        head=LanguageModel(),
        blocks=(Block(mixer=mixer, ffn=Dense(intermediate=ffn)),) * layers,
    )
