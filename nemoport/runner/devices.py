"""The GPUs of this machine that a process may use."""

from __future__ import annotations

import os
from pathlib import Path


def visible_gpus() -> tuple[int, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(range(len([device for device in visible.split(",") if device.strip() not in ("", "-1")])))
    return tuple(range(len([node for node in Path("/dev").glob("nvidia*") if node.name[6:].isdigit()])))
