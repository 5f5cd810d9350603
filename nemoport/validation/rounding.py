"""What quantizing did to each linear: what an artifact stores of it stands for other numbers than the source has."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray

from nemoport.exporters.checkpoint import Model
from nemoport.exporters.computed import single
from nemoport.exporters.dequantized import dequantized
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.groups import groups
from nemoport.exporters.tensor import LazyTensor, cut, read
from nemoport.spec import tensors
from nemoport.validation.report import Rounding
from nemoport.validation.weights import Share, run

_BLOCK = 1 << 22
"""Elements compared at a time."""
_NOTHING = np.float64(1e-300)


def roundings(model: Model, held: Sequence[Share]) -> dict[str, Rounding]:
    """By linear, ||w' - w|| / ||w|| and the same in decibels. What a pre-scale moved into the norm before a linear is
    part of its w'."""
    moved = _moved(model, {share.name: share.tensor for share in held})
    sums: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros(2))
    for share in held:
        wanted = run(model.tensors[share.name], share) if share.name in model.tensors else None
        if isinstance(share.tensor, Encoded) and wanted is not None:
            linear = share.name.removesuffix(".weight")
            for ours, theirs in _blocks(dequantized(share.tensor), wanted):
                gap = ours * moved[linear] - theirs if linear in moved else ours - theirs
                sums[linear] += np.square(gap, dtype=np.float64).sum(), np.square(theirs, dtype=np.float64).sum()
    return {linear: _rounding(*map(float, found)) for linear, found in sums.items()}


def _rounding(gap: float, size: float) -> Rounding:
    relative = float(np.sqrt(gap / max(size, _NOTHING)))
    return Rounding(relative=relative, sqnr=-20 * float(np.log10(max(relative, 1e-30))))


def _blocks(ours: LazyTensor, theirs: LazyTensor) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    step = max(1, _BLOCK // max(1, prod(theirs.shape[1:])))
    for start in range(0, theirs.shape[0], step):
        stop = min(start + step, theirs.shape[0])
        found, wanted = (single(read(cut(each, 0, start, stop))) for each in (ours, theirs))
        yield found, wanted


def _moved(model: Model, held: Mapping[str, LazyTensor]) -> dict[str, NDArray[np.float32]]:
    """By linear, what the norm that feeds it is times its own self; only where that is not one throughout."""
    centre = np.float32(model.spec.norm.zero_centered)
    found: dict[str, NDArray[np.float32]] = {}
    for group in groups(tensors(model.spec)):
        name = f"{group.norm}.weight"
        if group.norm is None or name not in held or held[name].shape != model.tensors[name].shape:
            continue
        now, before = (single(read(each)) + centre for each in (held[name], model.tensors[name]))
        if not np.array_equal(now, before):
            times = np.divide(now, before, out=np.ones_like(now), where=before != 0)
            found |= dict.fromkeys(group.linears, times)
    return found
