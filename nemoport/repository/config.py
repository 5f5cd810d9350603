"""`config.pbtxt`: written by a template, proofread with Triton's own schema.

A config belongs to a model and is shared by all its versions. It is rendered once, when the first version is
published; from then on it is its owner's, and only the list of live versions in it is changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format, text_encoding, text_format
from jinja2 import Environment, PackageLoader, StrictUndefined
from tritonclient.grpc import model_config_pb2

from nemoport import artifact
from nemoport.errors import DamagedInput, UnsupportedInput

FILE = "config.pbtxt"
MAX_BATCH_SIZE = 8
"""Triton's own guess for a model that can batch is 4; 8 keeps a small GPU busy, and a [8, 4096, 32768] float32 logits
tensor is still 4 GiB."""

BATCH = "batch"
"""The name of the axis that Triton batches over, in a signature."""

DATA_TYPES = {
    "bool": "TYPE_BOOL",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
    "string": "TYPE_STRING",
}


@dataclass(frozen=True)
class Kind:
    """How Triton serves one kind of artifact. Its template is `templates/<kind>.config.pbtxt`."""

    backend: str
    filename: str


KINDS = {"onnx": Kind(backend="onnxruntime", filename="model.onnx")}


@dataclass(frozen=True)
class Tensor:
    name: str
    data_type: str
    dims: tuple[int, ...]
    """-1 is what varies; without the batch axis where the model batches."""


@dataclass(frozen=True, kw_only=True)
class Config:
    name: str
    backend: str
    filename: str
    max_batch_size: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    """The live versions; none where the policy is not `specific`."""
    instance_kind: str = "KIND_AUTO"
    instances: int = 1

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """A tensor's whole shape, with the batch axis."""
        return (-1, *tensor.dims) if self.max_batch_size else tensor.dims


def from_artifact(made: artifact.Artifact, name: str, version: int, max_batch_size: int = MAX_BATCH_SIZE) -> Config:
    """The config of a model whose only version is this artifact. A model batches when every tensor's first axis is
    called `batch`."""
    if made.kind not in KINDS:
        raise UnsupportedInput(
            f"an artifact of kind {made.kind} cannot be published yet, only {', '.join(KINDS)}; "
            f"convert the checkpoint with --to {next(iter(KINDS))}"
        )
    kind = KINDS[made.kind]
    if made.signature is None or kind.filename not in {file.path for file in made.files}:
        raise DamagedInput(f"the {made.kind} artifact has no signature or no {kind.filename}; convert again")
    tensors = (*made.signature.inputs, *made.signature.outputs)
    batches = max_batch_size > 0 and all(tensor.shape[:1] == (BATCH,) for tensor in tensors)
    return Config(
        name=name,
        backend=kind.backend,
        filename=kind.filename,
        max_batch_size=max_batch_size if batches else 0,
        inputs=tuple(_tensor(tensor, batches) for tensor in made.signature.inputs),
        outputs=tuple(_tensor(tensor, batches) for tensor in made.signature.outputs),
        versions=(version,),
    )


def render(kind: str, config: Config) -> str:
    """The text of a config; what Triton reads from it is exactly the value."""
    text: str = _environment().get_template(f"{kind}.config.pbtxt").render(config=config)
    found, wanted = _message(text, "the rendered config"), _as_message(config)
    assert found == wanted, f"templates/{kind}.config.pbtxt says {found}, the config is {wanted}"
    return text


def parse(text: str, place: str) -> Config:
    """What a config says of the things nemoport keeps; other fields may be there. `place` is for the error."""
    message = _message(text, place)
    groups = message.get("instance_group", [{}])
    return Config(
        name=message.get("name", ""),
        backend=message.get("backend", ""),
        filename=message.get("default_model_filename", ""),
        max_batch_size=message.get("max_batch_size", 0),
        inputs=_tensors(message.get("input", [])),
        outputs=_tensors(message.get("output", [])),
        versions=tuple(
            int(number) for number in message.get("version_policy", {}).get("specific", {}).get("versions", [])
        ),
        instance_kind=groups[0].get("kind", "KIND_AUTO"),
        instances=groups[0].get("count", 0),
    )


def with_versions(text: str, versions: Sequence[int], place: str) -> str:
    """The same text, comments and all, with another list of live versions."""
    policy = f"version_policy {{ specific {{ versions: [ {', '.join(map(str, sorted(versions)))} ] }} }}"
    changed, count = _POLICY.subn(policy, text)
    before, after = _message(text, place), _message(changed, place)
    listed = after.pop("version_policy", None)
    before.pop("version_policy", None)
    if (
        count != 1
        or before != after
        or listed != {"specific": {"versions": [str(number) for number in sorted(versions)]}}
    ):
        raise UnsupportedInput(
            f"{place} lists its live versions in a way that cannot be edited safely; write the policy once, as "
            f"`version_policy {{ specific {{ versions: [ 1 ] }} }}`, with the versions that are live now"
        )
    return changed


def mismatch(config: Config, wanted: Config) -> str | None:
    """Why a model with this config cannot serve an artifact whose own config would be `wanted`. A config may name
    fewer outputs and may narrow an input's varying axis to a number."""
    for field in ("backend", "filename"):
        if (has := getattr(config, field)) != (needs := getattr(wanted, field)):
            return f"it has {field} {has!r}, this version needs {needs!r}"
    inputs = {tensor.name: tensor for tensor in wanted.inputs}
    outputs = {tensor.name: tensor for tensor in wanted.outputs}
    if missing := sorted(inputs.keys() ^ {tensor.name for tensor in config.inputs}):
        return f"only one of the two has the input {missing[0]!r}"
    if missing := sorted({tensor.name for tensor in config.outputs} - outputs.keys()):
        return f"this version has no output {missing[0]!r}"
    for tensor, other in [(tensor, inputs[tensor.name]) for tensor in config.inputs] + [
        (tensor, outputs[tensor.name]) for tensor in config.outputs
    ]:
        has, needs = config.shape(tensor), wanted.shape(other)
        narrowed = (
            tensor in config.inputs
            and len(has) == len(needs)
            and all(ours == theirs or theirs == -1 for ours, theirs in zip(has, needs, strict=True))
        )
        if tensor.data_type != other.data_type or not (has == needs or narrowed):
            ours, theirs = f"{tensor.data_type} {list(has)}", f"{other.data_type} {list(needs)}"
            return f"it has {tensor.name!r} as {ours}, this version as {theirs}"
    return None


_POLICY = re.compile(r"version_policy\s*:?\s*\{\s*specific\s*:?\s*\{\s*versions\s*:\s*\[[\d\s,]*\]\s*\}\s*\}")


def _environment() -> Environment:
    environment = Environment(  # noqa: S701  (the output is no HTML; strings go through `quoted`)
        loader=PackageLoader("nemoport", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quoted"] = lambda text: f'"{text_encoding.CEscape(text, as_utf8=True)}"'
    return environment


def _message(text: str, place: str) -> dict[str, Any]:
    try:
        message = text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise DamagedInput(f"{place} is not a config that Triton reads: {error}") from error
    found: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return found


def _as_message(config: Config) -> dict[str, Any]:
    """As protobuf's JSON has it: 64-bit numbers are strings, zeros are left out."""
    message: dict[str, Any] = {
        "name": config.name,
        "backend": config.backend,
        "default_model_filename": config.filename,
        "max_batch_size": config.max_batch_size,
        "input": [_row(tensor) for tensor in config.inputs],
        "output": [_row(tensor) for tensor in config.outputs],
        "instance_group": [{"kind": config.instance_kind, "count": config.instances}],
        "version_policy": {"specific": {"versions": [str(number) for number in config.versions]}},
    }
    if config.instance_kind == "KIND_AUTO":
        del message["instance_group"][0]["kind"]
    return {name: value for name, value in message.items() if value}


def _row(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "data_type": tensor.data_type, "dims": [str(dim) for dim in tensor.dims]}


def _tensors(rows: Sequence[Mapping[str, Any]]) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(row.get("name", ""), row.get("data_type", ""), tuple(int(dim) for dim in row.get("dims", [])))
        for row in rows
    )


def _tensor(tensor: artifact.Tensor, batches: bool) -> Tensor:
    if tensor.dtype not in DATA_TYPES:
        raise UnsupportedInput(f"{tensor.name} has dtype {tensor.dtype}; Triton has {', '.join(DATA_TYPES)}")
    axes = tensor.shape[1:] if batches else tensor.shape
    if not axes:
        raise UnsupportedInput(f"{tensor.name} is a single number per request; Triton's dims need one axis or more")
    return Tensor(tensor.name, DATA_TYPES[tensor.dtype], tuple(-1 if isinstance(axis, str) else axis for axis in axes))
