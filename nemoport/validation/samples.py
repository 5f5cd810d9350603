"""Requests to try a model with: those that its config warms up with, or such as its signature asks for.

What an artifact's axes are called in its manifest says which must agree (`total` is `past` and `sequence`); of a model
that nemoport did not write, only the config is known, and everything that varies is given one size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemoport.artifact import Signature
from nemoport.exporters.dtypes import real
from nemoport.runner.datatypes import BY_CONFIG, BYTES
from nemoport.runner.model_config import ModelConfig, data_type
from nemoport.runner.warmup import inputs_of

Array = NDArray[Any]
Sample = Mapping[str, Array]

AXES = {"batch": 2, "sequence": 5, "past": 3, "total": 8, "texts": 1}
"""Sizes of the axes that manifests name, agreeing with each other."""
ANY = 3
"""Of an axis that nothing is known about."""
SMALL = 4
"""Whole numbers lie below this: they may be tokens, positions or choices, and small ones are all of these."""


def sample(config: ModelConfig, signature: Signature | None, model: Path) -> Sample:
    """Inputs by name, whole shapes: of the first warm-up of the config, else of the signature, else of the config."""
    if config.model_warmup:
        return {
            each.name: np.asarray(each.data).reshape(each.shape)
            for each in inputs_of(config.model_warmup[0], config, model)
        }
    if signature:
        sizes = AXES | {"batch": min(AXES["batch"], config.max_batch_size or 1)}
        return _made({each.name: (_numpy(each.dtype), _sized(each.shape, sizes)) for each in signature.inputs})
    batch = (min(2, config.max_batch_size),) if config.max_batch_size else ()
    return _made(
        {
            each.name: (BY_CONFIG[data_type(each)].numpy, (*batch, *(ANY if dim < 0 else dim for dim in each.dims)))
            for each in config.input
            if not each.optional
        }
    )


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
    return tuple(sizes.get(dim, ANY) if isinstance(dim, str) else dim for dim in shape)
