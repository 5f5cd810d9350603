"""How a graph is executed: what Triton's ONNX Runtime backend takes of accelerators and parameters.

Judged by what the runner itself does with them, a piece of the config at a time, so that a finding has its place.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemoport.check.finding import At, Problem
from nemoport.check.rules.row import Rule
from nemoport.check.subject import Subject
from nemoport.errors import DamagedInput
from nemoport.runner.execution_providers import PROVIDERS, Providers, providers
from nemoport.runner.instances import Placement
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.session_options import session_options

_ACCELERATORS: At = ("optimization", "execution_accelerators")
_KINDS = ("gpu_execution_accelerator", "cpu_execution_accelerator")


def refused(subject: Subject) -> Iterator[Problem]:
    gpu, wrong = _gpu(subject), False
    for at, piece in _pieces(subject):
        try:
            _asked(piece, gpu)
        except DamagedInput as error:
            wrong = True
            yield _problem(at, error)
    if not wrong and (config := _config(subject)) is not None:
        try:
            _asked(config, gpu)
        except DamagedInput as error:
            yield _problem(_ACCELERATORS, error)


def without_effect(subject: Subject) -> Iterator[Problem]:
    gpu = _gpu(subject)
    for at, piece in _pieces(subject) if gpu is not None else ():
        try:
            notes = _asked(piece, gpu).notes
        except DamagedInput:
            continue
        for note in notes:
            yield Problem(at, note, "what Triton's backend does not overwrite", "take it away, or say it there")


def _asked(config: ModelConfig, gpu: int | None) -> Providers:
    session_options(config, Placement(gpu, 1))
    return providers(config, gpu, PROVIDERS)


def _config(subject: Subject) -> ModelConfig | None:
    config = subject.model.config
    return config if config is not None and config.backend == "onnxruntime" else None


def _gpu(subject: Subject) -> int | None:
    """One on which some instance may run; None where all are on the CPU."""
    config = subject.model.config
    if config is None or subject.target.gpus == 0:
        return None
    on_cpu = [group.kind in (group.KIND_CPU, group.KIND_MODEL) for group in config.instance_group]
    return None if on_cpu and all(on_cpu) else 0


def _pieces(subject: Subject) -> Iterator[tuple[At, ModelConfig]]:
    """Every accelerator and every parameter as a config of its own."""
    config = _config(subject)
    if config is None:
        return
    for kind in _KINDS:
        for number, accelerator in enumerate(getattr(config.optimization.execution_accelerators, kind)):
            piece = ModelConfig(name=config.name)
            getattr(piece.optimization.execution_accelerators, kind).append(accelerator)
            yield (*_ACCELERATORS, kind, number), piece
    for name in sorted(config.parameters):
        piece = ModelConfig(name=config.name)
        piece.parameters[name].CopyFrom(config.parameters[name])
        yield ("parameters", name, "value", "string_value"), piece


def _problem(at: At, error: DamagedInput) -> Problem:
    return Problem(at, str(error), "what Triton's ONNX Runtime backend takes", "mend it, or take it away")


RULES = (
    Rule("NP307", "error", "Accelerators and parameters are ones that the ONNX Runtime backend takes.", refused),
    Rule("NP308", "warning", "What is said of an accelerator has an effect.", without_effect),
)
