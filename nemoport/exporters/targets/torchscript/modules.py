"""The modules of a model: the tree that its canonical names span, so that a tensor is found there by its name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from nemoport.exporters.formats.torchscript import Module
from nemoport.spec import Block, ModelSpec, tensors

TYPES = {"layers": "Layers", "attn": "Attention", "ffn": "FeedForward"}
LAYER, ENCODER = "Layer", "Encoder"


def modules(spec: ModelSpec, buffers: Iterable[str]) -> Module:
    """`buffers` lie in the outermost module, beside what the model learned."""
    root: dict[str, Any] = {}
    for name in tensors(spec):
        *path, tensor = name.split(".")
        place = root
        for part in path:
            place = place.setdefault(part, {})
        place[tensor] = None
    return _module(root, (), spec, tuple(buffers))


def layers(spec: ModelSpec) -> Mapping[str, Block]:
    """The class of each kind of layer, and the block that it computes. Most models have one."""
    return {f"{LAYER}{number or ''}": block for number, block in enumerate(dict.fromkeys(spec.blocks))}


def _module(members: Mapping[str, Any], path: tuple[str, ...], spec: ModelSpec, buffers: tuple[str, ...]) -> Module:
    return Module(
        type=_type(members, path, spec),
        parameters=tuple(name for name, inner in members.items() if inner is None),
        buffers=buffers,
        modules={name: _module(inner, (*path, name), spec, ()) for name, inner in members.items() if inner is not None},
    )


def _type(members: Mapping[str, Any], path: tuple[str, ...], spec: ModelSpec) -> str:
    """Modules that hold tensors only are called after these."""
    if not path:
        return ENCODER
    if None in members.values():
        return "And".join(name.capitalize() for name in members)
    if path == ("layers",):
        return TYPES["layers"]
    layer = next(name for name, block in layers(spec).items() if block == spec.blocks[int(path[1])])
    return layer if len(path) == 2 else TYPES[path[2]] + layer.removeprefix(LAYER)
