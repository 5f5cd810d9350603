"""A quantized checkpoint as plain numbers, so that it can be quantized anew: only where that was asked for, and told to
the manifest and to the ledger. What was rounded away stays away."""

from __future__ import annotations

from dataclasses import replace

from nemoport.errors import UnsupportedInput, UsageError
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.dequantized import dequantized
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.tensor import cast
from nemoport.spec import Recipe


def plain(model: Model, recipe: Recipe) -> Model:
    """The same model; undone where it was quantized and the recipe says so."""
    if (found := model.quantized) is None:
        if recipe.requantize:
            raise UsageError(f"{model.checkpoint.path} is not quantized; leave --requantize out")
        return model
    if not recipe.requantize:
        raise UnsupportedInput(
            f"{model.checkpoint.path} is quantized already ({found.encoding.method}), and quantizing it anew rounds a "
            "second time; give the checkpoint that it came from, or say --requantize"
        )
    encoded = {name for name, tensor in model.tensors.items() if isinstance(tensor, Encoded)}
    undone = f"dequantize {found.encoding.method} to {model.dtype}"
    return replace(
        model,
        tensors={
            name: cast(dequantized(tensor), model.dtype) if name in encoded else tensor
            for name, tensor in model.tensors.items()
        },
        transforms={
            **model.transforms,
            **{name: ", ".join(filter(None, [model.transforms.get(name), undone])) for name in encoded},
        },
        quantized=None,
        undone=found.said,
    )
