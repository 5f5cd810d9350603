"""`config.pbtxt`: written by a template, proofread with Triton's own schema.

A config belongs to a model and is shared by all its versions. It is generated from the manifest of the version that is
published first, and from `config.values.yaml` beside it (`values.py`), again whenever its owner asks for it. In between
only the list of live versions in it is changed. A label is a second config, with other versions of the same tree.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blake3 import blake3
from google.protobuf import json_format, text_encoding, text_format
from jinja2 import Environment, PackageLoader, StrictUndefined
from tritonclient.grpc import model_config_pb2

from nemoport import artifact
from nemoport.errors import DamagedInput, UnsupportedInput, UsageError
from nemoport.repository import ensemble, kinds

FILE = "config.pbtxt"
LABELS = "configs"
"""The directory that --model-config-name looks into."""
LABEL_MARK = "# The label "
MAX_BATCH_SIZE = 8
"""Triton's own guess for a model that can batch is 4; 8 keeps a small GPU busy, and a [8, 4096, 32768] float32 logits
tensor is still 4 GiB."""

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
WORDS = {
    "instance_group": "Copies of the weights. KIND_AUTO: on every GPU of the server, or on the CPU where it has none.",
    "dynamic_batching": "Requests that wait together and fit together are run together.",
    "model_warmup": "Sent before the model is ready, so that the first client does not pay for it.",
    "parameters": "For the backend.",
    "ensemble_scheduling": "Maps go from a member's name of a tensor to the ensemble's. Version -1 is the latest.",
    "model_transaction_policy": "Decoupled: a request may have any number of answers.",
}
"""What the generated config says above a field."""


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
    scheduling: Mapping[str, Any] = field(default_factory=dict)
    """The steps of an ensemble, in protobuf's JSON."""
    tuning: Mapping[str, Any] = field(default_factory=dict)
    """Every other field, in protobuf's JSON."""

    def shape(self, tensor: Tensor) -> tuple[int, ...]:
        """A tensor's whole shape, with the batch axis."""
        return (-1, *tensor.dims) if self.max_batch_size else tensor.dims


OWN = (
    *("name", "backend", "default_model_filename", "max_batch_size", "input", "output", "version_policy"),
    *("ensemble_scheduling",),
)
"""The fields that are not tuning."""
ENSEMBLE = "ensemble"
"""The platform of a model that is others in a row."""


def from_artifact(made: artifact.Artifact, name: str, version: int, max_batch_size: int = MAX_BATCH_SIZE) -> Config:
    """The config of a model whose only version is this artifact."""
    kind = kinds.kind_of(made)
    batch = max_batch_size if max_batch_size > 0 and kinds.batches(made) else 0
    *_, most = kinds.built_for(made).get(kinds.BATCH, (batch,))
    if batch > most and max_batch_size != MAX_BATCH_SIZE:
        raise UsageError(
            f"max_batch_size {batch} is more than the {most} that the plan was built for; use {most}, or compile it "
            f"with --axis {kinds.BATCH}=1:{most}:{batch}"
        )
    batch = min(batch, most)
    inputs = made.signature.inputs if made.signature else ()
    outputs = made.signature.outputs if made.signature else ()
    return Config(
        name=name,
        backend=kind.backend,
        filename=kind.filename,
        max_batch_size=batch,
        inputs=tuple(_tensor(tensor, batch > 0) for tensor in inputs),
        outputs=tuple(_tensor(tensor, batch > 0) for tensor in outputs),
        versions=(version,),
        scheduling=ensemble.scheduling(made),
        tuning=normal(kinds.tuning(made, batch, DATA_TYPES), made.kind),
    )


def normal(fields: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Fields of a config as protobuf's JSON writes them; one that Triton does not know is refused."""
    try:
        message = json_format.ParseDict(dict(fields), model_config_pb2.ModelConfig())
    except json_format.ParseError as error:
        raise UsageError(f"{place} says what is no field of a config: {error}") from error
    found: dict[str, Any] = json_format.MessageToDict(message, preserving_proto_field_name=True)
    return found


def render(config: Config) -> str:
    """The text of a config; what Triton reads from it is exactly the value."""
    fields = {**config.tuning, **_scheduled(config)}
    tuning = [(WORDS.get(name, ""), _text({name: value})) for name, value in sorted(fields.items())]
    text: str = _environment().get_template(FILE).render(config=config, tuning=tuning)
    found, wanted = _message(text, "the rendered config"), _as_message(config)
    assert found == wanted, f"templates/{FILE} says {found}, the config is {wanted}"
    return f"{_SEAL}{_digest(text)}\n{text}"


def edited(text: str) -> bool:
    """Whether more than the list of live versions was changed since the text was generated."""
    head, _, rest = text.partition("\n")
    return head != f"{_SEAL}{_digest(rest)}"


def parse(text: str, place: str) -> Config:
    """What a config says. `place` is for the error."""
    message = _message(text, place)
    listed = message.get("version_policy", {}).get("specific", {}).get("versions", [])
    return Config(
        name=message.get("name", ""),
        backend=message.get("backend", ""),
        filename=message.get("default_model_filename", ""),
        max_batch_size=message.get("max_batch_size", 0),
        inputs=_tensors(message.get("input", [])),
        outputs=_tensors(message.get("output", [])),
        versions=tuple(int(number) for number in listed),
        scheduling=(steps := message.get("ensemble_scheduling", {})),
        tuning={
            name: value for name, value in message.items() if name not in OWN and not (steps and name == "platform")
        },
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


def labelled(text: str, label: str, version: int, live: Sequence[int], place: str) -> str:
    """The config of a label: as the model's, but what it serves to requests that name no version is `version`. The live
    versions before it stay, for clients that pin them."""
    versions = sorted({version, *(number for number in live if number < version)})
    mark = f"{LABEL_MARK}{label}, version {version}: for `--model-config-name {label}`. Follows {FILE}; do not edit.\n"
    return mark + with_versions(text, versions, place)


def mismatch(config: Config, wanted: Config) -> str | None:
    """Why a model with this config cannot serve an artifact whose own config would be `wanted`. A config may name
    fewer outputs and may narrow an input's varying axis to a number."""
    for word in ("backend", "filename"):
        if (has := getattr(config, word)) != (needs := getattr(wanted, word)):
            return f"it has {word} {has!r}, this version needs {needs!r}"
    if config.scheduling != wanted.scheduling:
        return "its steps are others than this version's"
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


_SEAL = "# generated: "


def _digest(text: str) -> str:
    """Of a generated text, whatever versions it lists."""
    return blake3(_POLICY.sub("", text).encode()).hexdigest()[:16]


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


def _text(fields: Mapping[str, Any]) -> str:
    """Some fields as a config writes them."""
    message = json_format.ParseDict(dict(fields), model_config_pb2.ModelConfig())
    text: str = text_format.MessageToString(message, as_utf8=True)
    return text


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
        "version_policy": {"specific": {"versions": [str(number) for number in config.versions]}},
    }
    return {name: value for name, value in message.items() if value} | dict(config.tuning) | _scheduled(config)


def _scheduled(config: Config) -> dict[str, Any]:
    return {"platform": ENSEMBLE, "ensemble_scheduling": config.scheduling} if config.scheduling else {}


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
