"""Runs the class TritonPythonModel of a model.py in this process, an object of it per instance."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from nemoport.errors import DamagedInput, NemoportError, UnsupportedInput
from nemoport.runner.backends import DamagedModel, LackingModel
from nemoport.runner.config_rules import check_tensors
from nemoport.runner.devices import visible_gpus
from nemoport.runner.directory import version_number
from nemoport.runner.instances import Placement
from nemoport.runner.jobs import Job, Outcome, Reply
from nemoport.runner.model_config import ModelConfig, as_json, normalised
from nemoport.runner.python_model import triton_python_backend_utils as pb_utils
from nemoport.runner.python_model.loading import load_module, own_modules, told
from nemoport.runner.python_model.sender import InferenceResponseSender, reply_of, request_of
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.signature import TensorSignature

_COMPLETED = ("max_batch_size", "input", "output", "dynamic_batching", "model_transaction_policy")
_REFUSED_PARAMETERS = {"EXECUTION_ENV_PATH": "a Python environment of its own"}
_RAISED = (Exception, SystemExit)
"""Whatever a model raises: `sys.exit()` ends the model's call, and neither the server nor the thread of an instance."""


def gpus() -> tuple[int, ...]:
    return visible_gpus()


def load(version_directory: Path, config: ModelConfig, placement: Placement, *, complete: bool) -> PythonSession:
    path = version_directory / config.default_model_filename
    if not path.is_file():
        raise DamagedInput(f"model '{config.name}' has no file {path}; a Python model is a class in it")
    for parameter, what in _REFUSED_PARAMETERS.items():
        if parameter in config.parameters:
            raise UnsupportedInput(f"model '{config.name}' asks for {what} ({parameter}), which this runner lacks")
    try:
        model = load_module(path).TritonPythonModel
        if complete and hasattr(model, "auto_complete_config"):
            config = _completed(config, model)
        check_tensors(config)
        objects = [_instance(model, version_directory, config, placement, at) for at in range(placement.count)]
    except NemoportError:
        raise
    except ModuleNotFoundError as error:
        raise LackingModel(told(error)) from error
    except _RAISED as error:
        raise DamagedModel(told(error)) from error
    return PythonSession(objects, config, version_number(version_directory.name))


class PythonSession:
    """A Python model has no signature but its config."""

    inputs: Mapping[str, TensorSignature] = {}
    outputs: Mapping[str, TensorSignature] = {}
    computes_only = False
    generator = None
    notes = ()

    def __init__(self, objects: Sequence[Any], config: ModelConfig, version: int) -> None:
        self.config, self._objects, self._version = config, objects, version
        self._decoupled = bool(config.model_transaction_policy.decoupled)

    def run(self, jobs: Sequence[Job], instance: int) -> Outcome:
        senders = [InferenceResponseSender(job, self._decoupled) for job in jobs]
        pairs = zip(jobs, senders, strict=True)
        requests = [request_of(job, sender, self.config.name, self._version) for job, sender in pairs]
        began = time.monotonic_ns()
        replies: list[Reply | None]
        try:
            responses = self._objects[instance].execute(requests)
            ended = time.monotonic_ns()
            replies = self._replies(responses, jobs, senders)
        except _RAISED as error:
            ended = time.monotonic_ns()
            refusal = Refusal(
                f"Failed to process the request(s) for model '{self._name(instance)}', message: {told(error)}",
                Code.INTERNAL,
            )
            replies = [refusal if sender.close() else None for sender in senders]
        return Outcome(replies, began, ended)

    def close(self) -> None:
        with ExitStack() as stack:  # one that fails is heard of, after the others have ended
            for each in reversed(self._objects):
                if hasattr(each, "finalize"):
                    stack.callback(each.finalize)

    def _name(self, instance: int) -> str:
        return instance_name(self.config, instance)

    def _replies(
        self, responses: Any, jobs: Sequence[Job], senders: Sequence[InferenceResponseSender]
    ) -> list[Reply | None]:
        """None where the model answers, or has answered, with its sender."""
        if self._decoupled:
            if responses is not None:
                raise pb_utils.TritonModelException(
                    f"Python model '{self.config.name}' is using the decoupled mode and the execute function must "
                    "return None."
                )
            return [None] * len(jobs)
        if not isinstance(responses, list):
            raise pb_utils.TritonModelException("Expected a list in the execute return")
        if len(responses) != len(jobs):
            raise pb_utils.TritonModelException(
                "Number of InferenceResponse objects do not match the number of InferenceRequest objects. "
                f"InferenceRequest(s) size is:{len(jobs)}, and InferenceResponse(s) size is:{len(responses)}\n"
            )
        for response in responses:
            if response is not None and not isinstance(response, pb_utils.InferenceResponse):
                raise pb_utils.TritonModelException(
                    "Expected an 'InferenceResponse' object in the execute function return list, "
                    f"found type '{type(response).__name__}'."
                )
        return [
            reply_of(response, job) if response is not None and sender.close() else None
            for response, job, sender in zip(responses, jobs, senders, strict=True)
        ]


def instance_name(config: ModelConfig, instance: int) -> str:
    """The instances of all groups in one row; a group of one gives its own name."""
    for group in config.instance_group:
        if instance < group.count:
            return f"{group.name}_{instance}"
        instance -= group.count
    raise AssertionError("more instances than the groups have")


def _completed(config: ModelConfig, model: Any) -> ModelConfig:
    asked = pb_utils.ModelConfig(json.dumps(as_json(config)))
    answered = model.auto_complete_config(asked)
    if not isinstance(answered, pb_utils.ModelConfig):
        raise DamagedModel(f"auto_complete_config in model '{config.name}' must return the pb_utils.ModelConfig object")
    fields = as_json(config) | {name: value for name, value in answered.as_dict().items() if name in _COMPLETED}
    return normalised(json_format.ParseDict(fields, ModelConfig()))


def _instance(model: Any, version_directory: Path, config: ModelConfig, placement: Placement, at: int) -> Any:
    made = model()
    if hasattr(made, "initialize"):
        arguments = {
            "model_config": json.dumps(as_json(config)),
            "model_instance_kind": "CPU" if placement.gpu is None else "GPU",
            "model_instance_name": instance_name(config, at),
            "model_instance_device_id": str(placement.gpu or 0),
            "model_repository": str(version_directory.parent),
            "model_version": str(version_number(version_directory.name)),
            "model_name": config.name,
        }
        with own_modules(version_directory):
            made.initialize(arguments)
    if not hasattr(made, "execute"):
        raise DamagedInput(f"TritonPythonModel of model '{config.name}' has no function execute")
    return made
