"""Megatron-LM's legacy format: `iter_NNNNNNN/mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, a file for each rank.

The arguments of the run lie in every file. The model is under `model`, or under `model0`, `model1`... when the pipeline
was virtual. Source: megatron/training/checkpointing.py, get_checkpoint_name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import megatron, megatron_ranks, tokenizer, torch_dist
from nemoport.exporters.formats.megatron_ranks import File, Place, Rank
from nemoport.exporters.formats.tree import Directory, Tree
from nemoport.exporters.formats.unpickle import StoredTensor

WRAPS: tuple[str, ...] = ()
LOOKS_FOR = "mp_rank_*/model_optim_rng.pt"
_FILES = ("model_optim_rng.pt", "model_rng.pt")
NEEDED = tuple(f"mp_rank_*/{name}" for name in _FILES)
_RANK = re.compile(r"mp_rank_(\d{2,4})(?:_(\d{3,5}))?(?:_(\d{3,5}))?")
_SKIPPED = {
    "optimizer": "optimizer state",
    "opt_param_scheduler": "learning rate schedule",
    "lr_scheduler": "learning rate schedule",
    "rng_state": "random number generators",
    "rerun_state_machine": "rerun state",
}
"""What training leaves beside the model, and the rule that skips it."""


def recognises(path: Path) -> bool:
    return _directory(path) is not None


def files(path: Path) -> Tree:
    return Directory(_directory(path) or path)


def read(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    directory = _directory(path)
    assert directory is not None
    tree = Directory(directory)
    files = {place: megatron_ranks.opened(tree, name) for place, name in _names(directory).items()}
    first = next(iter(files.values()))
    arguments = _section(first, "args")
    words = (megatron.words_of_arguments(arguments) if arguments else {}) | dict(config or {})
    skipped: dict[str, str] = {}
    ranks = {place: Rank(file.name, _chunks(file, skipped)) for place, file in _placed(files, words).items()}
    contents = megatron_ranks.gather(ranks)
    tensors, extra = megatron.weights(contents.tensors, contents.objects)
    return Checkpoint(
        path=path,
        format="megatron_legacy",
        writer="Megatron-LM",
        naming="megatron",
        config=words,
        tensors=tensors,
        skipped=extra | skipped,
        tokenizer=tokenizer.find(Directory(directory / "tokenizer"), Directory(path / "tokenizer")),
        trained=megatron_ranks.trained(ranks),
    )


def _directory(path: Path) -> Path | None:
    """The iteration: the directory given, or the one that the run's tracker names."""
    try:
        return next((each for each in torch_dist.candidates(path) if _names(each)), None)
    except OSError:
        return None


def _names(directory: Path) -> dict[tuple[str, ...], str]:
    """The file of each rank, by the numbers in its directory's name."""
    found = {}
    for entry in sorted(directory.glob("mp_rank_*")):
        file = next((name for name in _FILES if (entry / name).is_file()), None)
        if file and (match := _RANK.fullmatch(entry.name)):
            found[tuple(filter(None, match.groups()))] = f"{entry.name}/{file}"
    return found


def _placed(files: Mapping[tuple[str, ...], File], words: Mapping[str, Any]) -> dict[Place, File]:
    """The ranks by tp, pp and ep. A lone second number is the stage, or the expert rank where no stages are."""
    sizes = megatron.trained(words)
    experts = sizes.get("pp", 1) == 1 and sizes.get("ep", 1) > 1
    placed: dict[Place, File] = {}
    for numbers, file in files.items():
        tp, second, third = (*map(int, numbers), *[0] * (3 - len(numbers)))
        place = (tp, 0, second) if experts and len(numbers) == 2 else (tp, second, third)
        if place in placed:
            raise DamagedInput(
                f"{file.name} and {placed[place].name} are of one rank; remove the one that is not of it"
            )
        placed[place] = file
    return placed


def _chunks(file: File, skipped: dict[str, str]) -> tuple[megatron_ranks.Chunk, ...]:
    """The model of a rank, one chunk for each virtual stage. What is skipped is added to `skipped`."""
    sections = file.saved if isinstance(file.saved, Mapping) else {}
    states = [sections["model"]] if "model" in sections else []
    while "model" not in sections and (name := f"model{len(states)}") in sections:
        states.append(sections[name])
    if not states:
        raise DamagedInput(f"{file.name} holds no model; copy the checkpoint again")
    version = sections.get("checkpoint_version", 0)
    if any(megatron_ranks.old_names(state) for state in states) and not (
        isinstance(version, int | float) and version >= 2
    ):
        raise UnsupportedInput(
            f"{file.name} has checkpoint_version {version!r}, whose query_key_value lies otherwise; "
            "load and save it with a Megatron-LM from 2021 on"
        )
    for name, section in sections.items():
        if rule := _SKIPPED.get(name):
            skipped[f"{file.name}:{name}"] = rule
        elif not re.fullmatch(r"model\d*", str(name)) and _holds_tensors(section):
            raise UnsupportedInput(f"{file.name} holds tensors under {str(name)[:50]!r}, which no rule explains")
    return tuple(file.chunk(state) for state in states)


def _holds_tensors(value: Any) -> bool:
    left, seen = [value], set[int]()
    while left:
        each = left.pop()
        if isinstance(each, StoredTensor):
            return True
        if isinstance(each, Mapping | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            left.extend(each.values() if isinstance(each, Mapping) else each)
    return False


def _section(file: File, name: str) -> Mapping[str, Any] | None:
    found = file.saved.get(name) if isinstance(file.saved, Mapping) else None
    return found if isinstance(found, Mapping) else None
