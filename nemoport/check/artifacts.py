"""An artifact's directory: what its manifest promises, and what whoever loads it needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from nemoport import artifact
from nemoport.artifact import Artifact
from nemoport.check import look
from nemoport.check.finding import Finding, Problem
from nemoport.check.rules.files import TOKENIZERS
from nemoport.check.rules.row import Rule
from nemoport.check.subject import Trouble
from nemoport.compatibility import Runtime, contradiction, judge
from nemoport.errors import NemoportError
from nemoport.exporters import contract
from nemoport.exporters.serving import huggingface

S = TypeVar("S")


@dataclass(frozen=True)
class Held:
    """A directory with a manifest, or a quantized Hugging Face directory of whoever's."""

    directory: Path
    made: Artifact | None
    reason: str = ""
    """Why the manifest cannot be read."""
    runtime: Runtime | None = None
    """What is meant to load it; None is any."""


def manifest(held: Held) -> Iterator[Problem]:
    if held.reason:
        yield Problem(artifact.MANIFEST, held.reason, "a manifest that nemoport wrote", "convert again")


def digests(held: Held) -> Iterator[Problem]:
    if held.made is None:
        return
    try:
        artifact.verify(held.directory, held.made)
    except (NemoportError, OSError) as error:
        fix = "convert again, or copy all of it"
        yield Problem(artifact.MANIFEST, str(error), "the files that the manifest lists, as they were written", fix)


def tokenizer(held: Held) -> Iterator[Problem]:
    made = held.made
    if made is not None and huggingface(held.directory, made.kind) and not _names(made) & set(TOKENIZERS):
        yield Problem(
            artifact.MANIFEST,
            "a Hugging Face directory without a tokenizer",
            f"one of {', '.join(TOKENIZERS)}",
            "put the tokenizer's files into the source checkpoint and convert again",
        )


def quantized(held: Held) -> Iterator[Problem]:
    directory = huggingface(held.directory, held.made.kind if held.made is not None else "hf")
    if directory is not None and contract.is_quantized(directory):
        for each in contract.breaches(directory):
            yield Problem("config.json", each.found, each.needed, each.fix)


def stamp(held: Held) -> Iterator[Problem]:
    if held.made is not None and (reason := contradiction(held.made.loads, held.made.built_with)):
        yield Problem(artifact.MANIFEST, reason, "a stamp that agrees with itself", "compile it again")


def not_loaded(held: Held) -> Iterator[Problem]:
    if held.made is None or held.runtime is None:
        return
    verdict = judge(held.made.kind, held.made.loads, held.runtime)
    if verdict.refused:
        fix = verdict.first or "convert it for that runtime, or name another"
        yield Problem(artifact.MANIFEST, f"it {verdict}", "; ".join(held.made.loads), fix)


def _names(made: Artifact) -> set[str]:
    return {file.path.rpartition("/")[2] for file in made.files}


RULES = (
    Rule("NP901", "error", "A manifest is one that nemoport wrote.", manifest),
    Rule("NP902", "error", "Every file that the manifest lists is there, with its digest.", digests),
    Rule("NP903", "warning", "A Hugging Face directory has its tokenizer.", tokenizer),
    Rule("NP904", "error", "A quantized Hugging Face directory is what its loaders expect.", quantized),
    Rule("NP905", "error", "What a manifest says of who loads it agrees with what built it.", stamp),
    Rule("NP906", "error", "An artifact is one that the runtime that is meant loads.", not_loaded),
)


def findings(directory: Path, runtime: Runtime | None = None) -> Iterator[Finding]:
    return told(RULES, replace(_held(directory), runtime=runtime), directory)


def told(rules: Iterable[Rule[S]], held: S, directory: Path) -> Iterator[Finding]:
    """What rules for a directory say of it."""
    for rule in rules:
        for problem in rule.look(held):
            yield Finding(
                code=rule.code,
                severity=rule.severity,
                model=directory.name,
                file=str(problem.at),
                line=1,
                column=1,
                found=problem.found,
                needed=problem.needed,
                fix=problem.fix,
            )


def is_one(directory: Path) -> bool:
    """Something that the rules here are about."""
    return (directory / artifact.MANIFEST).is_file() or contract.is_quantized(directory)


def _held(directory: Path) -> Held:
    if not (directory / artifact.MANIFEST).is_file():
        return Held(directory, None)
    made = look.manifest(directory)
    return Held(directory, None, made.reason) if isinstance(made, Trouble) else Held(directory, made)
