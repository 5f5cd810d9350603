"""Pipeline stages, judged in their row: an artifact of them, one of them in a repository, or their ensemble there.

A stage by itself answers hidden states, to which no source has an answer. So its verdict is on the row that it belongs
to, made of exactly the versions that were split from the same artifact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from nemoport import artifact
from nemoport.artifact import MANIFEST, Artifact
from nemoport.errors import DamagedInput, UsageError
from nemoport.exporters.targets.tokenizer import TEXT
from nemoport.repository import config, ensemble, stages, versions
from nemoport.repository.versions import Located
from nemoport.runner.client import Client
from nemoport.runner.model import LoadOptions
from nemoport.runner.serve import serving
from nemoport.runner.server import Server
from nemoport.validation import executions, sights
from nemoport.validation.executions import ANY, Execution, graph_execution
from nemoport.validation.subject import Subject
from nemoport.validation.weights import Share
from nemoport.validation.worded import members

_WHOLE = "whole"


@dataclass(frozen=True)
class _Placed:
    """A model's version under its config."""

    name: str
    number: int
    files: Path
    evidence: Path
    config: str


def is_chain(made: Artifact) -> bool:
    """Also of an ensemble, unless it begins with text."""
    if made.kind == ensemble.KIND:
        return made.signature is not None and TEXT not in {tensor.name for tensor in made.signature.inputs}
    return bool(made.stages) or stages.stage_of(made) is not None


@contextmanager
def chained(subject: Subject, options: LoadOptions) -> Iterator[Execution]:
    """Every stage on the runner, and real requests over HTTP to their ensemble."""
    with TemporaryDirectory(prefix="nemoport-") as directory:
        scratch, root = Path(directory), Path(directory) / "models"
        row = _row(subject, scratch)
        whole = _ensemble(subject, row, scratch)
        for each in (*row, whole):
            (root / each.name).mkdir(parents=True)
            (root / each.name / str(each.number)).symlink_to(each.files.resolve(), target_is_directory=True)
            (root / each.name / config.FILE).write_text(each.config)
        server = Server([root], options, explicit=True)
        try:
            server.load(whole.name)
            with serving(server, http_max_input_size=ANY) as address, Client(address) as client:
                made, loaded = artifact.read_manifest(whole.evidence), server.find(whole.name)
                assert made.signature, "an ensemble has a signature"
                gpus = {server.find(each.name).placement.gpu for each in row}
                place = "the CPU" if gpus == {None} else "GPUs"
                files = [_file(each, server) for each in row]
                held = tuple(share for pair in zip(row, files, strict=True) for share in _held(*pair))
                sight = sights.of_graphs(files, held)
                answers = graph_execution(made, made.signature, client, loaded, held, sight, place)
                yield replace(answers, notes=(*answers.notes, *_notes(server, row)))
        finally:
            server.close()


def _file(stage: _Placed, server: Server) -> Path:
    name: str = server.find(stage.name).config.default_model_filename
    return stage.files / name


def _held(stage: _Placed, file: Path) -> Iterator[Share]:
    for share in executions.held(artifact.read_manifest(stage.evidence), file):
        yield replace(share, place=stage.name)


def _notes(server: Server, row: list[_Placed]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for each in row for note in server.find(each.name).notes))


def _row(subject: Subject, scratch: Path) -> list[_Placed]:
    made = subject.artifact
    if made.stages:
        return [
            _Placed(name := f"stage{number}", 1, part, part, _generated(artifact.read_manifest(part), name))
            for number, part in enumerate(stages.split(subject.files, made, scratch))
        ]
    if made.kind == ensemble.KIND:
        live = members(subject)
        if not live.passed:
            raise DamagedInput(f"{subject.name} is made of others: {live.found}; promote those, stage by stage")
        assert subject.repository, "its members were looked for there"
        names = [step["model"] for step in ensemble.steps(made)]
        served = {name: versions.state(subject.repository, name).served for name in names}
        return [_version(versions.locate(subject.repository, name, str(served[name]))) for name in names]
    return _fellows(subject)


def _fellows(subject: Subject) -> list[_Placed]:
    """The stages of one artifact, whatever they are called and whether or not they are live."""
    said = stages.stage_of(subject.artifact)
    assert said, "it is a stage"
    if subject.repository is None:
        raise UsageError(f"{subject.name} is stage {said.number} of {said.of}; validate the artifact that it is from")
    found: dict[int, _Placed] = {}
    for name in versions.models(subject.repository):
        for each in _published(subject.repository, name):
            theirs = stages.stage_of(artifact.read_manifest(each.evidence))
            if theirs and theirs.artifact == said.artifact:
                found[theirs.number] = _version(each)
    if missing := sorted(set(range(said.of)) - found.keys()):
        raise DamagedInput(
            f"{subject.name} is stage {said.number} of {said.of}, and stage {missing[0]} is not in the repository; "
            "publish their artifact again"
        )
    return [found[number] for number in range(said.of)]


def _published(repository: Path, name: str) -> Iterator[Located]:
    """The versions of a model that nemoport put there; of what others put beside them there is no evidence."""
    ours = {manifest.parent.name for manifest in versions.evidence_of(repository, name).glob(f"*/{MANIFEST}")}
    if ours:
        known = versions.state(repository, name)
        for version in known.every:
            if str(version) in ours:
                yield versions.locate(repository, name, known.directory(version))


def _ensemble(subject: Subject, row: list[_Placed], scratch: Path) -> _Placed:
    if subject.artifact.kind == ensemble.KIND:
        assert subject.model, "an ensemble is judged in a repository"
        number, text = versions.number_of(subject.files.name), (subject.model / config.FILE).read_text()
        own = config.with_versions(text, (number,), str(subject.model / config.FILE))
        return _Placed(subject.model.name, number, subject.files, subject.evidence, own)
    place = stages.chain(scratch / _WHOLE, _WHOLE, [(each.name, each.evidence) for each in row])
    return _Placed(_WHOLE, 1, place, place, _generated(artifact.read_manifest(place), _WHOLE))


def _version(found: Located) -> _Placed:
    path = found.model / config.FILE
    text = config.with_versions(path.read_text(), (found.version,), str(path))
    return _Placed(found.model.name, found.version, found.model / found.directory, found.evidence, text)


def _generated(made: Artifact, name: str) -> str:
    return config.render(config.from_artifact(made, name, 1))
