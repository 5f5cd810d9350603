"""An ensemble: models in a row, as one model. Tensors go by their names: what a step makes, a later one takes.

    TEXT -> [tokenizer] -> input_ids, attention_mask -> [encoder] -> embeddings

Composed, it is an artifact like any other: its manifest says in `source` what its steps are and which bytes they were,
so that a verdict on it is one on them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoport import artifact
from nemoport.artifact import Artifact, Signature, Tensor
from nemoport.errors import DamagedInput, UsageError
from nemoport.repository.unfinished import unfinished

KIND, FILE = "ensemble", "ensemble.json"


@dataclass(frozen=True)
class Member:
    model: str
    signature: Signature


def wired(name: str, members: Sequence[Member], gives: Collection[str] = ()) -> Signature:
    """What goes into the row and what comes out of it: what the last one makes, and what `gives` names of the others.
    UsageError with the first thing that does not fit."""
    made: dict[str, tuple[Tensor, Member]] = {}
    waiting: dict[str, Member] = {}
    inputs: dict[str, Tensor] = {}
    for member in members:
        taken = {tensor.name for tensor in member.signature.inputs}
        if made and not taken & made.keys():
            raise UsageError(
                f"ensemble {name}: {member.model} takes {_names(member.signature.inputs)}, and the steps before it "
                f"make {', '.join(made)}; let it follow a step that makes what it takes"
            )
        for tensor in member.signature.inputs:
            theirs, maker = made.get(tensor.name, (inputs.get(tensor.name, tensor), None))
            if not _fits(theirs, tensor):
                source = f"{maker.model} makes" if maker else "another step takes"
                raise UsageError(
                    f"ensemble {name}: {member.model} takes {_said(tensor)}, and {source} {_said(theirs)}; "
                    "convert both from one checkpoint"
                )
            if maker is None:
                inputs[tensor.name] = tensor
            waiting.pop(tensor.name, None)
        for tensor in member.signature.outputs:
            if tensor.name in made or tensor.name in inputs:
                raise UsageError(
                    f"ensemble {name}: {member.model} makes {tensor.name}, which is there before it; "
                    "name the steps in the order in which they run, each once"
                )
            made[tensor.name] = tensor, member
            waiting[tensor.name] = member
    left = {tensor: member for tensor, member in waiting.items() if member is not members[-1] and tensor not in gives}
    for unused, member in left.items():
        raise UsageError(
            f"ensemble {name}: {member.model} makes {unused}, which no later step takes; "
            "convert both from one checkpoint, or name the steps in the order in which they run"
        )
    early = (tensor for tensor, maker in made.values() if maker is not members[-1] and tensor.name in gives)
    return Signature(tuple(inputs.values()), (*members[-1].signature.outputs, *early))


def compose(destination: Path, name: str, members: Sequence[tuple[str, Path]], gives: Collection[str] = ()) -> None:
    """Write the artifact of members, each the name of a model and its evidence. The last one's source is the
    ensemble's, and so are its spec, its plan, its dtype and what it was built with. `gives`: what others than the last
    give to the client."""
    made = [artifact.read_manifest(evidence) for _, evidence in members]
    row = [Member(model, signed(model, each.signature)) for (model, _), each in zip(members, made, strict=True)]
    signature = wired(name, row, gives)
    steps = [
        {
            "model": member.model,
            "artifact": artifact.identity(evidence),
            "inputs": [tensor.name for tensor in member.signature.inputs],
            "outputs": [tensor.name for tensor in member.signature.outputs],
        }
        for member, (_, evidence) in zip(row, members, strict=True)
    ]
    (_, evidence), last = members[-1], made[-1]
    with unfinished(destination) as place:
        artifact.write_atomically(place / FILE, artifact.json_bytes({"steps": steps}))
        if (evidence / artifact.ORIGIN).is_file():
            artifact.write_atomically(place / artifact.ORIGIN, (evidence / artifact.ORIGIN).read_bytes())
        composed = Artifact(
            kind=KIND,
            spec=last.spec,
            plan=last.plan,
            dtype=last.dtype,
            files=(artifact.describe(place / FILE, place),),
            loads=("Triton",),
            source={"steps": steps},
            signature=signature,
            built_with=last.built_with,
        )
        artifact.write_manifest(place, composed)


def steps(made: Artifact) -> list[dict[str, Any]]:
    """Of an ensemble: model, artifact, inputs and outputs of each."""
    try:
        return [{key: row[key] for key in ("model", "artifact", "inputs", "outputs")} for row in made.source["steps"]]
    except (KeyError, TypeError) as error:
        raise DamagedInput(
            f"the manifest of the ensemble does not list its steps ({error!r}); build it again"
        ) from error


def scheduling(made: Artifact) -> dict[str, Any]:
    """The steps in protobuf's JSON; nothing of a model that is no ensemble."""
    if made.kind != KIND:
        return {}
    rows = [
        {
            "model_name": step["model"],
            "model_version": "-1",
            "input_map": {name: name for name in step["inputs"]},
            "output_map": {name: name for name in step["outputs"]},
        }
        for step in steps(made)
    ]
    return {"step": rows}


def signed(model: str, signature: Signature | None) -> Signature:
    if signature is None:
        raise UsageError(
            f"{model} does not say what goes in and out, so it cannot be a step; use --to onnx or tokenizer"
        )
    return signature


def _fits(made: Tensor, taken: Tensor) -> bool:
    """Same type, and axis by axis the same number or what varies."""
    same = made.dtype == taken.dtype and len(made.shape) == len(taken.shape)
    pairs = zip(made.shape, taken.shape, strict=True) if same else ()
    return same and all(isinstance(one, str) or isinstance(other, str) or one == other for one, other in pairs)


def _said(tensor: Tensor) -> str:
    return f"{tensor.name} as {tensor.dtype} [{', '.join(map(str, tensor.shape))}]"


def _names(tensors: Sequence[Tensor]) -> str:
    return ", ".join(tensor.name for tensor in tensors)
