"""A process of its own that saves a llama with Megatron-core's writer: the weights, stacked, and the float32 copies of
a mixed-precision optimizer under the names that Megatron-core gives them.

    python -m tests.exporters.mcore_optimizer DIRECTORY NUMBERS.safetensors

NUMBERS holds the float32 weights by Megatron's names, a layer each; the model has them rounded to bfloat16.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch


def main(directory: Path, numbers: Path) -> None:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
    from safetensors.torch import load_file

    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}.init", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1)
    state: dict[str, Any] = {}
    masters = load_file(numbers)
    layers = 1 + max(int(name.split(".")[2]) for name in masters if name.startswith("decoder.layers."))
    for name, master in masters.items():
        weight = _sharded(name, master.bfloat16(), layers)
        state[name] = weight
        state[f"{name} of the optimizer"] = make_sharded_optimizer_tensor(weight, master, "optimizer.state.fp32_param")
        state[f"{name} averaged"] = make_sharded_optimizer_tensor(weight, master * 0, "optimizer.state.exp_avg")
    directory.mkdir()
    # The writer waits for a device, and puts a flag on it, even where there is none.
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    dist_checkpointing.save(state, str(directory))
    torch.distributed.destroy_process_group()


def _sharded(name: str, tensor: torch.Tensor, layers: int) -> Any:
    from megatron.core.dist_checkpointing import ShardedTensor

    if not name.startswith("decoder.layers."):
        return ShardedTensor.from_rank_offsets(name, tensor)
    layer, rest = name.removeprefix("decoder.layers.").split(".", 1)
    return ShardedTensor.from_rank_offsets(
        f"decoder.layers.{rest}", tensor, (0, int(layer), layers), prepend_axis_num=1
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
