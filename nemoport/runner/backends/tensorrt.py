"""Executes TensorRT plans, `model.plan`, on a GPU: with tensorrt, of the release that built them, and torch.

A version-compatible plan holds code, which TensorRT runs only where it is told to; here it is not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any

from nemoport.errors import DamagedInput, MachineError, MissingPackage, UnsupportedInput
from nemoport.runner.batching import merged
from nemoport.runner.config_rules import check_tensors
from nemoport.runner.datatypes import BY_NAME
from nemoport.runner.devices import visible_gpus
from nemoport.runner.instances import Placement
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.signature import TensorSignature, check_agreement, completed
from nemoport.runner.tensors import Array


def gpus() -> tuple[int, ...]:
    return visible_gpus()


def load(version_directory: Path, config: ModelConfig, placement: Placement, *, complete: bool) -> PlanSession:
    path = version_directory / config.default_model_filename
    if not path.is_file():
        raise DamagedInput(f"model '{config.name}' has no file {path}; `nemoport compile --to tensorrt` makes one")
    if placement.gpu is None:
        raise MachineError(
            f"model '{config.name}' is a TensorRT plan, which runs on GPUs alone; serve it on a machine with one, or "
            "publish the ONNX artifact that it was compiled from"
        )
    for package, extra in (("tensorrt", "tensorrt"), ("torch", "torch")):
        if find_spec(package) is None:
            raise MissingPackage(package, extra, f"model '{config.name}'")
    from nemoport.runner.plans import NoContext, NotLoaded, Plan

    try:
        plan = Plan(path, placement.gpu)
    except NotLoaded as error:
        raise MachineError(
            f"TensorRT {error} cannot load {path}: it was built by another release or for another GPU, as its manifest "
            "says, or is version-compatible, which this runner does not allow; compile it here"
        ) from error
    except NoContext as error:
        raise MachineError(
            f"TensorRT loaded {path} and made no context to run it on GPU {placement.gpu}, as its log says; mostly the "
            "memory that its largest shapes need is not free: free some, load fewer instances, or compile it again "
            "with smaller bounds (--axis)"
        ) from error
    return PlanSession(plan, config, complete=complete)


class PlanSession:
    computes_only = False
    generator = None
    notes = ()

    def __init__(self, plan: Any, config: ModelConfig, *, complete: bool) -> None:
        self.inputs, self.outputs = (_signatures(config.name, ends) for ends in (plan.inputs, plan.outputs))
        self.config = completed(config, self.inputs, self.outputs) if complete else config
        check_tensors(self.config)
        check_agreement(self.config, self.inputs, self.outputs)
        self._plan, self._free = plan, Lock()
        self.run = merged(self.execute)

    def close(self) -> None:
        """TensorRT frees what it holds with its engine."""

    def execute(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        from nemoport.runner.plans import NotRun
        from nemoport.runner.torch_tensors import to_numpy, to_torch

        try:
            with self._free:
                found = self._plan.run({name: to_torch(array) for name, array in feeds.items()})
        except NotRun as error:
            raise Refusal(f"TensorRT execute failure: {error}", Code.INVALID_ARG) from error
        return [to_numpy(found[name]) for name in wanted]


def _signatures(model: str, ends: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorSignature]:
    for name, (datatype, _) in ends.items():
        if datatype not in BY_NAME:
            raise UnsupportedInput(
                f"the plan of model '{model}' has {name} in {datatype}, and Triton has datatypes for "
                f"{', '.join(BY_NAME)} alone; build it from a graph with a cast at that end"
            )
    return {name: TensorSignature(name, BY_NAME[datatype], shape) for name, (datatype, shape) in ends.items()}
