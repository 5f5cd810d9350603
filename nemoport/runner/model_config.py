"""A model's `config.pbtxt`: read with Triton's own schema, given Triton's defaults, written as its JSON.

Messages are values here: every function returns a new one.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format, text_format
from google.protobuf.descriptor import FieldDescriptor
from tritonclient.grpc.model_config_pb2 import ModelConfig

from nemoport.errors import DamagedInput

__all__ = [
    "KINDS",
    "Kind",
    "ModelConfig",
    "as_json",
    "data_type",
    "normalised",
    "platforms",
    "read_config",
    "with_backend",
]


@dataclass(frozen=True)
class Kind:
    """What names one kind of model: its backend, the platforms that also say it, its file."""

    backend: str
    platforms: tuple[str, ...]
    file: str


KINDS = (  # in the order in which Triton looks for them
    Kind("tensorrt", ("tensorrt_plan",), "model.plan"),
    Kind("onnxruntime", ("onnxruntime_onnx",), "model.onnx"),
    Kind("openvino", (), "model.xml"),
    Kind("pytorch", ("pytorch_libtorch",), "model.pt"),
    Kind("pytorch", ("torch_aoti",), "model.pt2"),
    Kind("python", (), "model.py"),
    Kind("vllm", (), "model.json"),
    Kind("reference", (), "config.json"),  # ours: an artifact for an engine, as it is
)
_ENSEMBLE = "ensemble"
_INTEGERS_OF_64_BITS = (
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_SINT64,
    FieldDescriptor.TYPE_FIXED64,
    FieldDescriptor.TYPE_SFIXED64,
)


def platforms(backend: str) -> tuple[str, ...]:
    """That go with a backend, the one that it has when none is said first; none where it has no such names."""
    return tuple(platform for kind in KINDS if kind.backend == backend for platform in kind.platforms)


def read_config(path: Path) -> ModelConfig:
    try:
        return text_format.Parse(path.read_text("utf-8"), ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise DamagedInput(f"failed to read text proto from {path}: {error}") from None


def with_backend(config: ModelConfig, directory_name: str, files: Collection[str]) -> ModelConfig:
    """Fill name, backend, platform and default_model_filename from each other and from the files of a version."""
    done = _copy(config)
    done.name = done.name or directory_name
    if done.platform == _ENSEMBLE:
        return done
    if not done.backend and (said := next((kind for kind in KINDS if _says(kind, done, files)), None)):
        done.backend, done.platform = said.backend, done.platform or next(iter(said.platforms), "")
    for kind in KINDS:
        if kind.backend == done.backend and done.platform in ("", *kind.platforms):
            done.platform = done.platform or next(iter(kind.platforms), "")
            done.default_model_filename = done.default_model_filename or kind.file
    return done


def normalised(config: ModelConfig) -> ModelConfig:
    """With the defaults that a client sees in the config of a served model."""
    done = _copy(config)
    if done.version_policy.WhichOneof("policy_choice") is None:
        done.version_policy.latest.num_versions = 1
    if done.HasField("sequence_batching") and not done.sequence_batching.max_sequence_idle_microseconds:
        done.sequence_batching.max_sequence_idle_microseconds = 1_000_000
    batching = done.dynamic_batching
    if done.HasField("dynamic_batching") and done.max_batch_size > 0 and not batching.preferred_batch_size:
        batching.preferred_batch_size.append(done.max_batch_size)
    if not done.HasField("ensemble_scheduling"):
        for memory in ("input_pinned_memory", "output_pinned_memory"):
            if not done.optimization.HasField(memory):
                getattr(done.optimization, memory).enable = True
    else:
        done.model_transaction_policy.SetInParent()  # what the members are decides
    return done


def as_json(config: ModelConfig) -> dict[str, Any]:
    """The message as the HTTP endpoint gives it: proto names, enum names, defaults, 64-bit integers as numbers."""
    fields = json_format.MessageToDict(
        config, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return _numbers(config.DESCRIPTOR, fields)


def data_type(tensor: Any) -> str:
    """The name of an enum value, `TYPE_FP32`."""
    return str(tensor.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[tensor.data_type].name)


def _says(kind: Kind, config: ModelConfig, files: Collection[str]) -> bool:
    if config.platform or config.default_model_filename:
        return config.platform in kind.platforms or config.default_model_filename == kind.file
    return kind.file in files


def _copy(config: ModelConfig) -> ModelConfig:
    copy = ModelConfig()
    copy.CopyFrom(config)
    return copy


def _numbers(message: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """Protobuf's JSON prints 64-bit integers as strings; keys of maps stay strings, as JSON wants.

    Members come in the order of the schema, as on Triton.
    """
    return {field.name: _number(field, fields[field.name]) for field in message.fields if field.name in fields}


def _number(field: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [_number(field, item) for item in value]
    if field.message_type is None:
        return int(value) if field.type in _INTEGERS_OF_64_BITS else value
    if field.message_type.GetOptions().map_entry:
        of_value = field.message_type.fields_by_name["value"]
        return {key: _number(of_value, item) for key, item in value.items()}
    return _numbers(field.message_type, value)
