"""One version of one model, from its directory to an answer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from weakref import finalize

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.runner.backends import check_runtime, find_backend
from nemoport.runner.batching import batching_of
from nemoport.runner.config_rules import check_config, check_labels, check_tensors, notes
from nemoport.runner.contract import Contract, TensorContract, accept, answer
from nemoport.runner.datatypes import BY_CONFIG
from nemoport.runner.directory import config_file, version_number
from nemoport.runner.ensembles.flow import Ensemble, Find
from nemoport.runner.ensembles.wiring import check_members, is_ensemble
from nemoport.runner.generation.texts import Generator
from nemoport.runner.instances import Placement, placed
from nemoport.runner.jobs import Job, Reply, WhenIdle, job_of
from nemoport.runner.model_config import ModelConfig, as_json, data_type, normalised, read_config, with_backend
from nemoport.runner.pace import Pace
from nemoport.runner.queueing import queue_of
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import InferRequest, InferResponse, OutputTensor, Response
from nemoport.runner.scheduling import Scheduler
from nemoport.runner.signature import Signature
from nemoport.runner.statistics import Statistics
from nemoport.runner.tensors import Array
from nemoport.runner.warmup import warm_up

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """How a model may be loaded, in tritonserver's words for it."""

    model_config_name: str = ""
    disable_auto_complete_config: bool = False
    allow_cpu_fallback: bool = False
    admit: Callable[[Path], None] | None = None
    """Refuses, by an error, a model's directory that may not be loaded."""


DEFAULTS = LoadOptions()


@dataclass(frozen=True)
class ModelVersion:
    """A version that is ready. `notes` say what its config asks for and this runner does otherwise, or not at all."""

    name: str
    version: int
    config: ModelConfig
    contract: Contract
    placement: Placement
    scheduler: Scheduler | Ensemble
    statistics: Statistics
    notes: tuple[str, ...] = ()
    generator: Generator | None = None
    """Text from it, where it is a decoder with a tokenizer."""

    def __post_init__(self) -> None:
        finalize(self, self.scheduler.close)  # whoever lets go of a version need not close it

    @property
    def fell_back_to_cpu(self) -> bool:
        return self.placement.fell_back

    @property
    def decoupled(self) -> bool:
        """It may answer a request any number of times."""
        return bool(self.config.model_transaction_policy.decoupled)

    def submit(
        self, request: InferRequest, deliver: Callable[[Response], None], when_idle: WhenIdle | None = None
    ) -> Job:
        """Refuses what does not fit the contract. `deliver` is called from another thread, or by `when_idle`."""
        feeds = accept(request, self.contract)
        items = next(iter(feeds.values())).shape[0] if self.contract.max_batch_size and feeds else 1
        wanted = request.outputs or tuple(self.contract.outputs)
        job = job_of(request, feeds, wanted, items, lambda reply, last: deliver(self._response(request, reply, last)))
        if self.decoupled:
            job.deliver = self.statistics.counted(job.deliver)
        self.scheduler.submit(job, when_idle)
        return job

    def infer(self, request: InferRequest) -> InferResponse:
        """The answer, waited for. Not for decoupled models."""
        answers: SimpleQueue[Response] = SimpleQueue()
        self.submit(request, answers.put)
        return answers.get().value()

    def is_busy(self) -> bool:
        """A request waits, or is executed."""
        return self.scheduler.is_busy() or (self.generator is not None and self.generator.engine.is_busy())

    def close(self) -> None:
        """Requests under way finish, others are refused."""
        self.scheduler.close()

    def _response(self, request: InferRequest, reply: Reply | None, last: bool) -> Response:
        if reply is None or isinstance(reply, Refusal):
            return Response(reply, last)
        try:
            outputs = tuple([self._output(name, array, request) for name, array in reply.items()])
        except Refusal as refusal:
            return Response(refusal, last)
        return Response(InferResponse(self.name, self.version, outputs, request.id), last)

    def _output(self, name: str, array: Array, request: InferRequest) -> OutputTensor:
        tensor = self.contract.outputs[name]
        if array.dtype != tensor.datatype.numpy:
            raise Refusal(
                f"{request.label}model '{self.name}' answered output '{name}' as {array.dtype}, and its config says "
                f"{tensor.datatype.config}",
                Code.INTERNAL,
            )
        return OutputTensor(name, tensor.datatype, answer(array, tensor, self.contract))

    def metadata(self, versions: list[int]) -> dict[str, Any]:
        """As GET /v2/models/M; a leading -1 is the batch, and the shapes are those that a client sends."""
        return {
            "name": self.name,
            "versions": [str(version) for version in versions],
            "platform": self.config.platform or self.config.backend,
            "inputs": self._tensors(self.contract.inputs),
            "outputs": self._tensors(self.contract.outputs),
        }

    def config_json(self) -> dict[str, Any]:
        return as_json(self.config)

    def _tensors(self, tensors: Mapping[str, TensorContract]) -> list[dict[str, Any]]:
        return [
            {
                "name": tensor.name,
                "datatype": tensor.datatype.name,
                "shape": list(self.contract.client_shape(tensor)),
            }
            for tensor in tensors.values()
        ]


def model_config(
    model: Path, version_directory: Path | None, options: LoadOptions, config: Path | None = None
) -> ModelConfig:
    """The config as far as files say it: checked, with defaults, its tensors perhaps still to come from the model.

    The files of `version_directory` decide the backend where the config does not. `config` is used in place of the
    model's own file.
    """
    path = config or config_file(model, options.model_config_name)
    if path is None and options.disable_auto_complete_config:
        raise DamagedInput(
            f"model directory {model} has no config.pbtxt; add one, or let the runner complete it by leaving out "
            "--disable-auto-complete-config"
        )
    files = [entry.name for entry in version_directory.iterdir()] if version_directory else []
    read = read_config(path) if path else ModelConfig()
    done = normalised(with_backend(read, model.name, files))
    check_config(done, model.name)
    if options.disable_auto_complete_config:
        check_tensors(done)
    return done


def load_version(
    model: Path, version: str, options: LoadOptions = DEFAULTS, config: Path | None = None
) -> ModelVersion:
    """Load the directory `version` of a model, live (`7`) or staged (`staging-7`), whatever the version policy says.

    `config` is a file to use in place of the model's config.pbtxt.
    """
    directory = model / version
    if not directory.is_dir():
        raise DamagedInput(f"model '{model.name}' has no version directory {directory}")
    return load(directory, version_number(version), model_config(model, directory, options, config), options)


def load(directory: Path, version: int, config: ModelConfig, options: LoadOptions) -> ModelVersion:
    """Load a version directory under a config that `model_config` gave."""
    if is_ensemble(config):
        raise UnsupportedInput(
            f"model '{config.name}' cannot be loaded alone: an ensemble needs its members; load it with a server"
        )
    check_runtime(config, directory)
    backend = find_backend(config.backend, config.name)
    config, placement = placed(config, backend.gpus(), allow_cpu_fallback=options.allow_cpu_fallback)
    session = backend.load(directory, config, placement, complete=not options.disable_auto_complete_config)
    config, placement = session.config, replace(placement, notes=placement.notes + session.notes)
    said = placement.notes + notes(config)
    for note in said:
        log.warning("model '%s' version %d: %s", config.name, version, note)
    check_labels(config, directory.parent)
    contract = _contract(config, session.inputs, session.outputs)
    statistics = session.generator.statistics if session.generator else Statistics()
    warm_up(config, contract, directory.parent, session.run, placement.count)
    scheduler = Scheduler(
        config.name,
        session.run,
        placement.count,
        batching=batching_of(config),
        queue=queue_of(config),
        statistics=statistics,
        ordered=config.dynamic_batching.preserve_ordering and not config.model_transaction_policy.decoupled,
        pace=Pace() if session.computes_only else None,
        finalize=session.close,
    )
    return ModelVersion(
        config.name, version, config, contract, placement, scheduler, statistics, said, session.generator
    )


def load_ensemble(version: int, config: ModelConfig, find: Find) -> ModelVersion:
    """An ensemble under a config that `model_config` gave, whose members `find` gives, and decide whether it is
    decoupled, whatever the config says."""
    check_tensors(config)
    contract, statistics = _contract(config, {}, {}), Statistics()
    done = ModelConfig()
    done.CopyFrom(config)
    done.model_transaction_policy.decoupled = check_members(config, contract, find)
    ensemble = Ensemble(done, find, statistics)
    return ModelVersion(done.name, version, done, contract, Placement(None, 0), ensemble, statistics, notes(done))


def _contract(config: ModelConfig, inputs: Signature, outputs: Signature) -> Contract:
    return Contract(
        config.name,
        config.max_batch_size,
        {tensor.name: _tensor(tensor, inputs, optional=tensor.optional) for tensor in config.input},
        {tensor.name: _tensor(tensor, outputs, optional=False) for tensor in config.output},
    )


def _tensor(tensor: Any, signature: Signature, *, optional: bool) -> TensorContract:
    reshape = tuple(tensor.reshape.shape) if tensor.HasField("reshape") else None
    if tensor.name in signature and not signature[tensor.name].shape:
        reshape = ()  # a scalar of the model is [1] to a client
    return TensorContract(tensor.name, BY_CONFIG[data_type(tensor)], tuple(tensor.dims), reshape, optional)
