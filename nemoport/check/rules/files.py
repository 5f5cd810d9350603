"""The files that a config means: the model's own, weights beside it, labels, warm-up data, tokenizers."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator

from nemoport.check.finding import At, Problem
from nemoport.check.rules.row import Rule, some
from nemoport.check.subject import Subject, Version
from nemoport.runner.model_config import KINDS

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_SPEAKS = ("vllm", "tensorrtllm", "python")
"""Backends that turn text into tokens by themselves, from a Hugging Face directory."""


def no_file(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    known = config is not None and config.backend in {kind.backend for kind in KINDS}
    if config is None or not known or not config.default_model_filename or config.cc_model_filenames:
        return
    for version in served(subject):
        name = posixpath.normpath(config.default_model_filename)
        if name.partition("/")[0] not in version.files:
            ending = posixpath.splitext(name)[1]
            alike = [file for file in sorted(version.files) if posixpath.splitext(file)[1] == ending]
            fix = f'rename {alike[0]}, or write default_model_filename: "{alike[0]}"' if alike else "bring the file"
            yield Problem(
                version.path, f"version {version.number} has no {name}", f"the file that {config.backend} loads", fix
            )


def external_data(subject: Subject) -> Iterator[Problem]:
    for version in served(subject):
        for need in (need for graph in version.graphs for need in graph.external):
            path = f"{version.path}/{need.location}"
            if posixpath.isabs(need.location) or ".." in need.location.split("/"):
                yield Problem(
                    version.path,
                    f"the graph keeps weights in {need.location}, outside of its directory",
                    "a file in the version's directory",
                    "save the model again with its data beside it",
                )
            elif (file := version.external.get(need.location)) is None or file.size is None:
                yield Problem(
                    path, f"the graph keeps weights in {need.location}, which is not there", "that file", "bring it"
                )
            elif file.size < need.end:
                yield Problem(
                    path,
                    f"{need.location} has {file.size} bytes",
                    f"{need.end}, as the graph says",
                    "copy it again, whole",
                )


def labels(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    for number, tensor in enumerate(config.output if config is not None else ()):
        if tensor.label_filename:
            yield from _beside(subject, ("output", number, "label_filename"), tensor.label_filename)


def warm_up_data(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    for number, sample in enumerate(config.model_warmup if config is not None else ()):
        for name, tensor in sorted(sample.inputs.items()):
            if tensor.input_data_file and sample.batch_size:
                at = ("model_warmup", number, "inputs", name, "value", "input_data_file")
                yield from _beside(subject, at, f"warmup/{tensor.input_data_file}")


def tokenizer(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if config is None or config.backend not in _SPEAKS:
        return
    for version in served(subject):
        for folder, files in sorted(version.folders.items()):
            weights = any(file.endswith(".safetensors") and not file.startswith("rank") for file in files)
            if weights and "config.json" in files and not set(TOKENIZERS) & set(files):
                yield Problem(
                    folder,
                    "a Hugging Face model without a tokenizer",
                    f"one of {some(TOKENIZERS)}",
                    "copy the tokenizer's files beside the weights",
                )


def ranks(subject: Subject) -> Iterator[Problem]:
    for version in served(subject):
        missing = [rank for rank in range(version.rank_files or 0) if not _has_rank(version, rank)]
        if missing:
            yield Problem(
                version.path,
                f"rank{missing[0]} is not there, nor {len(missing) - 1} others"
                if missing[1:]
                else f"rank{missing[0]} is not there",
                f"a file for each of {version.rank_files} ranks",
                "convert again, or copy all of it",
            )


def served(subject: Subject) -> Iterator[Version]:
    for number in subject.model.served:
        yield subject.model.versions[number]


def _has_rank(version: Version, rank: int) -> bool:
    return any(f"rank{rank}.{ending}" in version.files for ending in ("safetensors", "engine"))


def _beside(subject: Subject, at: At, path: str) -> Iterator[Problem]:
    if posixpath.normpath(path).startswith(("../", "/")):
        yield Problem(at, f"{path} is outside of the model's directory", "a file inside it", "move the file there")
    elif posixpath.normpath(path) not in subject.model.files:
        yield Problem(at, f"{path} is not there", "a file in the model's directory", "bring it, or take the line away")


RULES = (
    Rule("NP211", "error", "Every version that is served has the file that its backend loads.", no_file),
    Rule("NP212", "error", "External data of a graph is beside it, and whole.", external_data),
    Rule("NP213", "error", "Label files are there.", labels),
    Rule("NP214", "error", "Files of warm-up data are there.", warm_up_data),
    Rule("NP215", "warning", "A model that takes text has its tokenizer beside its weights.", tokenizer),
    Rule("NP216", "error", "A sharded model has the file of every rank.", ranks),
)
