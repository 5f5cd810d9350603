"""A directory that NIM for LLMs shall serve: whether it has what NIM reads, all of it readable and in one place.

It is one that `layout nim` wrote, or anybody's that looks like one. Which files, and why, says
`repository/layouts/nim.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from nemoport import artifact
from nemoport.artifact import Artifact
from nemoport.check import look
from nemoport.check.artifacts import told
from nemoport.check.finding import Finding, Problem
from nemoport.check.rules.row import Rule
from nemoport.check.subject import Trouble
from nemoport.compatibility import Runtime
from nemoport.errors import NemoportError
from nemoport.repository.layouts.nim import (
    HUGGING_FACE,
    QUANTIZATION,
    RECORD,
    SHAPES,
    TEXT,
    Shape,
    beside,
    ranks_of,
)

CONFIG, GENERATION = HUGGING_FACE
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
LISTED = (GENERATION, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What the lists of NIM's documents have besides, of all directories."""
PATTERN = {"trtllm": "rank{}.safetensors", "trtllm_engine": "rank{}.engine"}
READABLE, ENTERED = 0o444, 0o555
MAX_FILES = 10_000


@dataclass(frozen=True)
class Held:
    directory: Path
    line: str | None
    """1.x or 2.x, where that is known."""

    @cached_property
    def shape(self) -> Shape:
        return next((shape for shape in SHAPES.values() if shape.below and self.has(shape.below)), SHAPES["hf"])

    @cached_property
    def beside(self) -> Path:
        return beside(self.directory)

    @cached_property
    def record(self) -> dict[str, Any] | None:
        found = _json(self.beside / RECORD)
        return found if isinstance(found, dict) else None

    def has(self, name: str) -> bool:
        return (self.directory / name).exists()

    def json(self, name: str) -> dict[str, Any]:
        found = _json(self.directory / name)
        return found if isinstance(found, dict) else {}

    @cached_property
    def paths(self) -> tuple[Path, ...]:
        """Everything in it, links not followed."""
        found = []
        for place, directories, files in os.walk(self.directory):
            found += [Path(place) / name for name in (*directories, *files)]
            if len(found) > MAX_FILES:
                break
        return tuple(sorted(found))


def is_one(directory: Path) -> bool:
    shaped = (shape.below and (directory / shape.below).is_dir() for shape in SHAPES.values())
    return (beside(directory) / RECORD).is_file() or any(shaped)


def is_meant(runtime: Runtime | None) -> bool:
    return runtime is not None and all(place.place == "nim" for place in runtime.places)


def looks_alike(directory: Path) -> bool:
    """A Hugging Face directory of whoever's."""
    return (directory / CONFIG).is_file() and not (directory / artifact.MANIFEST).exists()


def findings(directory: Path, runtime: Runtime | None) -> Iterator[Finding]:
    """`runtime` may name a NIM, whose line is asked for then."""
    named = [place.engines["nim"] for place in runtime.places if place.place == "nim"] if runtime else []
    lines = {f"{version.numbers[0]}.x" for version in named if version}
    return told(RULES, Held(directory, lines.pop() if len(lines) == 1 else None), directory)


def described(held: Held) -> Iterator[Problem]:
    if not held.has(CONFIG):
        yield Problem(
            CONFIG,
            "no config.json at the root",
            "Hugging Face's, which NIM reads for every kind of model",
            "lay it out again, or bring the model's config.json",
        )
    elif not held.json(CONFIG).get("architectures"):
        yield Problem(
            CONFIG,
            "a config.json that names no architectures",
            "Hugging Face's config.json; TensorRT-LLM's own belongs below",
            "bring the model's config.json",
        )


def weights(held: Held) -> Iterator[Problem]:
    names = list(_engines(held)) if held.shape.below else list(_shards(held))
    missing = [name for name in names if not held.has(name)]
    if missing:
        yield Problem(
            missing[0],
            f"{missing[0]} is missing ({len(missing)} of {len(names)} files)",
            "every file of the model",
            "lay it out again",
        )


def quantization(held: Held) -> Iterator[Problem]:
    said = held.json(CONFIG).get("quantization_config")
    method = said.get("quant_method") if isinstance(said, dict) else None
    if not held.shape.below and method == "modelopt" and not held.has(QUANTIZATION):
        yield Problem(
            QUANTIZATION,
            f"weights quantized by ModelOpt without {QUANTIZATION}",
            f"{QUANTIZATION} beside config.json",
            "convert again",
        )


def listed(held: Held) -> Iterator[Problem]:
    for name in LISTED:
        if not held.has(name):
            fix = "put it into the source checkpoint and convert again"
            yield Problem(name, f"no {name}", "a file that NIM's own list of such a directory has", fix)


def tokenizer(held: Held) -> Iterator[Problem]:
    names = [path.name for path in held.paths if path.parent == held.directory]
    if not any(fnmatchcase(name, pattern) for name in names for pattern in TEXT):
        yield Problem("tokenizer.json", "no tokenizer", f"one of {', '.join(TEXT)}", "bring the model's")


def modes(held: Held) -> Iterator[Problem]:
    for path in (held.directory, *held.paths):
        if path.is_symlink():
            continue
        needed = ENTERED if path.is_dir() else READABLE
        mode = path.stat().st_mode & 0o777
        if mode & needed != needed:
            name = path.relative_to(held.directory).as_posix()
            yield Problem(
                name, f"{name} has mode {mode:04o}", f"{needed:04o}: NIM runs as another user", f"chmod a+rX {path}"
            )


def links(held: Held) -> Iterator[Problem]:
    root = held.directory.resolve()
    for path in held.paths:
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            name = path.relative_to(held.directory).as_posix()
            fix = "copy the file itself; a cache of the Hugging Face hub is made of such links"
            yield Problem(name, f"{name} leads out of the directory", "files that are mounted with it", fix)


def line(held: Held) -> Iterator[Problem]:
    said = held.line or (held.record or {}).get("nim")
    if isinstance(said, str) and said not in held.shape.lines:
        yield Problem(
            held.shape.below,
            f"{held.shape.below} in a directory for NIM {said}",
            f"what NIM {said} serves: it has no TensorRT-LLM engines",
            "convert with --to hf and lay that out",
        )


def as_laid_out(held: Held) -> Iterator[Problem]:
    """Against the record, and the manifest of the artifact that it was made from."""
    if held.record is None:
        return
    made = look.manifest(held.beside)
    try:
        for each in held.record["added"]:
            path = held.directory / each["path"]
            if not path.is_file() or artifact.digest(path) != each["blake3"]:
                yield Problem(each["path"], f"{each['path']} was changed", "what was laid out", "lay it out again")
        moved = {file: place for place, file in held.record["moved"].items()}
        if isinstance(made, Trouble):
            yield Problem(RECORD, made.reason, "the manifest of what was laid out", "lay it out again")
        else:
            yield from _moved(held, made, moved)
    except (KeyError, TypeError, AttributeError) as error:
        yield Problem(RECORD, f"{held.beside / RECORD} is not what was written ({error!r})", "it", "lay it out again")


def _moved(held: Held, made: Artifact, moved: dict[str, str]) -> Iterator[Problem]:
    """File by place below the root: the manifest vouches for the ledger, both for the rest."""
    for below in dict.fromkeys(place.removesuffix(file) for file, place in moved.items()):
        own = tuple(file for file in made.files if moved.get(file.path) == f"{below}{file.path}")
        try:
            artifact.verify(held.directory / below, replace(made, files=own), held.beside / artifact.LEDGER)
        except (NemoportError, OSError) as error:
            yield Problem(below or ".", str(error).partition(";")[0], "what was laid out", "lay it out again")


def _shards(held: Held) -> Iterator[str]:
    if not held.has(INDEX):
        yield WEIGHTS
        return
    mapped = held.json(INDEX).get("weight_map")
    yield from sorted(set(map(str, mapped.values())) if isinstance(mapped, dict) else {WEIGHTS})


def _engines(held: Held) -> Iterator[str]:
    below = held.shape.below
    yield f"{below}/{CONFIG}"
    for rank in range(ranks_of(held.json(f"{below}/{CONFIG}")) or 1):
        yield f"{below}/{PATTERN[held.shape.kind].format(rank)}"


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= look.MAX_MANIFEST else None
    except (OSError, ValueError, RecursionError):
        return None


RULES = (
    Rule("NP911", "error", "A directory for NIM has Hugging Face's config.json at its root.", described),
    Rule("NP912", "error", "A directory for NIM has all weights, or all ranks of its engines.", weights),
    Rule("NP913", "error", f"What ModelOpt quantized has {QUANTIZATION} for NIM.", quantization),
    Rule("NP914", "warning", "A directory for NIM has the other files of NIM's own list.", listed),
    Rule("NP919", "error", "A directory for NIM has a tokenizer.", tokenizer),
    Rule("NP915", "error", "Everybody may read a directory for NIM.", modes),
    Rule("NP916", "error", "No link leads out of a directory for NIM.", links),
    Rule("NP917", "error", "A directory for NIM is of a shape that its line serves.", line),
    Rule("NP918", "error", "A directory for NIM holds the bytes that were laid out.", as_laid_out),
)
