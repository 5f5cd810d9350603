"""The weights that an artifact holds, against the source's, bit for bit.

Logits prove how weights are used, but a prompt reads a few rows of the embedding only, and in 16 bits one wrong
element drowns in rounding. So what an artifact stores is read back as its runtime would find it, and compared whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from onnx import TensorProto, load_model
from onnx.numpy_helper import to_array

from nemoport.exporters.checkpoint import Model
from nemoport.exporters.dequantized import all_dequantized
from nemoport.exporters.derived import shift, transpose
from nemoport.exporters.dtypes import DTYPES, words
from nemoport.exporters.encoding import Encoded, bits
from nemoport.exporters.formats import torchscript
from nemoport.exporters.targets.onnx import quantized
from nemoport.exporters.targets.onnx.layers import turned
from nemoport.exporters.tensor import Files, Held, LazyTensor, cast, cut, read
from nemoport.reference import rank_files
from nemoport.spec import ModelSpec, tensors

_BLOCK = 1 << 22
"""Elements compared at a time."""
_PLAIN = {DTYPES[name].onnx: name for name in ("float32", "float16", "bfloat16")}
"""What a weight is in that is not quantized, by ONNX's number."""


@dataclass(frozen=True)
class Share:
    """A canonical tensor, or one rank's share of it, in an artifact."""

    name: str
    """In the whole model."""
    tensor: LazyTensor
    place: str = ""
    """The file, where there are several."""
    position: int = 0
    """Which share of `shares` this is."""
    shares: int = 1
    plus: float = 0.0
    """What the format adds to every element before rounding it."""


def of_model(model: Model) -> tuple[Share, ...]:
    return tuple(Share(name, tensor) for name, tensor in model.tensors.items())


def of_ranks(ranked: rank_files.Ranked, spec: ModelSpec) -> tuple[Share, ...]:
    """Layers are renumbered from 0 in every stage. The format has no zero-centred norms: it stores 1 + w."""
    layers, held = len(ranked.spec.blocks) // ranked.plan.pp, []
    plus = 1.0 if spec.norm.zero_centered and not ranked.spec.norm.zero_centered else 0.0
    for rank, local in enumerate(ranked.ranks):
        stage, position = divmod(rank, ranked.plan.tp)
        for name, tensor in local.items():
            whole = _renumbered(name, stage * layers)
            added = plus if name.endswith("norm.weight") else 0.0
            cuts = (position, ranked.plan.tp)
            if ".experts." in name:  # cut over the ranks that have it
                cuts = (position // ranked.plan.ep, ranked.plan.expert_tp)
            held.append(Share(whole, tensor, f"rank{rank}.safetensors", *cuts, added))
    return tuple(held)


def of_graph(path: Path, spec: ModelSpec) -> tuple[Share, ...]:
    """The initializers that bear a canonical name, with the scales beside them; they lie outside of the graph."""
    graph, files, held = load_model(path, load_external_data=False).graph, Files(), []
    outside = {each.name: each for each in graph.initializer if each.data_location == TensorProto.EXTERNAL}

    def load(name: str) -> LazyTensor | None:
        return _initializer(outside[name], path, files) if name in outside else None

    for name, wanted in tensors(spec).items():
        if (plain := load(name)) is not None:
            shape = tuple(axis.size for axis in wanted.axes)
            packed = quantized.stored(name, shape, outside[name].data_type, load)
            held.append(Share(name, plain if packed is None else packed))
    return tuple(held)


def of_script(path: Path, spec: ModelSpec) -> tuple[Share, ...]:
    """What a TorchScript archive holds under canonical names."""
    held = torchscript.read(Files(), path)
    return tuple(Share(name, held[name]) for name in tensors(spec) if name in held)


def of_optimized(path: Path, spec: ModelSpec) -> tuple[Share, ...]:
    """Of what ONNX Runtime's optimizer wrote, the weights that can be told: those that kept their names, and those
    that only a Transpose was folded into, under its name. Small ones lie in the graph."""
    graph, files, held = load_model(path, load_external_data=False).graph, Files(), []
    kept = {each.name: each for each in graph.initializer if each.data_type in _PLAIN}
    for name in tensors(spec):
        if name in kept:
            held.append(Share(name, _anywhere(kept[name], path, files)))
        elif turned(name) in kept:
            held.append(Share(name, transpose(_anywhere(kept[turned(name)], path, files))))
    return tuple(held)


def _anywhere(weight: TensorProto, path: Path, files: Files) -> LazyTensor:
    if weight.data_location == TensorProto.EXTERNAL:
        return _initializer(weight, path, files)
    return Held(to_array(weight), _PLAIN[weight.data_type])


def _initializer(weight: TensorProto, path: Path, files: Files) -> LazyTensor:
    """In its own file, as the graph says; of INT4 the bytes, two numbers in each."""
    place = {entry.key: entry.value for entry in weight.external_data}
    data, offset, shape = path.with_name(place["location"]), int(place.get("offset", 0)), tuple(weight.dims)
    if weight.data_type == TensorProto.INT4:
        return files.array(data, offset=offset, shape=(*shape[:-1], shape[-1] // 2), dtype="uint8")
    dtype = next(each.name for each in DTYPES.values() if each.onnx == weight.data_type)
    return files.array(data, offset=offset, shape=shape, dtype=dtype)


def differences(model: Model, held: Sequence[Share]) -> tuple[str, ...]:
    """In words, one for each tensor that is missing, or is not the source's in the dtype it is held in."""
    return (*(f"{name} is missing" for name in missing(model, held)), *unequal(model, held))


def missing(model: Model, held: Sequence[Share]) -> tuple[str, ...]:
    found = {each.name for each in held}
    return tuple(name for name in tensors(model.spec) if name not in found)


def unequal(model: Model, held: Sequence[Share]) -> tuple[str, ...]:
    return tuple(text for each in held if (text := _difference(each, model.tensors)))


def rounded(model: Model, held: Sequence[Share]) -> dict[str, LazyTensor]:
    """The source's tensors as precise as the artifact holds them, and no less like the source."""
    found = {each.name: each for each in held}
    plain = all_dequantized(model.tensors)
    return {name: _rounded(tensor, found[name]) if name in found else tensor for name, tensor in plain.items()}


def _rounded(tensor: LazyTensor, share: Share) -> LazyTensor:
    if isinstance(share.tensor, Encoded):
        return tensor
    return shift(_as_held(tensor, share), -share.plus) if share.plus else _as_held(tensor, share)


def _as_held(tensor: LazyTensor, share: Share) -> LazyTensor:
    return cast(shift(tensor, share.plus) if share.plus else tensor, share.tensor.dtype)


def _renumbered(name: str, first: int) -> str:
    match name.split(".", 2):
        case ["layers", index, rest]:
            return f"layers.{int(index) + first}.{rest}"
        case _:
            return name


def _difference(share: Share, source: Mapping[str, LazyTensor]) -> str:
    name = "embed.weight" if share.name == "head.weight" and share.name not in source else share.name  # tied
    where = f"{share.name} in {share.place}" if share.place else share.name
    if name not in source:
        return f"{where} is no tensor of the source"
    if (wanted := run(source[name], share)) is None:
        return f"{where} is {list(share.tensor.shape)}, a share of {list(source[name].shape)} needed"
    if (pairs := _pairs(share.tensor, wanted, share)) is None:
        return f"{where} is quantized otherwise than in the source"
    count, size = sum(_count(*pair) for pair in pairs), sum(prod(each.shape) for _, each in pairs)
    return f"{where} differs in {count} of {size} elements" if count else ""


def _pairs(found: LazyTensor, wanted: LazyTensor, share: Share) -> list[tuple[LazyTensor, LazyTensor]] | None:
    """What must be equal: the tensors, or the fields of quantized ones; None where only one is quantized so."""
    if not isinstance(found, Encoded) and not isinstance(wanted, Encoded):
        return [(found, _as_held(wanted, share))]
    if not isinstance(found, Encoded) or not isinstance(wanted, Encoded) or found.encoding != wanted.encoding:
        return None
    pairs = []
    for each in found.encoding.fields:
        dtypes = [side.fields[each.name].dtype for side in (found, wanted) if each.name in side.fields]
        ours, theirs = (side.field(each, dtypes[0]) if dtypes else None for side in (found, wanted))
        if (ours is None) != (theirs is None):
            return None
        if ours is not None and theirs is not None:
            if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
                return None
            pairs.append((ours, theirs))
    return pairs


def run(whole: LazyTensor, share: Share) -> LazyTensor | None:
    """What a rank must hold of a tensor: one of equal runs along the axis that was cut. Where there are fewer runs
    than ranks (KV heads) each serves several; where they do not divide (vocabulary) the last ones are padded.
    None for a shape that is no such run."""
    shape, padded = share.tensor.shape, share.name in ("head.weight", "embed.weight")
    cuts = [axis for axis, size in enumerate(whole.shape) if axis < len(shape) and shape[axis] != size]
    if len(shape) != len(whole.shape) or len(cuts) > 1 or (cuts and share.shares == 1):
        return None
    for axis in cuts:
        rows, every = shape[axis], whole.shape[axis]
        runs = share.shares if padded else every // rows if rows else 0
        if not padded and (not runs or every % rows or share.shares % runs):
            return None
        start = min(share.position * runs // share.shares * rows, every)
        return cut(whole, axis, start, min(start + rows, every))
    return whole


def _count(found: LazyTensor, wanted: LazyTensor) -> int:
    """Elements of `found` that are not those of `wanted`, which may have fewer rows."""
    if not wanted.shape:
        return int(bits(found) != bits(wanted))
    step, count = max(1, _BLOCK // max(1, prod(wanted.shape[1:]))), 0
    for start in range(0, wanted.shape[0], step):
        stop = min(start + step, wanted.shape[0])
        ours, theirs = (read(cut(each, 0, start, stop)).view(words(found.dtype)) for each in (found, wanted))
        count += int(np.count_nonzero(ours != theirs))
    return count
