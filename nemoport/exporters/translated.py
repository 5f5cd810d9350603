"""A quantized model in the words of another dialect: the same codes and scales under other names. Nothing is rounded
anew, but that a scale whose reciprocal the other stores is turned over in float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from nemoport import plugins
from nemoport.errors import UnsupportedInput
from nemoport.exporters.checkpoint import Model, Quantized
from nemoport.exporters.computed import solved
from nemoport.exporters.dequantized import QUANTIZERS
from nemoport.exporters.descriptions import described, left_plain
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.tensor import LazyTensor, cast, read

ALIKE = {"trtllm": "modelopt"}
"""Of the same fields: the target gives them their other names."""


def in_dialect(model: Model, dialect: str) -> Model:
    """The model as a dialect says it, refused where that has no word for a field."""
    dialect = ALIKE.get(dialect, dialect)
    if (found := model.quantized) is None or found.dialect == dialect:
        return model
    tensors = {
        name: _translated(tensor, found.dialect, dialect) if isinstance(tensor, Encoded) else tensor
        for name, tensor in model.tensors.items()
    }
    excluded = tuple(left_plain(model, tensors))
    module = plugins.load(QUANTIZERS, found.encoding.method)
    config, files = described(dialect, module.ALGORITHM, found.encoding, found.kv_cache, excluded)
    kept = Quantized(
        encoding=found.encoding,
        said={**found.said, "dialect": dialect, "translated from": found.dialect},
        dialect=dialect,
        kv_cache=found.kv_cache,
        excluded=excluded,
        config=config,
        files=files,
    )
    said = f"said as {dialect}"
    changed = {name for name, tensor in tensors.items() if isinstance(tensor, Encoded)}
    transforms = {name: ", ".join(filter(None, [model.transforms.get(name), said])) for name in changed}
    return replace(model, tensors=tensors, transforms={**model.transforms, **transforms}, quantized=kept)


def _translated(tensor: Encoded, source: str, dialect: str) -> Encoded:
    module = plugins.load(QUANTIZERS, tensor.encoding.method)
    pairs: Mapping[str, str] = getattr(module, "RECIPROCALS", {})
    turned = {**pairs, **{there: here for here, there in pairs.items()}}
    known = {each.name: each for each, _ in tensor.encoding.in_dialect(dialect)}
    fields: dict[str, LazyTensor] = {}
    for each in tensor.encoding.fields:
        if (held := tensor.fields.get(each.name)) is None:
            continue
        if each.name in known:
            fields[each.name] = cast(held, "float32") if each.dtypes == ("float32",) else held
        elif turned.get(each.name) in known:
            fields[turned[each.name]] = _reciprocal(held)
        else:
            raise UnsupportedInput(
                f"{tensor.name} has a {each.name} in {source}, and {dialect} has no word for it; keep --dialect "
                f"{source}, or quantize the checkpoint that it came from"
            )
    for name, field in known.items():
        if name not in fields and not field.optional and not field.of_shape and field.neutral is None:
            raise UnsupportedInput(
                f"{tensor.name} has no {name} in {source}, and {dialect} needs one; keep --dialect {source}, or "
                "quantize the checkpoint that it came from"
            )
    return replace(tensor, fields=fields)


def _reciprocal(tensor: LazyTensor) -> LazyTensor:
    return solved((), "float32", lambda: np.asarray(np.float32(1) / read(tensor).astype(np.float32)))
