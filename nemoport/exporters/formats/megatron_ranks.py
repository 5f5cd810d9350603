"""Checkpoints of one torch.save file for each rank, put together again: tensor, pipeline and expert parallel.

Each file holds what its rank held, under the names that the rank gave it: local layers and local experts, from 0 on.

    tp_rank_01_pp_rank_000   decoder.layers.0.mlp.linear_fc1.weight   [gate_1; up_1]
    the whole model          decoder.layers.0.mlp.linear_fc1.weight   [gate_0; gate_1; up_0; up_1]

Which axis a tensor is cut along stands in no file, so it stands in a table here. Sources: megatron/core/
tensor_parallel/layers.py, megatron/core/transformer/{transformer_block,moe/experts}.py, megatron/training/
checkpointing.py; for the older names megatron/model/{language_model,transformer}.py of Megatron-LM 2 and 3, and
NeMo 1.x's nlp/modules/common/megatron.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.derived import transpose
from nemoport.exporters.formats import megatron, torch_zip
from nemoport.exporters.formats.torch_dist import Contents
from nemoport.exporters.formats.tree import Part, Tree
from nemoport.exporters.formats.unpickle import BEFORE_ZIP, Record, StoredTensor
from nemoport.exporters.tensor import LazyTensor, concat, cut, reshaped, unstacked

Place = tuple[int, int, int]
"""tp, pp and ep rank of a file."""

_CUT: Mapping[str, int | None] = {
    r"embedding\.word_embeddings\.weight": 0,
    r"output_layer\.(weight|bias)": 0,
    r".*\.linear_(qkv|q_proj|q_up_proj|kv_up_proj|fc1|fc1_2)\.(weight|bias)": 0,
    r".*\.core_attention\.softmax_offset": 0,
    r".*\.linear_(proj|fc2)\.weight": 1,
    r".*\.linear_(proj|fc2)\.bias": None,
    r".*\.linear_(q_down_proj|kv_down_proj)\.weight": None,
    r".*layer_?norm[._](weight|bias)": None,
    r"decoder\.final_norm\.weight": None,
    r".*\.router\.(weight|bias|expert_bias)": None,
    r".*\.shared_experts\.gate_weight": None,
    r"embedding\.(position|tokentype)_embeddings\.weight": None,
}
"""The axis along which tensor parallelism cuts; None where every rank has the whole."""

_RENAMED = (
    # The copy of a tied embedding on the last pipeline stage.
    (r"^word_embeddings(_for_head)?\.", "output_layer."),
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"\.attention\.", ".self_attention."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_h_to_4h_2\.", ".linear_fc1_2."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.final_norm\.", ".final_layernorm."),
    # NeMo's layers of Transformer Engine.
    (r"\.self_attention\.layernorm_qkv\.", ".self_attention.linear_qkv."),
    (r"\.self_attention\.proj\.", ".self_attention.linear_proj."),
    (r"\.layernorm_mlp\.layer_norm_", ".mlp.linear_fc1.layer_norm_"),
    (r"\.layernorm_mlp\.(fc[12])_(weight|bias)$", r".mlp.linear_\1.\2"),
)
"""Names from before Megatron-core, rewritten one after the other."""
_GROUPED = (r"\.experts\.linear_(fc[12])\.(weight|bias)(\d+)$", r".experts.local_experts.\3.linear_\1.\2")
"""Transformer Engine's grouped experts, under the names that single ones have."""

_LAYER = re.compile(r"(decoder\.layers\.)(\d{1,6})(\..+)")
_TOGETHER = re.compile(r"(.+\.)experts\.weight([12])")
_EXPERT = re.compile(r"(.+\.experts\.local_experts\.)(\d{1,6})(\..+)")
_DEEPEST, _MOST = 8, 1_000_000
"""Levels and entries of a state dict."""


@dataclass(frozen=True)
class Chunk:
    """The layers that a rank holds in one piece: all of its own, or those of one virtual pipeline stage."""

    tensors: Mapping[str, LazyTensor]
    objects: tuple[str, ...]
    """What is no weight: extra states."""


@dataclass(frozen=True)
class Rank:
    name: str
    """Of the file."""
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class File:
    """A file of a rank, opened: what was saved, as inert data, and how to reach its tensors."""

    name: str
    saved: Any
    tensors: Any

    def chunk(self, state: Any) -> Chunk:
        """A state dict of its, under Megatron-core's names."""
        tensors: dict[str, LazyTensor] = {}
        objects: list[str] = []
        if not isinstance(state, Mapping):
            raise DamagedInput(
                f"{self.name} holds a {type(state).__name__} for a state dict; copy the checkpoint again"
            )
        for stored, value in _flat(state, "", self.name, [0]):
            name = _current(stored)
            if megatron.skipped_by(name) or not isinstance(value, StoredTensor):
                objects.append(name)
            elif name in tensors:
                raise DamagedInput(f"{self.name} holds {name} twice, once as {stored}; copy the checkpoint again")
            else:
                tensors[name] = self.tensors(value, name)
        return Chunk(tensors, tuple(objects))


def opened(tree: Tree, name: str) -> File:
    store = tree.file(name)
    assert store is not None, name
    whole = Part(name, store, 0, store.size)  # so that errors say which of the many it is
    if bytes(store.view(0, min(store.size, len(BEFORE_ZIP)))) == BEFORE_ZIP:
        raise UnsupportedInput(
            f"{name} is in torch.save's format from before 1.6; load it with torch and save it again"
        )
    return File(name, torch_zip.load(whole), torch_zip.tensors(whole))


def old_names(state: Any) -> bool:
    """Whether a state dict is from before Megatron-core."""
    return isinstance(state, Mapping) and any(
        isinstance(name, str) and megatron.bare(name).startswith("language_model") for name in state
    )


def trained(ranks: Mapping[Place, Rank]) -> dict[str, int]:
    return {word: 1 + max(place[axis] for place in ranks) for axis, word in enumerate(("tp", "pp", "ep"))}


def gather(ranks: Mapping[Place, Rank]) -> Contents:
    """The whole model. Layers of virtual stages follow one another as their stages take turns."""
    tp, pp, ep = trained(ranks).values()
    if absent := next((place for place in product(range(tp), range(pp), range(ep)) if place not in ranks), None):
        raise DamagedInput(
            f"the file of rank (tp, pp, ep) {absent} is missing, there are {len(ranks)} of {tp * pp * ep}; "
            "copy the checkpoint again"
        )
    virtual = len(ranks[0, 0, 0].chunks)
    if other := next((rank.name for rank in ranks.values() if len(rank.chunks) != virtual), None):
        raise DamagedInput(f"{other} holds another number of virtual stages than the first rank's {virtual}")
    tensors: dict[str, LazyTensor] = {}
    objects: dict[str, None] = {}
    layers = 0
    for turn, stage in product(range(virtual), range(pp)):
        cells = [[ranks[t, stage, e] for t in range(tp)] for e in range(ep)]
        chunks = [[_singly(rank.chunks[turn], ep, rank.name) for rank in cell] for cell in cells]
        found = _stage(chunks, [cells[0][0].name, cells[-1][-1].name])
        for name, tensor in found.tensors.items():
            whole = _moved(_LAYER, name, layers)
            if tensors.setdefault(whole, tensor).shape != tensor.shape:
                raise DamagedInput(
                    f"{whole} has two shapes, {tensors[whole].shape} and {tensor.shape} at stage {stage}"
                )
        objects |= dict.fromkeys(_moved(_LAYER, name, layers) for name in found.objects)
        layers += _count(_LAYER, found.tensors, f"stage {stage}")
    return Contents(_with_ups(tensors), dict.fromkeys(objects))


def _stage(cells: Sequence[Sequence[Chunk]], names: Sequence[str]) -> Chunk:
    """What the ranks of one stage hold together, by local layers; `cells[ep][tp]`."""
    first = cells[0][0]
    for chunk in (chunk for cell in cells for chunk in cell):
        if odd := chunk.tensors.keys() ^ first.tensors.keys():
            raise DamagedInput(
                f"{min(odd)} is not in every rank from {names[0]} to {names[1]}; some are of another checkpoint"
            )
    experts: dict[str, int] = {}
    for name in first.tensors:
        if match := _EXPERT.fullmatch(name):
            experts[match[1]] = max(experts.get(match[1], 0), int(match[2]) + 1)
    tensors: dict[str, LazyTensor] = {}
    for name in first.tensors:
        match = _EXPERT.fullmatch(name)
        for rank, cell in enumerate(cells if match else cells[:1]):
            whole = _moved(_EXPERT, name, rank * experts[match[1]]) if match else name
            tensors[whole] = _joined(name, [chunk.tensors for chunk in cell])
    return Chunk(tensors, tuple(name for chunk in (cell[0] for cell in cells) for name in chunk.objects))


def _singly(chunk: Chunk, ep: int, where: str) -> Chunk:
    """The matrices that hold all experts of a rank taken apart, under the names that single ones have. GroupedMLP sees
    the memory of `weight1` [in, experts * out] as [experts, in, out], and that of `weight2` as [experts, out, in]."""
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in chunk.tensors.items():
        if (match := _TOGETHER.fullmatch(name)) is None:
            tensors[name] = tensor
            continue
        router = chunk.tensors.get(f"{match[1]}router.weight")
        count = router.shape[0] // ep if router else 0
        if len(tensor.shape) != 2 or not count or tensor.shape[match[2] == "1"] % count:
            raise DamagedInput(f"{name} in {where} has shape {list(tensor.shape)}, which is none of {count} experts")
        rows, columns = tensor.shape
        each = (rows, columns // count) if match[2] == "1" else (rows // count, columns)
        for expert, matrix in enumerate(unstacked(reshaped(tensor, (count, *each)))):
            tensors[f"{match[1]}experts.local_experts.{expert}.linear_fc{match[2]}.weight"] = transpose(matrix)
    return Chunk(tensors, chunk.objects)


def _joined(name: str, ranks: Sequence[Mapping[str, LazyTensor]]) -> LazyTensor:
    """A tensor from the parts of its tensor-parallel ranks."""
    parts = [rank[name] for rank in ranks]
    if len(parts) == 1:
        return parts[0]
    axis = next((axis for pattern, axis in _CUT.items() if re.fullmatch(pattern, name)), -1)
    if axis == -1:
        raise UnsupportedInput(
            f"nemoport does not know how tensor parallelism cuts {name}; save the checkpoint at tensor parallel 1"
        )
    if len({(part.shape, part.dtype) for part in parts}) != 1 or (axis is not None and len(parts[0].shape) <= axis):
        shapes = ", ".join(str(list(part.shape)) for part in parts[:4])
        raise DamagedInput(f"{name} has parts of {shapes} in its {len(parts)} ranks, which do not fit together")
    if axis is None:
        return concat(parts, 0) if _narrow(name, ranks[0]) else parts[0]
    if _gated(name, ranks[0]):
        half = parts[0].shape[0] // 2
        parts = [cut(part, 0, start, start + half) for start in (0, half) for part in parts]
    return concat(parts, axis)


def _gated(name: str, rank: Mapping[str, LazyTensor]) -> bool:
    """Whether a first matrix holds gates and ups: it then has twice the rows that the second has columns."""
    second = rank.get(name.replace("linear_fc1", "linear_fc2").replace(".bias", ".weight"))
    rows = rank[name].shape[0]
    return name.find(".linear_fc1.") > 0 and second is not None and rows == 2 * second.shape[-1]


def _narrow(name: str, rank: Mapping[str, LazyTensor]) -> bool:
    """Whether a latent's down projection is cut: Megatron-core repeats it in every rank (TELinear) or cuts it and
    gathers what comes out (ColumnParallelLinear), in which case it has fewer rows than the up projection has columns.
    Source: megatron/core/transformer/multi_latent_attention.py."""
    up = rank.get(name.replace("_down_proj", "_up_proj")) if "_down_proj." in name else None
    return up is not None and rank[name].shape[0] < up.shape[-1]


def _with_ups(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """NeMo's activations without `fast-` keep gate and up apart."""
    ups = {name.replace("linear_fc1_2.", "linear_fc1."): name for name in tensors if ".linear_fc1_2." in name}
    whole = {name: tensor for name, tensor in tensors.items() if name not in ups.values()}
    for gate, up in ups.items():
        if gate not in tensors or (tensors[gate].shape, tensors[gate].dtype) != (tensors[up].shape, tensors[up].dtype):
            raise DamagedInput(f"{up} has no gate of its shape beside it, {gate}; copy the checkpoint again")
        whole[gate] = concat([tensors[gate], tensors[up]], 0)
    return whole


def _moved(pattern: re.Pattern[str], name: str, by: int) -> str:
    """A name with its number raised."""
    match = pattern.fullmatch(name)
    return f"{match[1]}{int(match[2]) + by}{match[3]}" if match else name


def _count(pattern: re.Pattern[str], names: Mapping[str, object], where: str) -> int:
    numbers = {int(match[2]) for name in names if (match := pattern.fullmatch(name))}
    if numbers != set(range(len(numbers))):
        raise DamagedInput(f"the layers of {where} are {sorted(numbers)[:9]}, without a gap they begin at 0")
    return len(numbers)


def _current(stored: str) -> str:
    """The name that Megatron-core has for it."""
    name = megatron.bare(stored)
    if name.startswith(("language_model.", "word_embeddings")):
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
    return re.sub(*_GROUPED, name)


def _flat(state: Mapping[Any, Any], prefix: str, where: str, seen: list[int]) -> Iterator[tuple[str, Any]]:
    """Entries of nested state dicts, names joined with dots."""
    for key, value in state.items():
        seen[0] += 1
        if not isinstance(key, str) or prefix.count(".") > 4 * _DEEPEST or seen[0] > _MOST:
            raise DamagedInput(f"{where} holds {str(key)[:50]!r} in its state dict, which is no name of a weight")
        if isinstance(value, Mapping) and not isinstance(value, Record):
            yield from _flat(value, f"{prefix}{key}.", where, seen)
        else:
            yield f"{prefix}{key}", value
