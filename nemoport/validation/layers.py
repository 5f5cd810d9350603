"""What rounding or quantizing the weights does, layer by layer: the relative error of what enters each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nemoport import reference
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.dequantized import all_dequantized
from nemoport.exporters.tensor import LazyTensor
from nemoport.spec import LanguageModel
from nemoport.validation.prompts import Prompt

if TYPE_CHECKING:
    from torch import Tensor

Entering = dict[str, NDArray[np.float32]]


def of_rounding(model: Model, held: Mapping[str, LazyTensor], prompt: Prompt) -> dict[str, float]:
    """Empty where the weights held have the source's own dtypes, and so are the same."""
    plain = all_dequantized(model.tensors)
    if all(held[name].dtype == tensor.dtype for name, tensor in plain.items()):
        return {}
    return errors(model, held, prompt)


def errors(model: Model, held: Mapping[str, LazyTensor], prompt: Prompt) -> dict[str, float]:
    """||x' - x|| / ||x|| of the input of each layer and of the head, in float32, with the weights held and with the
    source's own."""
    exact, rounded = (_entering(model, weights, prompt) for weights in (all_dequantized(model.tensors), held))
    return {
        name: float(np.linalg.norm(rounded[name] - x) / max(float(np.linalg.norm(x)), 1e-30))
        for name, x in exact.items()
    }


def _entering(model: Model, weights: Mapping[str, LazyTensor], prompt: Prompt) -> Entering:
    """By layer, the input of its first linear."""
    found: Entering = {}

    def observe(name: str, x: Tensor) -> None:
        layer = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name
        if layer not in found:
            array = x.cpu().numpy()
            found[layer] = array[prompt.real] if array.ndim == 3 else array

    run = reference.logits if isinstance(model.spec.head, LanguageModel) else reference.encode
    run(model.spec, weights, prompt.tokens, mask=prompt.mask, device=reference.device(), observe=observe)
    return found
