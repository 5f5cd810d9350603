"""What a config says of an ONNX Runtime session: parameters and optimization level, in the words of ONNX Runtime.

What Triton's onnxruntime backend reads in `ModelState::ModelState`, and of a run in `ModelInstanceState`. Other names
among the parameters mean nothing to it, nor here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from nemoport.errors import DamagedInput
from nemoport.runner.instances import Placement
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.parameters import Read, boolean, integer

_LEVELS = {-1: "ORT_ENABLE_BASIC", 1: "ORT_ENABLE_EXTENDED", 2: "ORT_DISABLE_ALL"}
_MODES = ("ORT_SEQUENTIAL", "ORT_PARALLEL")


@dataclass(frozen=True)
class SessionOptions:
    attributes: Mapping[str, object]
    """Of `onnxruntime.SessionOptions`; a member of an enum by its name."""
    session_entries: Mapping[str, str] = field(default_factory=dict)
    run_entries: Mapping[str, str] = field(default_factory=dict)
    """Entries of a run's config: said again with every run."""
    notes: tuple[str, ...] = ()
    """Where that is less than the config asks for."""


def _mode(text: str) -> str:
    if (mode := integer(text)) not in (0, 1):
        raise DamagedInput(
            f"Invalid configuration value provided. Expected values for  execution_mode are 0 or 1 but got {mode} ."
        )
    return _MODES[mode]


def _threads(text: str) -> int:
    """0, ONNX Runtime's own choice, for whatever is no number of threads."""
    return max(integer(text), 0)


ATTRIBUTES: Mapping[str, tuple[str, Read]] = {
    "execution_mode": ("execution_mode", _mode),
    "intra_op_thread_count": ("intra_op_num_threads", _threads),
    "inter_op_thread_count": ("inter_op_num_threads", _threads),
    "enable_mem_arena": ("enable_cpu_mem_arena", boolean),
    "enable_mem_pattern": ("enable_mem_pattern", boolean),
}
"""Parameter to attribute, and how its value is read. What is not said is as ONNX Runtime has it."""
# Planning reuse compares each buffer with all that are free, quadratic in graphs of many experts (8 x 64 load in 11 s
# with it, in 1 s without), and the arena gives freed memory back without a plan: MiniLM at batch 64 takes 269 MiB
# against 283, a row of residual blocks one buffer more. Triton has no parameter for it.
OURS: Mapping[str, object] = {"enable_mem_reuse": False}
"""Attributes that no config says."""
SESSION_ENTRIES = ("session.use_device_allocator_for_initializers",)
SHRINKAGE = "memory.enable_memory_arena_shrinkage"
"""Devices whose arenas give memory back after a run: `cpu:0;gpu:0`. One without an arena refuses every run."""


def session_options(config: ModelConfig, placement: Placement) -> SessionOptions:
    level = _LEVELS.get(config.optimization.graph.level, "ORT_ENABLE_ALL")
    said = {name: value.string_value for name, value in config.parameters.items()}
    shrunk = _shrunk(said, placement)
    return SessionOptions(
        {"graph_optimization_level": level, **OURS}
        | {ATTRIBUTES[name][0]: _value(config, name, said[name]) for name in ATTRIBUTES if name in said},
        {name: said[name] for name in SESSION_ENTRIES if name in said},
        shrunk,
        tuple(_notes(config, said, shrunk)),
    )


def _value(config: ModelConfig, name: str, text: str) -> object:
    try:
        return ATTRIBUTES[name][1](text)
    except DamagedInput as error:
        raise DamagedInput(f"model '{config.name}' has parameter {name} = '{text}': {error}") from None


def _shrunk(said: Mapping[str, str], placement: Placement) -> Mapping[str, str]:
    """A model that is executed on the CPU although it asks for a GPU has no arena there to shrink."""
    devices = said.get(SHRINKAGE, "").split(";")
    left = [device for device in devices if not (placement.fell_back and device.startswith("gpu"))]
    return {SHRINKAGE: ";".join(left)} if SHRINKAGE in said and left else {}


def _notes(config: ModelConfig, said: Mapping[str, str], shrunk: Mapping[str, str]) -> Iterator[str]:
    if said.get(SHRINKAGE) != shrunk.get(SHRINKAGE):
        yield f"{SHRINKAGE}: {said[SHRINKAGE]}, without the GPUs"
    if config.model_operations.op_library_filename:
        yield "model_operations: libraries of operations are not loaded"
