"""Weights on their way into torch: read when a layer wants them, in the dtype it computes in, and held by nobody."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nemoport.errors import DamagedInput, MachineError, UnsupportedInput, UsageError
from nemoport.exporters.dtypes import Words, itemsize, words
from nemoport.exporters.tensor import LazyTensor, cut
from nemoport.spec import ModelSpec, Norm, tensors

FLOATS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

Observer = Callable[[str, Tensor], None]
"""Told the name (`layers.0.attn.q`) and the input [..., in] of every linear map, before it is applied; and of what an
attention puts into its cache (`layers.0.attn.keys`, `values`), [..., head_dim]."""
Sight = Callable[[str, Tensor], Tensor]
"""What a linear map of that name sees of its input, as a runtime rounds it."""


class Weights:
    """Canonical names to torch tensors. Up to `keep` bytes stay in memory after their first use, which is for
    generation, where every step reads every weight."""

    def __init__(
        self,
        lazy: Mapping[str, LazyTensor],
        *,
        dtype: str = "float32",
        device: str = "cpu",
        keep: int = 0,
        observe: Observer | None = None,
        sight: Sight | None = None,
    ) -> None:
        if dtype not in FLOATS:
            raise UnsupportedInput(f"the reference does not compute in {dtype}; use {', '.join(FLOATS)}")
        self.lazy, self.dtype, self.device = lazy, FLOATS[dtype], _device(device)
        self._room, self._observe, self._sight = keep, observe, sight
        self._kept: dict[tuple[str, int, int], Tensor] = {}

    def read(self, name: str) -> Tensor:
        return self.rows(name, 0, self.lazy[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """`tensor[start:stop]`; nothing else is read."""
        key = name, start, stop
        if key in self._kept:
            return self._kept[key]
        tensor = to_torch(name, cut(self.lazy[name], 0, start, stop)).to(self.device, self.dtype)
        if tensor.nbytes <= self._room:
            self._room -= tensor.nbytes
            self._kept[key] = tensor
        return tensor

    def gather(self, name: str, indices: Tensor) -> Tensor:
        """`tensor[indices]`, reading each wanted row once."""
        wanted, places = np.unique(indices.cpu().numpy(), return_inverse=True)
        rows = [to_torch(name, cut(self.lazy[name], 0, row, row + 1)) for row in wanted.tolist()]
        found = torch.cat(rows).to(self.device, self.dtype)
        return found[torch.from_numpy(places).to(self.device).view(indices.shape)]

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x [..., in] @ weight [out, in] transposed, plus the bias where there is one."""
        self.observe(name, x)
        x = self._sight(name, x) if self._sight else x
        bias = f"{name}.bias"
        return F.linear(x, self.read(f"{name}.weight"), self.read(bias) if bias in self.lazy else None)

    def norm(self, name: str, norm: Norm, x: Tensor) -> Tensor:
        """Over the last axis, in float32 or wider. An RMS norm is rounded before its weight multiplies it (LlamaRMSNorm
        of transformers, rms_norm of vLLM), one about zero after (GemmaRMSNorm)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if norm.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
        weight = self.read(f"{name}.weight")
        if norm.kind == "rms" and not norm.zero_centered:
            return normed.to(x.dtype) * weight
        weight = weight.to(wide.dtype)
        scaled = normed * (weight + 1 if norm.zero_centered else weight)
        return (scaled + self.read(f"{name}.bias") if norm.kind == "layer" else scaled).to(x.dtype)

    def observe(self, name: str, x: Tensor) -> None:
        if self._observe:
            self._observe(name, x)


def to_torch(name: str, tensor: LazyTensor) -> Tensor:
    """The tensor in its stored dtype: the words are reinterpreted, no arithmetic."""
    if tensor.dtype not in FLOATS:
        raise UnsupportedInput(
            f"{name} is stored as {tensor.dtype}, and the reference runs weights in {', '.join(FLOATS)}; "
            f"give it the checkpoint from before quantization"
        )
    out: Words = np.empty(tensor.shape, words(tensor.dtype))
    tensor.fill(out)
    return torch.from_numpy(out.view(f"i{itemsize(tensor.dtype)}")).view(FLOATS[tensor.dtype])


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"{name!r} is no device; use cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise MachineError(f"device {name} needs a GPU that this machine lacks (torch sees {count}); use cpu")
    return device


def check(spec: ModelSpec, lazy: Mapping[str, LazyTensor]) -> None:
    """Every canonical tensor of the spec in its shape, and no other."""
    needed = tensors(spec)
    wrong = [f"{name} is missing" for name in needed if name not in lazy]
    wrong += [f"{name} is not a tensor of this model" for name in lazy if name not in needed]
    wrong += [
        f"{name} has shape {list(lazy[name].shape)}, {list(tensor.shape)} needed"
        for name, tensor in needed.items()
        if name in lazy and lazy[name].shape != tensor.shape
    ]
    if wrong:
        raise DamagedInput(f"the weights do not fit the {spec.family} model: {wrong[0]} ({len(wrong)} such tensors)")
