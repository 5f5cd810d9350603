"""Executes TorchScript: `model.pt`, whose file says the names of its arguments and nothing of shapes or data types.

The config says the rest, and is held against the file as Triton's backend does it (ValidateInputs, ValidateOutputs and
GetNamingConvention in src/pt/model_instance_state.cc of triton-inference-server/pytorch_backend). Inputs are bound by
the names of forward's arguments where all are such names, else by number (`INPUT__0`) where all have one, else in the
config's order; a forward that takes one dictionary is given all of them by name. Outputs are bound by number, else in
order.

An archive is code: it can name any operator of torch, and some of them open files. Serve those that you trust.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nemoport.errors import DamagedInput, MissingPackage, UnsupportedInput
from nemoport.runner.batching import merged
from nemoport.runner.config_rules import check_tensors
from nemoport.runner.devices import visible_gpus
from nemoport.runner.instances import Placement
from nemoport.runner.model_config import ModelConfig, data_type
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.signature import TensorSignature
from nemoport.runner.tensors import Array

AOTI = "torch_aoti"
TYPES = {  # as ModelConfigDataTypeToTorchType in src/libtorch_utils.cc: bfloat16 is not among them
    "TYPE_BOOL": "bool",
    "TYPE_UINT8": "uint8",
    "TYPE_INT8": "int8",
    "TYPE_INT16": "int16",
    "TYPE_INT32": "int32",
    "TYPE_INT64": "int64",
    "TYPE_FP16": "float16",
    "TYPE_FP32": "float32",
    "TYPE_FP64": "float64",
}


def gpus() -> tuple[int, ...]:
    return visible_gpus()


def load(version_directory: Path, config: ModelConfig, placement: Placement, *, complete: bool) -> TorchSession:
    path = version_directory / config.default_model_filename
    if config.platform == AOTI:
        raise UnsupportedInput(
            f"model '{config.name}' is of platform {AOTI}: {path.name} is native code of AOTInductor for one kind of "
            "processor, which Triton 26.03 and later load; this runner executes TorchScript, platform pytorch_libtorch"
        )
    if not path.is_file():
        raise DamagedInput(f"model '{config.name}' has no file {path}; it is what torch.jit.save writes")
    if find_spec("torch") is None:
        raise MissingPackage("torch", "torch", f"model '{config.name}'")
    import torch

    if not config.input or not config.output:
        raise DamagedInput(f"model '{config.name}' needs inputs and outputs in its config: {path} does not say them")
    check_tensors(config)
    _check_types(config)
    device = torch.device("cpu" if placement.gpu is None else f"cuda:{placement.gpu}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
            module = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
        arguments = module.forward.schema.arguments[1:]
    except Exception as error:  # of damaged archives torch raises whatever it stumbles over
        said = str(error).strip() or type(error).__name__
        raise DamagedInput(f"torch cannot load {path}: {said.splitlines()[0]}") from error
    return TorchSession(module, arguments, device, config)


def _check_types(config: ModelConfig) -> None:
    for kind, tensors in (("input", config.input), ("output", config.output)):
        for tensor in tensors:
            if data_type(tensor) not in TYPES:
                raise UnsupportedInput(
                    f"unsupported datatype {data_type(tensor)} for {kind} '{tensor.name}' for model '{config.name}'; "
                    f"those of TorchScript's tensors are {', '.join(TYPES)}"
                )


class TorchSession:
    """The file has no signature but the names of its arguments; one module serves any number of threads."""

    inputs: Mapping[str, TensorSignature] = {}
    outputs: Mapping[str, TensorSignature] = {}
    generator = None
    notes = ()

    def __init__(self, module: Any, arguments: Sequence[Any], device: Any, config: ModelConfig) -> None:
        self.config, self._module, self._device = config, module, device
        self.computes_only = device.type == "cpu"
        self._by_name = len(arguments) == 1 and arguments[0].type.kind() == "DictType"
        self._order = [tensor.name for tensor in config.input] if self._by_name else _bound(config, arguments)
        names = [tensor.name for tensor in config.output]
        self._places = _numbers(names) or dict(zip(names, range(len(names)), strict=True))
        self._types = {tensor.name: data_type(tensor) for tensor in config.output}
        self.run = merged(self.execute)

    def close(self) -> None:
        """torch frees what it holds with its module."""

    def execute(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        import torch

        given = {name: torch.from_numpy(np.array(feeds[name])).to(self._device) for name in self._order}
        try:
            with torch.inference_mode():
                answer = self._module(given) if self._by_name else self._module(*given.values())
        except Exception as error:  # whatever a model raises
            said = str(error).strip() or type(error).__name__
            raise Refusal(f"PyTorch execute failure: {said.splitlines()[-1]}", Code.INTERNAL) from error
        several = answer if isinstance(answer, tuple) else (answer,)
        if not all(isinstance(each, torch.Tensor) for each in several):
            raise Refusal(
                "PyTorch execute failure: output must be of type Tensor, List[str] or Tuple containing one of these "
                "two types. It should not be a List / Dictionary of Tensors or a Scalar; of lists of strings this "
                "runner has none",
                Code.INTERNAL,
            )
        found = {name: self._answer(name, several) for name in self._places}
        return [found[name] for name in wanted]

    def _answer(self, name: str, several: Sequence[Any]) -> Array:
        if self._places[name] >= len(several):
            raise Refusal(
                f"The output {name} in the model configuration refers to an output index which doesn't exist. This "
                f"model has {len(several)} outputs"
            )
        tensor, wanted = several[self._places[name]], self._types[name]
        given = str(tensor.dtype).removeprefix("torch.")
        if given != TYPES[wanted]:
            said = next((said for said, name in TYPES.items() if name == given), given)
            raise Refusal(f"configuration expects datatype {wanted} for output '{name}', model provides {said}")
        if not tensor.shape:
            raise Refusal(f"output '{name}' is a scalar which is not supported.")
        return np.asarray(tensor.cpu().contiguous().numpy())


def _bound(config: ModelConfig, arguments: Sequence[Any]) -> list[str]:
    """The inputs' names in the order of forward's arguments."""
    if other := [each for each in arguments if each.type.kind() != "TensorType"]:
        raise UnsupportedInput(
            f"model '{config.name}' has an argument '{other[0].name}' of type {other[0].type}; this runner gives "
            "tensors, or one Dict[str, Tensor]"
        )
    names, allowed = [tensor.name for tensor in config.input], [each.name for each in arguments]
    if len(names) != len(allowed):
        raise DamagedInput(
            f"unable to load model '{config.name}', configuration expects {len(names)} inputs, model provides "
            f"{len(allowed)}"
        )
    if optional := [tensor.name for tensor in config.input if tensor.optional]:
        raise UnsupportedInput(f"model '{config.name}' has optional input '{optional[0]}', and forward takes all")
    places = dict(zip(allowed, range(len(allowed)), strict=True)) if set(names) <= set(allowed) else _numbers(names)
    if not places:
        return names
    ordered = sorted(names, key=places.__getitem__)
    if [places[name] for name in ordered] != list(range(len(names))):
        raise DamagedInput(
            f"model '{config.name}' has inputs {', '.join(names)}, which stand for one argument twice or for none of "
            f"{', '.join(allowed)}"
        )
    return ordered


def _numbers(names: Sequence[str]) -> dict[str, int]:
    """What follows the first `__` of each name, where all have such a number; else none."""
    numbers = {name: name.partition("__")[2] for name in names}
    return {name: int(n) for name, n in numbers.items()} if all(n.isdecimal() for n in numbers.values()) else {}
