"""The optimizer's weights in place of the model's: training keeps float32 copies, of which those that the model
computes with are the rounded ones.

Megatron-core stores them as `optimizer.state.fp32_param.<name of the weight>` where the optimizer was saved in model
space: `--dist-ckpt-optim-fully-reshardable`, the default of older releases, or an optimizer that is not distributed.
The other format, `dp_reshardable`, is buckets of flat memory (megatron/core/optimizer/distrib_optimizer.py).
"""

from __future__ import annotations

from dataclasses import replace

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats.megatron import MASTERS

REPLACED = "replaced by the optimizer's float32 copy"


def in_place(stored: Checkpoint) -> Checkpoint:
    """The checkpoint with every weight from the optimizer. Weights that the model itself has in float32 need none."""
    kept = {name: tensor for name, tensor in stored.tensors.items() if name not in stored.masters}
    if not stored.masters:
        flat = any(".dp_group_idx_" in name or ".gbuf_idx_" in name for name in stored.skipped)
        found = "in buckets of flat memory" if flat else "nowhere"
        raise UnsupportedInput(
            f"{stored.path} holds the optimizer's float32 weights {found}, they are read as "
            "optimizer.state.fp32_param.*; save with --dist-ckpt-optim-fully-reshardable, or use --weights model"
        )
    if rounded := [name for name, tensor in kept.items() if tensor.dtype != "float32"]:
        raise DamagedInput(
            f"{len(rounded)} of {len(stored.tensors)} weights of {stored.path} have no float32 copy in the optimizer, "
            f"the first is {rounded[0]}; use --weights model"
        )
    for name, tensor in stored.masters.items():
        own = stored.tensors.get(name)
        if own is None or own.shape != tensor.shape:
            shape = "no weight of that name" if own is None else f"shape {list(own.shape)}"
            raise UnsupportedInput(
                f"the optimizer's copy of {name} has shape {list(tensor.shape)}, the model has {shape}: it was saved "
                "flattened, or of another model; use --weights model"
            )
    replaced = {f"{name} ({stored.tensors[name].dtype})": REPLACED for name in stored.masters}
    others = {name: rule for name, rule in stored.skipped.items() if rule != MASTERS}
    return replace(stored, tensors={**stored.tensors, **stored.masters}, skipped=others | replaced)
