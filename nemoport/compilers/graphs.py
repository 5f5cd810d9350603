"""The graphs of an ONNX artifact: one, or one for each pipeline stage. A builder makes its product of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nemoport.artifact import Artifact, Signature, stage_place
from nemoport.errors import DamagedInput, UnsupportedInput

if TYPE_CHECKING:
    from onnx import ModelProto

GRAPH = "model.onnx"


@dataclass(frozen=True)
class Part:
    place: str
    """What its paths begin with: `stage1/`, or nothing of a graph that is whole."""
    signature: Signature


def parts(artifact: Path, made: Artifact) -> tuple[Part, ...]:
    """As they were converted; what was compiled from them is refused."""
    if made.built_with:
        with_what = ", ".join(f"{name} {value}" for name, value in made.built_with.items())
        raise UnsupportedInput(
            f"{artifact} was compiled already, with {with_what}; "
            "compile the artifact that `nemoport convert --to onnx` wrote"
        )
    if made.signature is None:
        raise DamagedInput(f"{artifact} does not say what goes in and out; convert again")
    staged = (Part(stage_place(number), signature) for number, signature in enumerate(made.stages))
    return tuple(staged) or (Part("", made.signature),)


def read(path: Path, way_out: str) -> ModelProto:
    """A graph without its weights; refused, with the way out, where it is none."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise DamagedInput(f"{path} is no graph of ONNX ({error}); {way_out}") from error


def beside(made: Artifact) -> tuple[str, ...]:
    """The tokenizer and what else a server of texts reads: all files but graphs, their weights, and the ledger."""
    return tuple(
        file.path for file in made.files if file.blake3 and not file.path.endswith((GRAPH, "ledger.jsonl", ".npz"))
    )
