"""A model run on tokens, and what is kept of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nemoport import reference
from nemoport.calibration.search import losses
from nemoport.calibration.tokens import Tokens
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.groups import Group, groups
from nemoport.exporters.statistics import Array, Statistics
from nemoport.spec import tensors


@dataclass
class Input:
    """What is known of one linear's input, token after token."""

    amax: Tensor | float = 0.0
    total: Tensor | float = 0.0
    """The means of batches, each times its tokens."""
    tokens: int = 0
    gram: Tensor | float = 0.0
    """x' x summed over tokens; where it is wanted."""

    def add(self, x: Tensor, with_gram: bool) -> None:
        """A batch. Its means are rounded to its dtype, as ModelOpt's search takes them (`awq_lite` of 0.47)."""
        rows = x.reshape(-1, x.shape[-1])
        size = rows.abs()
        self.amax = torch.maximum(size.amax(0).float(), torch.as_tensor(self.amax, device=x.device))
        self.total = self.total + size.mean(0).double() * len(rows)
        self.tokens += len(rows)
        if with_gram:
            wide = rows.float()
            self.gram = self.gram + wide.T @ wide


@dataclass
class Seen:
    """What is known of one layer."""

    with_gram: bool
    wanted: frozenset[str]
    """The first linear of every group: the others read the same."""
    inputs: dict[str, Input] = field(default_factory=lambda: defaultdict(Input))
    caches: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def observe(self, name: str, x: Tensor) -> None:
        if name in self.wanted:
            self.inputs[name].add(x, self.with_gram)
        elif name.endswith((".keys", ".values")):
            self.caches[name] = max(self.caches[name], float(x.abs().max()))


def observed(model: Model, tokens: Tokens, needs: tuple[str, ...]) -> Statistics:
    """Computed in the model's own dtype, as it would be served."""
    found = tuple(groups(tensors(model.spec)))
    with_gram, wanted, device = "losses" in needs, frozenset(group.name for group in found), reference.device()
    seen = Seen(with_gram, wanted)
    arrays: dict[str, Array] = {}
    run = reference.layer_by_layer(
        model.spec,
        model.tensors,
        tokens.batches(),
        dtype=model.dtype,
        device=device,
        observe=lambda name, x: seen.observe(name, x),
    )
    for _ in run:
        arrays |= _arrays(seen, found, model)
        seen = Seen(with_gram, wanted)
    rows, length = tokens.rows.shape
    sizes = {"rows": rows, "length": length, "batch": tokens.batch}
    return Statistics(arrays, {"tokens": tokens.digest, **sizes, "computed in": model.dtype})


def _arrays(seen: Seen, found: tuple[Group, ...], model: Model) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for group in found:
        if (known := seen.inputs.get(group.name)) is None:
            continue
        assert isinstance(known.amax, Tensor)
        assert isinstance(known.total, Tensor)
        mean = (known.total / known.tokens).float()
        arrays[f"{group.name}/amax"] = _numpy(known.amax)
        arrays[f"{group.name}/mean"] = _numpy(mean)
        if isinstance(known.gram, Tensor):
            for linear in group.linears:
                each = losses(model.tensors[f"{linear}.weight"], _numpy(mean), known.gram / known.tokens)
                arrays[f"{linear}/losses"] = each
    for name, amax in seen.caches.items():
        mixer, _, what = name.rpartition(".")
        arrays[f"{mixer}/{what}"] = np.array(amax, np.float32)
    return arrays


def _numpy(tensor: Tensor) -> Array:
    array: Array = tensor.cpu().numpy()
    return array
