"""Where the instances of a model run: `instance_group` resolved for this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemoport.errors import DamagedInput, MachineError
from nemoport.runner.model_config import ModelConfig

_DEFAULT_COUNT_ON_CPU = {"onnxruntime": 2}  # Triton's core; 1 for every other backend and device

_HAS_PROFILES = "tensorrt"


@dataclass(frozen=True)
class Placement:
    """One session on `gpu`, or on the CPU when None, that `count` requests use at a time.

    `notes` say where that is less than the config asks for.
    """

    gpu: int | None
    count: int
    fell_back: bool = False
    notes: tuple[str, ...] = ()


def placed(config: ModelConfig, gpus: Sequence[int], *, allow_cpu_fallback: bool) -> tuple[ModelConfig, Placement]:
    """The config with every group's name, kind, count and GPUs resolved, and the placement that it means."""
    done = ModelConfig()
    done.CopyFrom(config)
    if not done.instance_group:
        done.instance_group.add(name=config.name)
    fell_back = False
    for at, group in enumerate(done.instance_group):
        group.name = group.name or f"{config.name}_{at}"
        if group.kind == group.KIND_AUTO:
            group.kind = group.KIND_GPU if gpus and set(group.gpus) <= set(gpus) else group.KIND_CPU
        if group.kind == group.KIND_GPU and not gpus and allow_cpu_fallback:
            fell_back = True
            group.kind = group.KIND_CPU
            del group.gpus[:]
        on_cpu = group.kind == group.KIND_CPU
        group.count = max(group.count, 0) or (_DEFAULT_COUNT_ON_CPU.get(config.backend, 1) if on_cpu else 1)
        if group.kind == group.KIND_GPU:
            group.gpus.extend(() if group.gpus else gpus)
        _check(group, config, gpus)
    used = [gpu for group in done.instance_group for gpu in group.gpus]
    notes = []
    if fell_back:
        notes.append("instance_group: KIND_GPU, executed on the CPU by --allow-cpu-fallback")
    if len(set(used)) > 1:
        notes.append(f"instance_group: GPUs {', '.join(map(str, used))}, executed on GPU {used[0]} only")
    count = sum(group.count for group in done.instance_group)
    return done, Placement(used[0] if used else None, count, fell_back, tuple(notes))


def _check(group: ModelConfig, config: ModelConfig, gpus: Sequence[int]) -> None:
    who = f"instance group {group.name} of model {config.name}"
    if group.profile and config.backend != _HAS_PROFILES:
        raise DamagedInput(f"{who} specifies profile field which is only supported for TensorRT models")
    if group.kind != group.KIND_GPU:
        if group.gpus:
            kind = "KIND_CPU" if group.kind == group.KIND_CPU else "KIND_MODEL"
            raise DamagedInput(f"{who} has kind {kind} but specifies one or more GPUs")
        return
    if not gpus:
        raise MachineError(
            f"{who} has kind KIND_GPU but no GPUs are available; "
            "serve it on a machine with one, or run it on the CPU with --allow-cpu-fallback"
        )
    for gpu in group.gpus:
        if gpu not in gpus:
            raise MachineError(
                f"{who} specifies invalid or unsupported gpu id {gpu}. GPUs here are: {', '.join(map(str, gpus))}"
            )
