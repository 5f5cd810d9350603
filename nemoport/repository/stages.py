"""An artifact in pipeline stages, in a repository: a model for each stage, and the ensemble that chains them.

    input_ids -> [llama-stage0] -> hidden_states.16 -> [llama-stage1] -> logits
    past_key_values.0.key -> [llama-stage0] -> present.0.key, and so on with every cache

Each stage is split off as an artifact of its own, whose manifest says in `source` of which whole it is which stage.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from nemoport import artifact
from nemoport.artifact import Artifact, File, stage_place
from nemoport.compatibility import Runtime
from nemoport.repository import ensemble, gate, publish, stamps
from nemoport.repository.publish import Published

STAGE = "stage"
"""The key of a stage's manifest, in `source`."""


@dataclass(frozen=True)
class Stage:
    """Of which whole, and which of it."""

    artifact: str
    number: int
    of: int


def stage_of(made: Artifact) -> Stage | None:
    """None of an artifact that is whole."""
    said = made.source.get(STAGE)
    return Stage(**said) if said else None


def model_name(name: str, number: int) -> str:
    """Of a stage of the model that clients ask by `name`."""
    return f"{name}-stage{number}"


def publish_all(
    directory: Path,
    repository: Path,
    name: str,
    *,
    max_batch_size: int | None = None,
    runtime: Runtime | None = None,
) -> tuple[Published, ...]:
    """Stage an artifact as the next version of a model; one in stages as that of a model for each, and of their
    ensemble, which is the last. They go live in this order."""
    made = artifact.read_manifest(directory)

    def published(place: Path, model: str) -> Published:
        return publish.publish(place, repository, model, max_batch_size=max_batch_size, runtime=runtime)

    if not made.stages:
        return (published(directory, name),)
    publish.check_paths(directory, made)
    stamps.for_first(made, runtime, f"{directory} cannot be published as {name}")
    artifact.verify(directory, made)
    with TemporaryDirectory(prefix="nemoport-") as scratch:
        parts = split(directory, made, Path(scratch))
        members = [(model_name(name, number), part) for number, part in enumerate(parts)]
        whole = chain(Path(scratch) / "whole", name, members)
        _carry_verdict(directory, whole)
        return tuple(published(place, model) for model, place in (*members, (name, whole)))


def split(directory: Path, made: Artifact, scratch: Path) -> list[Path]:
    """Each stage as an artifact: manifest and ledger of its own, its files as links."""
    parts = []
    for number, signature in enumerate(made.stages):
        place, part = stage_place(number), scratch / f"stage{number}"
        part.mkdir()
        own = [file for file in made.files if file.path.startswith(place)]
        for file in own:
            (part / file.path.removeprefix(place)).symlink_to((directory / file.path).resolve())
        files = [File(file.path.removeprefix(place), file.size, file.blake3) for file in own]
        if (directory / artifact.LEDGER).is_file():  # of what was converted, and not compiled
            (part / artifact.LEDGER).write_bytes(_ledger(directory / artifact.LEDGER, place))
            files.append(artifact.describe(part / artifact.LEDGER, part))
        if (directory / artifact.ORIGIN).is_file():
            (part / artifact.ORIGIN).write_bytes((directory / artifact.ORIGIN).read_bytes())
        said = {"artifact": artifact.identity(directory), "number": number, "of": len(made.stages)}
        stage = replace(
            made,
            files=tuple(files),
            signature=signature,
            stages=(),
            source={**made.source, STAGE: said},
        )
        artifact.write_manifest(part, stage)
        _carry_verdict(directory, part)
        parts.append(part)
    return parts


def chain(destination: Path, name: str, members: Sequence[tuple[str, Path]]) -> Path:
    """The ensemble's artifact, of stages that are models of these names. It gives what no stage takes."""
    row = [artifact.read_manifest(evidence).signature for _, evidence in members]
    taken = {tensor.name for signature in row if signature for tensor in signature.inputs}
    made = [tensor.name for signature in row if signature for tensor in signature.outputs]
    ensemble.compose(destination, name, members, [each for each in made if each not in taken])
    return destination


def _ledger(whole: Path, place: str) -> bytes:
    """The rows of a stage's tensors, and of the source's that they are made of."""
    rows = [json.loads(line) for line in whole.read_bytes().splitlines()]
    own = [row for row in rows if row.get("file", "").startswith(place)]
    used = {name for row in own for name in row.get("sources", ())}
    kept = [row for row in rows if row.get("source") in used]
    moved = [{**row, "file": row["file"].removeprefix(place)} for row in own]
    return b"".join(json.dumps(row).encode() + b"\n" for row in (*kept, *moved))


def _carry_verdict(directory: Path, part: Path) -> None:
    """What was found of the whole was found of these very bytes, run in their row."""
    verdict = gate.verdict_of(directory)
    if verdict and verdict.get("artifact") == artifact.identity(directory):
        own = {**verdict, "artifact": artifact.identity(part), "whole": verdict["artifact"]}
        artifact.write_atomically(part / artifact.REPORT, artifact.json_bytes(own))
