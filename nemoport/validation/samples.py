"""Requests to try a model with: those that its config warms up with, or such as its signature asks for.

What axes are called says which must agree (`total` is `past` and `sequence`). An artifact's manifest names them, and so
does an ONNX graph that nobody keeps a manifest of; of other models only the config is known, and everything that varies
is given one size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.artifact import Signature
from nemoport.check.graph import Unreadable
from nemoport.check.graph import read as read_graph
from nemoport.exporters.dtypes import real
from nemoport.runner.datatypes import BY_CONFIG, BYTES
from nemoport.runner.directory import find_versions, versions_to_serve
from nemoport.runner.model_config import ModelConfig, data_type
from nemoport.runner.warmup import inputs_of

Array = NDArray[Any]
Sample = Mapping[str, Array]

AXES = {"batch": 2, "sequence": 5, "past": 3, "total": 8, "texts": 1}
"""Sizes of the axes that manifests name, agreeing with each other."""
OTHERS = {"batch_size": 2, "sequence_length": 5, "past_sequence_length": 3, "total_sequence_length": 8}
"""As the exporters of Hugging Face and of onnxruntime-genai name them; the first writes sums as `one + other`."""
ANY = 3
"""Of an axis that nothing is known about."""
SMALL = 4
"""Whole numbers lie below this: they may be tokens, positions or choices, and small ones are all of these."""


def sample(config: ModelConfig, signature: Signature | None, model: Path) -> Sample:
    """Inputs by name, whole shapes: of the first warm-up of the config, else of the signature, else of the config
    and the graph that it serves."""
    if config.model_warmup:
        return {
            each.name: np.asarray(each.data).reshape(each.shape)
            for each in inputs_of(config.model_warmup[0], config, model)
        }
    if signature:
        sizes = AXES | {"batch": min(AXES["batch"], config.max_batch_size or 1)}
        return _made({each.name: (_numpy(each.dtype), _sized(each.shape, sizes)) for each in signature.inputs})
    batch = (min(2, config.max_batch_size),) if config.max_batch_size else ()
    names = _names(config, model)
    wanted = {each.name: each for each in config.input if not each.optional}
    shapes = {name: _named((*batch, *each.dims), names.get(name, ())) for name, each in wanted.items()}
    sizes = {**AXES, **OTHERS} | {
        axis: dim
        for name, each in wanted.items()
        for axis, dim in zip(names.get(name, ()), (*batch, *each.dims), strict=False)
        if dim >= 0 and isinstance(axis, str)
    }
    return _made(
        {name: (BY_CONFIG[data_type(each)].numpy, _sized(shapes[name], sizes)) for name, each in wanted.items()}
    )


def _names(config: ModelConfig, model: Path) -> Mapping[str, tuple[int | str, ...]]:
    """The axes of each input as an ONNX graph has them, a number or a name."""
    if config.backend != "onnxruntime":
        return {}
    path = model / str(versions_to_serve(config, find_versions(model))[-1]) / config.default_model_filename
    try:
        graph = read_graph(path / path.name if path.is_dir() else path, path.name)
    except Unreadable:  # an ORT model, say, which has the same backend
        return {}
    return {tensor.name: tensor.shape or () for tensor in graph.inputs}


def _named(shape: tuple[int, ...], names: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """What varies, by its name; a config may reshape, and then no name is known."""
    known = names if len(names) == len(shape) else ("",) * len(shape)
    return tuple(dim if dim >= 0 else name for dim, name in zip(shape, known, strict=True))


def _made(wanted: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> Sample:
    numbers = np.random.default_rng(0)
    return {name: _array(dtype, shape, name, numbers) for name, (dtype, shape) in wanted.items()}


def _array(dtype: np.dtype[Any], shape: tuple[int, ...], name: str, numbers: np.random.Generator) -> Array:
    if "mask" in name:
        return np.ones(shape, dtype)
    if "token_type" in name:  # of which there may be two only
        return np.zeros(shape, dtype)
    if dtype == BYTES.numpy:
        words = np.array([b"the", b"quick", b"fox"], np.object_)
        return words[numbers.integers(0, len(words), shape)].reshape(shape)
    if dtype.kind in "iub":
        return numbers.integers(0, 2 if dtype.kind == "b" else SMALL, shape).astype(dtype)
    return numbers.standard_normal(shape).astype(dtype)


def _numpy(dtype: str) -> np.dtype[Any]:
    return BYTES.numpy if dtype == "string" else real(dtype)


def _sized(shape: Sequence[int | str], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """`past_sequence_length + 1` is a sum; what has no size of its own has any."""
    return tuple(
        sum(int(part) if part.isdecimal() else sizes.get(part, ANY) for part in map(str.strip, dim.split("+")))
        if isinstance(dim, str)
        else dim
        for dim in shape
    )
