"""Text from an `hf` or `trtllm` artifact by the reference decoder: no engine needed, and none of an engine's speed.

The directory of the version is the artifact: `config.json`, safetensors and the tokenizer. One that has rank files is
run rank by rank, all in this process. Inputs and outputs are those of Triton's vLLM backend.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import monotonic_ns
from typing import Any

import numpy as np
from google.protobuf import json_format

from nemoport import reference
from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters import source
from nemoport.exporters.dequantized import all_dequantized
from nemoport.runner.config_rules import EXECUTED_BY, check_tensors
from nemoport.runner.devices import visible_gpus
from nemoport.runner.generation.asking import end_counted
from nemoport.runner.generation.loading import generator
from nemoport.runner.generation.texts import Generator, Piece
from nemoport.runner.http.head import parse_json
from nemoport.runner.http.texts import wanted_of
from nemoport.runner.instances import Placement
from nemoport.runner.jobs import Job, Later, Outcome
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.refusal import Refusal
from nemoport.runner.signature import TensorSignature
from nemoport.runner.tensors import Array
from nemoport.spec import LanguageModel

KEEP = 1 << 40
"""Bytes of weights in memory: all, every step reads them."""
_WINDOWS = "max_attention_window"
"""The parameter that says what rank files do not: a window for each layer, taken in turns."""
_RANKS = "rank0.safetensors"
_DTYPE = "float32"
_TEXT, _ANSWER, _PARAMETERS = "text_input", "text_output", "sampling_parameters"
_INPUTS = {  # data type, and whether a request may leave it out
    _TEXT: ("TYPE_STRING", False),
    "stream": ("TYPE_BOOL", True),
    _PARAMETERS: ("TYPE_STRING", True),
    "exclude_input_in_output": ("TYPE_BOOL", True),
}


def gpus() -> tuple[int, ...]:
    return visible_gpus()


def load(version_directory: Path, config: ModelConfig, placement: Placement, *, complete: bool) -> ReferenceSession:
    return serve(version_directory, config, placement, complete=complete)


def serve(artifact: Path, config: ModelConfig, placement: Placement, *, complete: bool) -> ReferenceSession:
    """The artifact in any directory."""
    config = _told(_completed(config) if complete else config)
    check_tensors(config)
    _check_names(config)
    device = "cpu" if placement.gpu is None else f"cuda:{placement.gpu}"
    ranked = (artifact / _RANKS).is_file()
    runs = _ranks(artifact, config, device) if ranked else _whole(artifact, config, device)
    from nemoport.reference.executor import ReferenceExecutor  # torch is there, or loading had said that it is not

    made = generator(artifact, config, ReferenceExecutor(runs))
    if made is None:
        raise DamagedInput(
            f"model '{config.name}' has no tokenizer.json in {artifact}, so it cannot answer in text; "
            "convert the checkpoint with its tokenizer beside it"
        )
    return ReferenceSession(made, config)


def _completed(config: ModelConfig) -> ModelConfig:
    """With the tensors of Triton's vLLM backend where it has none."""
    if config.input or config.output:
        return config
    tensors = [{"name": name, "data_type": kind, "dims": [1], "optional": o} for name, (kind, o) in _INPUTS.items()]
    answer = {"name": _ANSWER, "data_type": "TYPE_STRING", "dims": [-1]}
    done = json_format.ParseDict({"input": tensors, "output": [answer]}, ModelConfig())
    done.MergeFrom(config)
    return done


def _told(config: ModelConfig) -> ModelConfig:
    """With a word on who executes it, for its config, its metadata and the reports."""
    done = ModelConfig()
    done.CopyFrom(config)
    done.platform = "reference"
    done.parameters[EXECUTED_BY].string_value = f"the reference decoder in {_DTYPE}: no engine is installed here"
    return done


def _check_names(config: ModelConfig) -> None:
    unknown = [tensor.name for tensor in config.input if tensor.name not in _INPUTS]
    outputs = [tensor.name for tensor in config.output]
    if unknown or outputs != [_ANSWER] or _TEXT not in [tensor.name for tensor in config.input]:
        raise DamagedInput(
            f"model '{config.name}' has inputs and outputs of another kind ({', '.join(unknown + outputs)}); this "
            f"backend has {', '.join(_INPUTS)} and {_ANSWER}, and completes a config that names none"
        )


def _whole(directory: Path, config: ModelConfig, device: str) -> Any:
    model = source.model(directory)
    if not isinstance(model.spec.head, LanguageModel):
        raise UnsupportedInput(
            f"model '{config.name}' is of the family {model.spec.family}, which writes no text; convert its checkpoint "
            "with --to onnx, and publish that"
        )
    return reference.load(model.spec, all_dequantized(model.tensors), dtype=_DTYPE, device=device, keep=KEEP)


def _ranks(directory: Path, config: ModelConfig, device: str) -> Any:
    said = json.loads((directory / "config.json").read_bytes()).get("quantization") or {}
    if said.get("quant_algo"):
        raise UnsupportedInput(
            f"model '{config.name}' is quantized ({said['quant_algo']}), and the reference serves plain ranks only; "
            "serve the hf artifact of the same checkpoint"
        )
    told = config.parameters[_WINDOWS].string_value if _WINDOWS in config.parameters else ""
    windows = [int(each) for each in told.split()] or None
    return reference.load_ranks(directory, max_attention_window=windows, dtype=_DTYPE, device=device, keep=KEEP)


class ReferenceSession:
    """Requests are answered by the generator, all at once; an instance only hands them over. A text whose request is
    cancelled ends before its next token."""

    inputs: Mapping[str, TensorSignature] = {}
    outputs: Mapping[str, TensorSignature] = {}

    computes_only = False
    notes = ()

    def __init__(self, generator: Generator, config: ModelConfig) -> None:
        self.generator: Generator | None = generator
        self.config = config
        self._submit, self._close = generator.submit, generator.close

    def run(self, jobs: Sequence[Job], instance: int) -> Outcome:
        began = monotonic_ns()
        replies = [self._ask(job) for job in jobs]
        return Outcome(replies, began, monotonic_ns())

    def close(self) -> None:
        self._close()

    def _ask(self, job: Job) -> Refusal | Later:
        assert self.generator is not None
        try:
            wanted = wanted_of(self.generator, _fields(job))
            if wanted.stream and not self.config.model_transaction_policy.decoupled:
                raise Refusal("Streaming is only supported in decoupled mode.")
            deliver = _in_pieces(job) if wanted.stream else _whole_to(job, wanted.before)
            if job.queued:  # nobody queued a warm-up, which does not count
                deliver = end_counted(self.generator.statistics, job.queued, deliver)
            self._submit(wanted.request, deliver, lambda: job.cancelled)
        except Refusal as refusal:
            return Refusal(f"{job.request.label}{refusal}", refusal.code)
        return Later.LATER


def _fields(job: Job) -> dict[str, Any]:
    """A request in the words of `generate`: parameters, those in JSON among the inputs, and the other inputs."""
    try:
        said = {name: _element(array) for name, array in job.feeds.items()}
    except UnicodeDecodeError as error:
        raise Refusal(f"an input is not UTF-8 text: {error}") from None
    nested = parse_json(said.pop(_PARAMETERS, "").encode())
    return {**job.request.parameters, **nested, **said}


def _element(array: Array) -> Any:
    (value,) = array.reshape(-1).tolist()
    return value.decode() if isinstance(value, bytes) else value


def _in_pieces(job: Job) -> Callable[[Piece | Refusal], None]:
    def deliver(piece: Piece | Refusal) -> None:
        if isinstance(piece, Refusal):
            job.deliver(piece, True)
        else:
            job.deliver(_answer(piece.text), piece.reason is not None)

    return deliver


def _whole_to(job: Job, before: str) -> Callable[[Piece | Refusal], None]:
    said = [before]

    def deliver(piece: Piece | Refusal) -> None:
        if isinstance(piece, Refusal):
            job.deliver(piece, True)
            return
        said.append(piece.text)
        if piece.reason:
            job.deliver(_answer("".join(said)), True)

    return deliver


def _answer(text: str) -> dict[str, Array]:
    return {_ANSWER: np.array([text.encode()], np.object_)}
