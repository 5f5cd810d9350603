"""Requests that a config asks to send to each instance before the model is ready."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemoport.errors import DamagedInput
from nemoport.runner.contract import Contract, accept
from nemoport.runner.datatypes import BY_CONFIG, BYTES
from nemoport.runner.jobs import Run, job_of
from nemoport.runner.model_config import ModelConfig, data_type
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import InferRequest, InputTensor
from nemoport.runner.tensors import Array, from_raw, split_bytes

_FOLDER = "warmup"


def warm_up(config: ModelConfig, contract: Contract, model: Path, run: Run, instances: int) -> None:
    """Every sample on every instance; one that fails is an error of the model. Answers go nowhere."""
    for sample in config.model_warmup:
        try:
            request = InferRequest(tuple(inputs_of(sample, config, model)), id=f"warmup {sample.name}")
            feeds = accept(request, contract)
            for _ in range(max(sample.count, 1)):
                for instance in range(instances):
                    job = job_of(request, feeds, tuple(contract.outputs), max(sample.batch_size, 1), _nowhere)
                    (reply,) = run([job], instance).replies
                    if isinstance(reply, Refusal):
                        raise reply
        except Refusal as refusal:
            raise DamagedInput(
                f"failed to run warmup sample '{sample.name}' of model '{config.name}': {refusal}"
            ) from None


def inputs_of(sample: Any, config: ModelConfig, model: Path) -> list[InputTensor]:
    """What a `model_warmup` of the config sends; its files lie in the model's `warmup`."""
    tensors = []
    for name, given in sorted(sample.inputs.items()):
        datatype, dims = BY_CONFIG.get(data_type(given)), tuple(given.dims)
        if datatype is None or any(dim < 1 for dim in dims):
            raise Refusal(f"input '{name}' needs a data_type and dims without -1")
        batch = (max(sample.batch_size, 1),) if config.max_batch_size else ()
        one = _data(given, name, dims, model)
        array = np.broadcast_to(one.reshape(dims), (*batch, *dims)) if batch else one.reshape(dims)
        tensors.append(InputTensor(name, datatype, array.shape, np.ascontiguousarray(array)))
    return tensors


def _data(given: Any, name: str, dims: Sequence[int], model: Path) -> Array:
    """Elements of one item of the batch; a file holds that many, and every item gets the same."""
    datatype, count = BY_CONFIG[data_type(given)], math.prod(dims)
    source = given.WhichOneof("input_data_type")
    if source == "input_data_file":
        folder = (model / _FOLDER).resolve()
        path = (folder / given.input_data_file).resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise Refusal(f"input '{name}' has no file {path} in {folder}")
        content = path.read_bytes()
        if datatype is BYTES:
            return split_bytes(content, count, f"warmup input '{name}'")
        if len(content) != count * datatype.numpy.itemsize:
            raise Refusal(f"input '{name}' needs {count * datatype.numpy.itemsize} bytes, {path} has {len(content)}")
        return from_raw(datatype, content)
    if source is None:
        raise Refusal(f"warmup setting expects input '{name}' to have input_data_type set")
    if datatype is BYTES:
        return np.full(count, b"", np.object_)
    if source == "random_data":
        noise = np.random.default_rng(0).integers(0, 256, count * datatype.numpy.itemsize, np.uint8)
        return (noise & 1).view(np.bool_) if datatype.name == "BOOL" else from_raw(datatype, noise.tobytes())
    return np.zeros(count, datatype.numpy)


def _nowhere(reply: object, last: bool) -> None:
    """Nobody asked."""
