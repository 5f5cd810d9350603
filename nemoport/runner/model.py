"""One version of one model, from its directory to an answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.runner.backends import find_backend
from nemoport.runner.config_rules import check_config, check_tensors, notes
from nemoport.runner.contract import Contract, TensorContract, accept, answer
from nemoport.runner.datatypes import BY_CONFIG
from nemoport.runner.directory import config_file, version_number
from nemoport.runner.instances import Placement, placed
from nemoport.runner.model_config import ModelConfig, as_json, data_type, normalised, read_config, with_backend
from nemoport.runner.request import InferRequest, InferResponse, OutputTensor
from nemoport.runner.scheduling import Execute, direct
from nemoport.runner.signature import Signature, check_agreement, completed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadOptions:
    """How a model may be loaded, in tritonserver's words for it."""

    model_config_name: str = ""
    disable_auto_complete_config: bool = False
    allow_cpu_fallback: bool = False


DEFAULTS = LoadOptions()


@dataclass(frozen=True)
class ModelVersion:
    """A version that is ready. `notes` say what its config asks for and this runner does otherwise, or not at all."""

    name: str
    version: int
    config: ModelConfig
    contract: Contract
    placement: Placement
    execute: Execute
    notes: tuple[str, ...] = ()

    @property
    def fell_back_to_cpu(self) -> bool:
        return self.placement.fell_back

    def infer(self, request: InferRequest) -> InferResponse:
        """Refuses what does not fit the contract."""
        feeds = accept(request, self.contract)
        wanted = request.outputs or tuple(self.contract.outputs)
        arrays = self.execute(feeds, wanted)
        tensors = (self.contract.outputs[name] for name in wanted)
        outputs = tuple(
            OutputTensor(tensor.name, tensor.datatype, answer(array, tensor, self.contract))
            for tensor, array in zip(tensors, arrays, strict=True)
        )
        return InferResponse(self.name, self.version, outputs, request.id)

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
    backend = find_backend(config.backend, config.name)
    config, placement = placed(config, backend.gpus(), allow_cpu_fallback=options.allow_cpu_fallback)
    session = backend.load(directory, config, placement)
    if not options.disable_auto_complete_config:
        config = completed(config, session.inputs, session.outputs)
    check_tensors(config)
    check_agreement(config, session.inputs, session.outputs)
    said = placement.notes + notes(config)
    for note in said:
        log.warning("model '%s' version %d: %s", config.name, version, note)
    execute = direct(session, placement.count)
    contract = _contract(config, session.inputs, session.outputs)
    return ModelVersion(config.name, version, config, contract, placement, execute, said)


def _contract(config: ModelConfig, inputs: Signature, outputs: Signature) -> Contract:
    return Contract(
        config.name,
        config.max_batch_size,
        {tensor.name: _tensor(tensor, inputs, optional=tensor.optional) for tensor in config.input},
        {tensor.name: _tensor(tensor, outputs, optional=False) for tensor in config.output},
    )


def _tensor(tensor: Any, signature: Signature, *, optional: bool) -> TensorContract:
    reshape = tuple(tensor.reshape.shape) if tensor.HasField("reshape") else None
    if not signature[tensor.name].shape:
        reshape = ()  # a scalar of the model is [1] to a client
    return TensorContract(tensor.name, BY_CONFIG[data_type(tensor)], tuple(tensor.dims), reshape, optional)
