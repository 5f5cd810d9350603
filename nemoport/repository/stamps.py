"""What an artifact's manifest says of who loads it, held against who shall: the release of Triton that a model is
declared for, when a version is published or promoted, and the machine, when it is served."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from nemoport import artifact
from nemoport.artifact import Artifact
from nemoport.compatibility import TRITON, Runtime, Version, contradiction, judge, least_triton, misfit, triton
from nemoport.errors import MachineError, PolicyError, UsageError
from nemoport.repository import config, values
from nemoport.repository.versions import NUMBER, evidence_of


def declared(model: Path) -> Runtime | None:
    """The release that a model's values name; None for a model whose config nemoport did not generate."""
    path = model / values.FILE
    return triton(values.release(path.read_text(), str(path))) if path.is_file() else None


def for_first(made: Artifact, runtime: Runtime | None, subject: str) -> Runtime:
    """What a new model is declared for: what was asked for, else the oldest release that loads its first version."""
    if runtime is None:
        oldest = least_triton(made.kind, made.loads, values.RELEASE)
        runtime = triton(oldest or TRITON[0].release)
    release_of(runtime)
    check(made, runtime, subject)
    return runtime


def release_of(runtime: Runtime) -> str:
    if not runtime.release:
        raise UsageError(f"{runtime} is no release of Triton, whose repository this is; write one, such as 26.07")
    return runtime.release


def check(made: Artifact, runtime: Runtime, subject: str) -> None:
    """Refuse a stamp that contradicts itself, and an artifact that the runtime does not load."""
    if reason := contradiction(made.loads, made.built_with):
        raise PolicyError(f"{subject}: {reason}; convert or compile it again")
    verdict = judge(made.kind, made.loads, runtime)
    if verdict.refused:
        oldest = least_triton(made.kind, made.loads, values.RELEASE)
        named = f"the oldest release that loads it is {oldest}" if oldest else "no release that is known loads it"
        way_out = verdict.first or f"{named}: name a later one with --triton-release, or convert it for this one"
        raise PolicyError(f"{subject}: it {verdict}; {way_out}")


def admit(model: Path, engines: Mapping[str, Version | None], sms: Sequence[int]) -> None:
    """Refuse a model's directory, as a server is about to load it, if one of its versions is for another machine."""
    evidence = evidence_of(model.parent, model.name)
    path = model / config.FILE
    if not evidence.is_dir() or not path.is_file():
        return
    listed = config.parse(path.read_text(), str(path)).versions
    present = [int(each.name) for each in model.iterdir() if NUMBER.fullmatch(each.name)]
    for number in listed or sorted(present):
        if (evidence / str(number) / artifact.MANIFEST).is_file():
            made = artifact.read_manifest(evidence / str(number))
            reason = contradiction(made.loads, made.built_with) or misfit(
                made.kind, made.loads, made.built_with, engines, sms
            )
            if reason:
                raise MachineError(
                    f"version {number} of {model.name} is not for this machine: {reason}; serve it where that is, or "
                    "convert or compile it for here"
                )
