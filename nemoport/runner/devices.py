"""The GPUs of this machine that a process may use."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path


def visible_gpus() -> tuple[int, ...]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(range(len([device for device in visible.split(",") if device.strip() not in ("", "-1")])))
    return tuple(range(len([node for node in Path("/dev").glob("nvidia*") if node.name[6:].isdigit()])))


def compute_capabilities() -> tuple[int, ...]:
    """The SM of each kind of GPU, 90 of a Hopper; nothing where no driver can be asked."""
    if not visible_gpus() or (program := shutil.which("nvidia-smi")) is None:
        return ()
    try:
        told = subprocess.run(  # noqa: S603
            [program, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(sorted({int(line.replace(".", "")) for line in told.split() if line.replace(".", "").isdecimal()}))
