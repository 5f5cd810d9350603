"""Arrays to torch's tensors and back; bfloat16, which numpy lacks, by its words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nemoport.runner.datatypes import BY_CONFIG
from nemoport.runner.tensors import Array


def to_torch(array: Array) -> Any:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))  # writable, and its own


def to_numpy(tensor: Any) -> Array:
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(BY_CONFIG["TYPE_BF16"].numpy))
    return np.asarray(tensor.numpy())
