"""What ONNX Runtime makes of the input of a linear whose weight is packed: it rounds that too, to 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onnx import load_model

from nemoport.exporters.encoding import Encoded
from nemoport.validation.weights import Share

if TYPE_CHECKING:
    from torch import Tensor

    from nemoport.reference.weights import Sight

BLOCK = 32
"""Inputs that are rounded together where ONNX Runtime itself makes a MatMulNBits: its
`session.qdq_matmulnbits_block_size`."""
_LEAST = 1e-30


def of_graphs(paths: Sequence[Path], held: Sequence[Share]) -> Sight | None:
    """None where no weight is packed. A pre-scale beside a weight comes before the rounding."""
    from nemoport.reference.weights import to_torch

    encoded = {share.name.removesuffix(".weight"): share.tensor for share in held if isinstance(share.tensor, Encoded)}
    if not encoded:
        return None
    told = {weight: size for path in paths for weight, size in _blocks(path)}
    rounds = {name: _rounding(tensor, told.get(f"{name}.weight")) for name, tensor in encoded.items()}

    def sight(name: str, x: Tensor) -> Tensor:
        if name not in rounds:
            return x
        pre_scale = encoded[name].fields.get("pre_scale")
        if pre_scale is None:
            return rounds[name](x)
        times = to_torch(name, pre_scale).to(x.device, x.dtype)
        return rounds[name](x * times) / times

    return sight


def _blocks(path: Path) -> Iterator[tuple[str, int]]:
    """Of each weight in a MatMulNBits."""
    for node in load_model(path, load_external_data=False).graph.node:
        if node.op_type == "MatMulNBits":
            yield node.input[1], next(each.i for each in node.attribute if each.name == "block_size")


def _rounding(tensor: Encoded, block: int | None) -> Callable[[Tensor], Tensor]:
    if tensor.encoding.method == "int8_dynamic":
        return _by_token
    return partial(_by_block, size=block or tensor.encoding.group or BLOCK)


def _by_token(x: Tensor) -> Tensor:
    """256 steps from the least number of a token to its largest."""
    least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = ((most - least) / 255).clamp(min=_LEAST)
    return ((x - least) / step).round() * step + least


def _by_block(x: Tensor, size: int) -> Tensor:
    """255 steps about zero; the last block may be short."""
    from torch.nn import functional

    inputs = x.shape[-1]
    padded = functional.pad(x, (0, -inputs % size))
    blocks = padded.reshape(*padded.shape[:-1], -1, size)
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=_LEAST)
    seen: Tensor = ((blocks / step).round() * step).flatten(-2)[..., :inputs]
    return seen
