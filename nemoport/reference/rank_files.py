"""The `rank{N}.safetensors` of a TensorRT-LLM checkpoint directory, each as its rank would load it.

The words of the format are written down here again, apart from those of the exporter, so that the two check each
other. All linear weights are [out, in]; layers count from 0 in every pipeline stage.

    attention.qkv.weight    [q; k; v] of the rank's heads, KV heads repeated where there are fewer than ranks
    attention.dense.weight  the output projection, cut along its input; its bias is whole on every rank
    mlp.fc, mlp.gate        gate and up (in this order), cut along their output
    mlp.proj                down, cut like attention.dense
                            (not gated: mlp.fc is the up-projection)
    mlp.router              of experts: whole, and float32 always
    mlp.fc, mlp.proj        of experts: [experts of the rank, up then gate, in] and [experts of the rank, out, in]
    lm_head.weight          rows padded to a multiple of tp, then cut; on the last stage
    vocab_embedding.weight  on the first stage; whole, or cut along `embedding_sharding_dim`

No file is read beyond its header before all of them have been checked.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.dtypes import BY_SAFETENSORS, itemsize
from nemoport.exporters.tensor import Files, LazyTensor, cut, squeeze
from nemoport.reference import rank_config
from nemoport.reference.rank_config import Windows
from nemoport.spec import Block, FeedForward, Mixture, ModelSpec, Plan, tensors

ENDS = {
    "transformer.vocab_embedding": "embed",
    "transformer.position_embedding": "positions",
    "transformer.ln_f": "norm",
    "lm_head": "head",
}
ATTENTION = {
    "attention.qkv": ("attn.q", "attn.k", "attn.v"),
    "attention.dense": ("attn.o",),
    "input_layernorm": ("attn_norm",),
}
GATED = {"mlp.fc": ("ffn.gate",), "mlp.gate": ("ffn.up",), "mlp.proj": ("ffn.down",)}
PLAIN = {"mlp.fc": ("ffn.up",), "mlp.proj": ("ffn.down",)}
EXPERTS = {"mlp.fc": ("up", "gate"), "mlp.proj": ("down",)}
"""A stored tensor of a layer, and what of each expert is stacked in it."""
NORMS = {"post_layernorm": ("ffn_norm",)}
NORMS_OF_GEMMA_2 = {
    "post_layernorm": ("attn_post_norm",),
    "pre_feedforward_layernorm": ("ffn_norm",),
    "post_feedforward_layernorm": ("ffn_post_norm",),
}
"""A stored tensor of a layer, and the canonical ones stacked in it."""

ADDED_ONCE = re.compile(r"\.(attn\.o|ffn\.down)\.bias$")
"""Whole on every rank, and used by the first of each stage: the others would add it again."""
ROUTER = re.compile(r"\.mlp\.router\.weight$")


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """A checked directory. `ranks[N]` has the tensors of `rank{N}.safetensors` under canonical names and in local
    sizes, those of the vocabulary included."""

    spec: ModelSpec
    plan: Plan
    embedding_axis: int | None
    """The axis along which the embedding is cut over the tp ranks; None: each has the whole."""
    ranks: tuple[Mapping[str, LazyTensor], ...]


def read(directory: Path, max_attention_window: Windows = None) -> Ranked:
    """Read the config and every header. The format knows no sliding window: TensorRT-LLM is told it at run time."""
    spec, plan, axis = rank_config.read(directory / "config.json", max_attention_window)
    _check_names(directory, plan.world)
    files = Files()
    return Ranked(
        spec=spec,
        plan=plan,
        embedding_axis=axis,
        ranks=tuple(_rank(directory, files, spec, plan, axis, rank) for rank in range(plan.world)),
    )


def _check_names(directory: Path, world: int) -> None:
    found = {path.name for path in directory.glob("rank*.safetensors")}
    needed = {f"rank{rank}.safetensors" for rank in range(world)}
    if missing := sorted(needed - found):
        raise DamagedInput(f"{directory} lacks {missing[0]} ({len(missing)} of {world} ranks); convert again")
    if surplus := sorted(found - needed):
        raise DamagedInput(f"{directory} has {surplus[0]}, but its config.json speaks of {world} ranks; convert again")


def _rank(
    directory: Path, files: Files, spec: ModelSpec, plan: Plan, axis: int | None, rank: int
) -> dict[str, LazyTensor]:
    path = directory / f"rank{rank}.safetensors"
    sizes = _local_shapes(spec, plan, axis, rank)
    layout, stacks = _layout(spec.blocks[0], sizes), _stacks(spec.shard(plan, rank))
    stored = _stored(path, files)
    assert plan.dtype is not None
    needed = {
        name: ("float32" if ROUTER.search(name) else plan.dtype, _stacked_shape(sizes, parts))
        for name, parts in layout.items()
    }
    for name, stack in stacks.items():
        needed[name] = plan.dtype, (len(stack), *_stacked_shape(sizes, stack[0]))
    _check_tensors(path, stored, needed, _buffers(spec))
    local: dict[str, LazyTensor] = {}
    for name, parts in layout.items():
        local |= _taken_apart(stored[name], parts, sizes)
    for name, stack in stacks.items():
        for expert, parts in enumerate(stack):
            local |= _taken_apart(squeeze(cut(stored[name], 0, expert, expert + 1)), parts, sizes)
    adds_biases = rank % plan.tp == 0
    return {name: tensor for name, tensor in local.items() if adds_biases or not ADDED_ONCE.search(name)}


def _taken_apart(
    stored: LazyTensor, parts: tuple[str, ...], sizes: Mapping[str, tuple[int, ...]]
) -> dict[str, LazyTensor]:
    """The canonical tensors that follow one another along the first axis."""
    found, start = {}, 0
    for part in parts:
        stop = start + sizes[part][0]
        found[part] = cut(stored, 0, start, stop)
        start = stop
    return found


def _stacked_shape(sizes: Mapping[str, tuple[int, ...]], parts: tuple[str, ...]) -> tuple[int, ...]:
    return (sum(sizes[part][0] for part in parts), *sizes[parts[0]][1:])


def _local_shapes(spec: ModelSpec, plan: Plan, axis: int | None, rank: int) -> dict[str, tuple[int, ...]]:
    """Canonical names to the shapes that this rank has; its stage decides which it has at all."""
    stage, last = rank // plan.tp, plan.pp - 1
    sizes = {name: tensor.shape for name, tensor in tensors(spec.shard(plan, rank)).items()}
    rows = -(-spec.vocab_size // plan.tp)
    sizes["embed.weight"] = {
        None: (spec.vocab_size, spec.hidden_size),
        0: (rows, spec.hidden_size),
        1: (spec.vocab_size, spec.hidden_size // plan.tp),
    }[axis]
    if not spec.language_model.tied:
        sizes["head.weight"] = (rows, spec.hidden_size)
    elsewhere = {"embed.weight", "positions.weight"} if stage != 0 else set()
    elsewhere |= {"head.weight", "norm.weight", "norm.bias"} if stage != last else set()
    return {name: shape for name, shape in sizes.items() if name not in elsewhere}


def _stacks(local: ModelSpec) -> dict[str, list[tuple[str, ...]]]:
    """Stored name -> for each expert of the rank, the canonical tensors that are its place in the stack."""
    return {
        f"transformer.layers.{layer}.{stored}.weight": [
            tuple(f"layers.{layer}.ffn.experts.{expert}.{part}.weight" for part in parts) for expert in block.ffn.local
        ]
        for layer, block in enumerate(local.blocks)
        if isinstance(block.ffn, Mixture)
        for stored, parts in EXPERTS.items()
    }


def _layout(block: Block, sizes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[str, ...]]:
    """Stored name -> the canonical tensors stacked in it along the first axis. All blocks are alike."""
    whole: dict[str, tuple[str, ...]] = {stored: (canonical,) for stored, canonical in ENDS.items()}
    of_a_layer = {
        **ATTENTION,
        **_feed_forward(block.ffn),
        **(NORMS_OF_GEMMA_2 if block.post_norms else NORMS),
    }
    layers = {int(name.split(".")[1]) for name in sizes if name.startswith("layers.")}
    for layer in sorted(layers):
        for stored, parts in of_a_layer.items():
            whole[f"transformer.layers.{layer}.{stored}"] = tuple(f"layers.{layer}.{part}" for part in parts)
    return {
        f"{stored}.{kind}": tuple(f"{part}.{kind}" for part in parts)
        for stored, parts in whole.items()
        for kind in ("weight", "bias")
        if f"{parts[0]}.{kind}" in sizes
    }


def _feed_forward(ffn: FeedForward | None) -> Mapping[str, tuple[str, ...]]:
    if isinstance(ffn, Mixture):
        return {"mlp.router": ("ffn.router",)}
    return GATED if ffn and ffn.gated else PLAIN


def _buffers(spec: ModelSpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tables of angles that TensorRT-LLM's own saver leaves in every rank, and that its loader does without."""
    if (rope := spec.mixers[0].rope) is None:
        return {}
    return {
        "embed_positions": ("float32", (1, spec.max_positions, rope.dims)),
        "embed_positions_for_gpt_attention": ("float32", (1, spec.max_positions * rope.dims)),
        "rotary_inv_freq": ("float32", (rope.dims // 2,)),
    }


def _check_tensors(
    path: Path,
    stored: Mapping[str, LazyTensor],
    needed: Mapping[str, tuple[str, tuple[int, ...]]],
    optional: Mapping[str, tuple[str, tuple[int, ...]]],
) -> None:
    wrong = [f"{name} is missing, {_words(*needed[name])} needed" for name in needed if name not in stored]
    known = {**needed, **optional}
    for name, tensor in stored.items():
        found = _words(tensor.dtype, tensor.shape)
        if name not in known:
            wrong.append(f"{name} is there as {found}, no such tensor needed")
        elif found != _words(*known[name]):
            wrong.append(f"{name} is {found}, {_words(*known[name])} needed")
    if wrong:
        raise DamagedInput(f"{path}: {wrong[0]} ({len(wrong)} such tensors); convert again")


def _words(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def _stored(path: Path, files: Files) -> dict[str, LazyTensor]:
    """safetensors: the header's length as 8 bytes, the header as JSON, then the bytes of the tensors."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 <= length <= path.stat().st_size - 8:
            raise DamagedInput(f"{path} is truncated: its header does not fit into {path.stat().st_size} bytes")
        text = file.read(length)
    try:
        rows = {name: row for name, row in json.loads(text).items() if name != "__metadata__"}
        return {name: _array(path, files, 8 + length, name, row) for name, row in rows.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedInput(f"{path} has a damaged header ({error}); convert again") from error


def _array(path: Path, files: Files, base: int, name: str, row: Mapping[str, Any]) -> LazyTensor:
    if row["dtype"] not in BY_SAFETENSORS:
        raise UnsupportedInput(f"{path}: {name} has dtype {row['dtype']}, which nemoport does not read")
    dtype, shape, (start, stop) = BY_SAFETENSORS[row["dtype"]].name, tuple(row["shape"]), row["data_offsets"]
    if start < 0 or stop - start != (needed := prod(shape) * itemsize(dtype)):
        raise ValueError(f"{name} has {stop - start} bytes, {needed} needed")
    return files.array(path, offset=base + start, shape=shape, dtype=dtype)
