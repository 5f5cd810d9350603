"""Executes TorchScript: `model.pt`, whose file says the names of its arguments and nothing of shapes or types.

The config says the rest. Inputs are bound as Triton's backend binds them (its documentation, "Special Conventions for
PyTorch Backend"): all by the names of forward's arguments, or all by number (`INPUT__0`), else in the config's order.
Outputs are by number, else in order; a model that answers a dictionary is asked by name.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nemoport.errors import DamagedInput, MissingPackage, UnsupportedInput
from nemoport.runner.batching import merged
from nemoport.runner.config_rules import check_tensors
from nemoport.runner.datatypes import BY_CONFIG
from nemoport.runner.devices import visible_gpus
from nemoport.runner.instances import Placement
from nemoport.runner.model_config import ModelConfig, data_type
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.signature import TensorSignature
from nemoport.runner.tensors import Array

_NUMBERED = re.compile(r".+__(\d+)")
_TYPES = frozenset(["BOOL", "UINT8", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BF16"])


def gpus() -> tuple[int, ...]:
    return visible_gpus()


def load(version_directory: Path, config: ModelConfig, placement: Placement, *, complete: bool) -> TorchSession:
    path = version_directory / config.default_model_filename
    if not path.is_file():
        raise DamagedInput(f"model '{config.name}' has no file {path}; it is what torch.jit.save writes")
    if find_spec("torch") is None:
        raise MissingPackage("torch", "torch", f"model '{config.name}'")
    import torch

    if not config.input or not config.output:
        raise DamagedInput(f"model '{config.name}' needs inputs and outputs in its config: {path} does not say them")
    check_tensors(config)
    for tensor in (*config.input, *config.output):
        if BY_CONFIG[data_type(tensor)].name not in _TYPES:
            raise UnsupportedInput(f"tensor '{tensor.name}' is {data_type(tensor)}, which torch does not carry")
    device = torch.device("cpu" if placement.gpu is None else f"cuda:{placement.gpu}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as a whole
            module = torch.jit.load(path, map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise DamagedInput(f"torch cannot load {path}: {str(error).splitlines()[0]}") from error
    return TorchSession(module, device, config)


class TorchSession:
    """The file has no signature but the names of its arguments; one module serves any number of threads."""

    inputs: Mapping[str, TensorSignature] = {}
    outputs: Mapping[str, TensorSignature] = {}
    generator = None

    def __init__(self, module: Any, device: Any, config: ModelConfig) -> None:
        self.config, self._module, self._device = config, module, device
        self.computes_only = device.type == "cpu"
        arguments = [argument.name for argument in module.forward.schema.arguments][1:]
        names = [tensor.name for tensor in config.input]
        self._order = names if set(names) <= set(arguments) else _ordered(names)
        self._named = self._order is names
        self._answers = _ordered([tensor.name for tensor in config.output])
        self.run = merged(self.execute)

    def close(self) -> None:
        """torch frees what it holds with its module."""

    def execute(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        import torch

        tensors = {name: _to_torch(feeds[name]).to(self._device) for name in self._order if name in feeds}
        try:
            with torch.inference_mode():
                answer = self._module(**tensors) if self._named else self._module(*tensors.values())
        except Exception as error:  # whatever a model raises
            raise Refusal(f"PyTorch execute failure: {str(error).strip().splitlines()[-1]}", Code.INTERNAL) from error
        found = self._by_name(answer)
        return [_to_numpy(found[name]) for name in wanted]

    def _by_name(self, answer: Any) -> Mapping[str, Any]:
        if isinstance(answer, dict):
            found: Mapping[str, Any] = answer
        else:
            several = answer if isinstance(answer, list | tuple) else (answer,)
            found = dict(zip(self._answers, several, strict=False))
        if missing := [name for name in self._answers if name not in found]:
            raise Refusal(
                f"model '{self.config.name}' answered {len(found)} tensors and none for output '{missing[0]}'; its "
                f"config has {len(self._answers)}",
                Code.INTERNAL,
            )
        return found


def _ordered(names: list[str]) -> list[str]:
    """By number where all have one, else as they are."""
    numbers = [_NUMBERED.fullmatch(name) for name in names]
    if not all(numbers):
        return names[:]
    return sorted(names, key=lambda name: int(name.rpartition("__")[2]))


def _to_torch(array: Array) -> Any:
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(array).view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))  # writable, and its own


def _to_numpy(tensor: Any) -> Array:
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return np.asarray(tensor.view(torch.int16).numpy().view(BY_CONFIG["TYPE_BF16"].numpy))
    return np.asarray(tensor.numpy())
