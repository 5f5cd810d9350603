"""A synthetic llama in torch_dist, stacked, as Megatron-core writes it at a given TP: one `.distcp` a rank and thread,
torch.save archives back to back, `.metadata` pickled from torch's own classes. Normal numbers, no training."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)


@dataclass(frozen=True)
class Shape:
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int

    @property
    def config(self) -> dict[str, object]:
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_query_groups": self.kv_heads,
            "ffn_hidden_size": self.ffn,
            "vocab_size": self.vocab,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": "silu",
            "add_bias_linear": False,
            "position_embedding_type": "rope",
            "max_sequence_length": 4096,
        }


TWO_GB = Shape(layers=16, hidden=2048, heads=32, kv_heads=8, ffn=8192, vocab=32000)
SMALL = Shape(layers=4, hidden=512, heads=8, kv_heads=4, ffn=1536, vocab=8192)


def write(directory: Path, shape: Shape, tp: int, seed: int = 1) -> int:
    """Write the checkpoint, and its architecture to `config.json` beside it; the bytes of its tensors."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    files = [(directory / f"__{rank}_{thread}.distcp").open("wb") for rank in range(tp) for thread in (0, 1)]
    entries, places, total = {}, {}, 0
    for name, size, chunks in _tensors(shape, tp):
        described = []
        for number, (offsets, sizes, rank) in enumerate(chunks):
            numbers = torch.empty(sizes, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            content = io.BytesIO()
            torch.save(numbers, content)
            file = files[2 * rank + number % 2]
            place = _StorageInfo(Path(file.name).name, file.tell(), content.tell())
            places[MetadataIndex(name, torch.Size(offsets))] = place
            file.write(content.getbuffer())
            described.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
            total += numbers.numel() * 2
        properties = TensorProperties(dtype=torch.bfloat16)
        entries[name] = TensorStorageMetadata(properties, torch.Size(size), described)
    for file in files:
        file.close()
    with (directory / ".metadata").open("wb") as index:
        pickle.dump(Metadata({**entries}, None, places), index)
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    directory.with_suffix(".json").write_text(json.dumps(shape.config))
    return total


Chunk = tuple[tuple[int, ...], tuple[int, ...], int]


def _tensors(shape: Shape, tp: int) -> Iterator[tuple[str, tuple[int, ...], list[Chunk]]]:
    """Name, global size, and chunks: corner, sizes, the rank that wrote it."""
    h, f, kv = shape.hidden, shape.ffn, shape.kv_heads
    qkv = (shape.heads + 2 * kv) * (h // shape.heads)
    rows = -(-shape.vocab // (128 * tp)) * 128 * tp
    layers = "decoder.layers."
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        yield name, (rows, h), [((r * rows // tp, 0), (rows // tp, h), r) for r in range(tp)]
    yield "decoder.final_layernorm.weight", (h,), [((0,), (h,), 0)]
    for name in ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"):
        yield layers + name, (shape.layers, h), [((i, 0), (1, h), 0) for i in range(shape.layers)]
    # fc1 is [gate; up], and every rank writes its slices of both.
    for name, out, inner, axis, parts in (
        ("self_attention.linear_qkv.weight", qkv, h, 1, 1),
        ("self_attention.linear_proj.weight", h, h, 2, 1),
        ("mlp.linear_fc1.weight", 2 * f, h, 1, 2),
        ("mlp.linear_fc2.weight", h, f, 2, 1),
    ):
        chunks = []
        for i in range(shape.layers):
            for rank in range(tp):
                for part in range(parts):
                    sizes = [1, out, inner]
                    sizes[axis] //= tp * parts
                    corner = [i, 0, 0]
                    corner[axis] = (part * tp + rank) * sizes[axis]
                    chunks.append((tuple(corner), tuple(sizes), rank))
        yield layers + name, (shape.layers, out, inner), chunks
