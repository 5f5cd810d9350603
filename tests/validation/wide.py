"""The trained demo, wider and the same function: its own sizes do not divide by groups of 128.

Hidden channels and query heads that are zero throughout are put between those that are there, in a seeded order, and
key heads are repeated. The mean square over more channels is smaller, which the weights of the norms and eps undo.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, HEADS, KV_HEADS = 256, 16, 8


def widened(plain: Path, directory: Path) -> Path:
    """`plain` is the demo as a Hugging Face directory."""
    config: dict[str, Any] = json.loads((plain / "config.json").read_text())
    hidden, heads, kv_heads = (config[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads"))
    size, per_group = config["head_dim"], HEADS // KV_HEADS
    channels = torch.from_numpy(np.sort(np.random.default_rng(3).permutation(HIDDEN)[:hidden]))
    # Head i of old group g reads any copy of that group: copies of g are the new key heads 4 g to 4 g + 3.
    copies, old = KV_HEADS // kv_heads, heads // kv_heads
    places = torch.tensor([group * copies * per_group + 2 * index for group in range(kv_heads) for index in range(old)])

    def on_channels(tensor: Tensor, axis: int) -> Tensor:
        return _spread(tensor, axis, channels, HIDDEN)

    def on_heads(tensor: Tensor, axis: int) -> Tensor:
        shape = (*tensor.shape[:axis], heads, size, *tensor.shape[axis + 1 :])
        return _spread(tensor.reshape(shape), axis, places, HEADS).flatten(axis, axis + 1)

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.reshape(kv_heads, size, -1).repeat_interleave(copies, 0).flatten(0, 1)

    def wide(name: str, tensor: Tensor) -> Tensor:
        match name.removesuffix(".weight").rpartition(".")[2]:
            case "q_proj":
                return on_channels(on_heads(tensor, 0), 1)
            case "k_proj" | "v_proj":
                return on_channels(repeated(tensor), 1)
            case "o_proj":
                return on_channels(on_heads(tensor, 1), 0)
            case "down_proj":
                return on_channels(tensor, 0)
            case last if "norm" in last:
                return on_channels(tensor * (hidden / HIDDEN) ** 0.5, 0)
            case _:
                return on_channels(tensor, 1)

    stored = load_file(plain / "model.safetensors")
    directory.mkdir(parents=True)
    made = {name: wide(name, tensor.float()).contiguous() for name, tensor in stored.items()}
    save_file(made, directory / "model.safetensors", {"format": "pt"})
    config |= {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rms_norm_eps": config["rms_norm_eps"] * hidden / HIDDEN,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _spread(tensor: Tensor, axis: int, places: Tensor, size: int) -> Tensor:
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    return torch.zeros(shape, dtype=tensor.dtype).index_copy(axis, places, tensor)
