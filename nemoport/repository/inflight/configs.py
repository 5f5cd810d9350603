"""The configs of the five models as values, and their text: Triton's own schema reads it back, and finds the value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from google.protobuf import json_format, text_encoding, text_format
from tritonclient.grpc import model_config_pb2

from nemoport.repository.inflight import tensors
from nemoport.repository.inflight.tensors import LOGITS, STEPS, Tensor

PREPROCESSING, ENGINE, POSTPROCESSING, BLS, ENSEMBLE, DRAFT = (
    *("preprocessing", "tensorrt_llm", "postprocessing", "tensorrt_llm_bls", "ensemble", "tensorrt_llm_draft"),
)
INSTANCES = 8
"""Of the program that leads requests through the others, at most: each leads one at a time, in a process of its own."""
Config = Mapping[str, Any]
"""Fields of a ModelConfig as protobuf's JSON has them."""


def engine(name: str, logits: str, batch: int, decoupled: bool, parameters: Mapping[str, str]) -> Config:
    return {
        **_model(name, "tensorrtllm", batch, tensors.TENSORRT_LLM, logits),
        "model_transaction_policy": {"decoupled": decoupled},
        **_queue(batch),
        "instance_group": [{"count": 1, "kind": "KIND_CPU"}],
        "parameters": _parameters(parameters),
    }


def preprocessing(batch: int) -> Config:
    return {**_program(PREPROCESSING, batch, tensors.PREPROCESSING), **_queue(batch)}


def postprocessing(batch: int) -> Config:
    return {**_program(POSTPROCESSING, batch, tensors.POSTPROCESSING), "dynamic_batching": {}}


def bls(logits: str, batch: int, decoupled: bool, parameters: Mapping[str, str]) -> Config:
    return {
        **_program(BLS, batch, tensors.BLS, logits, min(batch, INSTANCES)),
        "model_transaction_policy": {"decoupled": decoupled},
        "parameters": _parameters(parameters),
    }


def ensemble(logits: str, batch: int) -> Config:
    steps = [
        {
            "model_name": step.model,
            "model_version": "-1",
            "input_map": dict(step.takes),
            "output_map": dict(step.gives),
        }
        for step in STEPS
    ]
    said = _model(ENSEMBLE, "", batch, tensors.ENSEMBLE, logits)
    return {**said, "platform": "ensemble", "ensemble_scheduling": {"step": steps}}


def wiring() -> dict[str, Any]:
    """The same steps for the program that leads a request through them."""
    return {step.model: {"takes": dict(step.takes), "gives": dict(step.gives)} for step in STEPS}


def render(config: Config, words: Mapping[str, str]) -> str:
    """The text of a config; `words` stand above the parameters that they are of."""
    message = json_format.ParseDict(dict(config), model_config_pb2.ModelConfig())
    shown = {**config, "parameters": {}}
    body = text_format.MessageToString(
        json_format.ParseDict(shown, model_config_pb2.ModelConfig()), as_utf8=True, use_short_repeated_primitives=True
    )
    text: str = "# Written by nemoport.\n" + body + "".join(_written(config.get("parameters", {}), words))
    found = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert found == message, f"the text of {config['name']} is another config than was meant"
    return text


def _written(parameters: Mapping[str, Any], words: Mapping[str, str]) -> Iterable[str]:
    for name, value in parameters.items():
        above = f"\n# {words[name]}\n" if name in words else "\n"
        quoted = text_encoding.CEscape(value["string_value"], as_utf8=True)
        yield f'{above}parameters {{ key: "{name}" value {{ string_value: "{quoted}" }} }}\n'


def _program(
    name: str, batch: int, rows: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], logits: str = "", instances: int = 1
) -> dict[str, Any]:
    return {
        **_model(name, "python", batch, rows, logits),
        "instance_group": [{"count": instances, "kind": "KIND_CPU"}],
    }


def _model(
    name: str, backend: str, batch: int, rows: tuple[tuple[Tensor, ...], tuple[Tensor, ...]], logits: str
) -> dict[str, Any]:
    inputs, outputs = rows
    return {
        "name": name,
        "backend": backend,
        "max_batch_size": batch,
        "input": [_input(tensor, logits) for tensor in inputs],
        "output": [_tensor(tensor, logits) for tensor in outputs],
    }


def _tensor(tensor: Tensor, logits: str) -> dict[str, Any]:
    kind = logits if tensor.type == LOGITS else tensor.type
    return {"name": tensor.name, "data_type": kind, "dims": [str(size) for size in tensor.dims]}


def _input(tensor: Tensor, logits: str) -> dict[str, Any]:
    return {
        **_tensor(tensor, logits),
        **({"reshape": {"shape": []}} if tensor.scalar else {}),
        **({"allow_ragged_batch": True} if tensor.ragged else {}),
        **({"optional": True} if tensor.optional else {}),
    }


def _queue(batch: int) -> dict[str, Any]:
    """Nothing waits for a fuller batch: the engine takes requests in while others are on their way."""
    return {"dynamic_batching": {"preferred_batch_size": [batch], "default_queue_policy": {"max_queue_size": 0}}}


def _parameters(said: Mapping[str, str]) -> dict[str, Any]:
    return {name: {"string_value": value} for name, value in said.items()}
