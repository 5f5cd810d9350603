"""Megatron's LoRA in torch_dist, by Megatron-Bridge and NeMo 2.0: `<linear>.adapter.linear_{in,out}.weight`, and with
canonical LoRA `<linear>.adapter.adapter_{q,k,v,gate,up}.linear_{in,out}.weight`.

Rank and alpha stand apart: in `run_config.yaml` under `peft` (Megatron-Bridge), in `adapter_metadata.json` or the
`model_transform` of `context/` (NeMo 2.0), or in `lora.json`, by hand: `{"dim": 16, "alpha": 32}`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, NemoportError, UnsupportedInput
from nemoport.exporters.formats import distributed, fiddle, megatron
from nemoport.exporters.formats.structured import mapping
from nemoport.exporters.formats.tree import Directory
from nemoport.exporters.lora import Adapter, Factor, Scaling, finite, is_adapter, paired

_FACTOR = re.compile(r"(?P<linear>.+?)\.adapter\.(?:adapter_(?P<part>\w+)\.)?linear_(?P<side>in|out)\.weight")
_SIDES = {"in": "a", "out": "b"}
_CLASSES = ("LoRA", "CanonicalLoRA")
_ALPHA, _RANK = "alpha", "dim"


def recognises(path: Path) -> bool:
    try:
        directory = _locate(path)
        return directory is not None and _config(path, directory) is not None
    except (NemoportError, OSError):
        return False


def read(path: Path) -> Adapter:
    directory = _locate(path)
    if directory is None or (found := _config(path, directory)) is None:
        raise UnsupportedInput(
            f"{path} does not say the alpha of an adapter: not in adapter_config.json, in run_config.yaml under "
            "`peft`, in adapter_metadata.json, in the model_transform of context/, nor in lora.json: you may write "
            '{"dim": 16, "alpha": 32}'
        )
    said, writer, config = found
    scaling = _scaling(said, config)
    contents = distributed.read(Directory(directory))
    tensors, skipped = megatron.weights(contents.tensors, contents.objects)
    own = {name: tensor for name, tensor in tensors.items() if is_adapter(name)}
    factors = []
    for name in own:
        if (match := _FACTOR.fullmatch(name)) is None:
            kind = "DoRA, which scales as well as adds" if "magnitude" in name else "no LoRA that nemoport knows"
            raise UnsupportedInput(f"{name} in {path} is of {kind}; merge it where it was trained")
        linear = match["linear"].removesuffix(".to_wrap")
        factors.append(Factor(name, linear, match["part"] or "", _SIDES[match["side"]]))
    return Adapter(
        path=path,
        format="megatron",
        writer=writer,
        naming="megatron",
        scaling=scaling,
        tensors=own,
        pairs=paired(factors, own, scaling, said),
        skipped=skipped,
        others=tuple(name for name in tensors if not is_adapter(name)),
    )


def _locate(path: Path) -> Path | None:
    """The directory of the weights; of a run that names no latest iteration, its only one."""
    if (directory := distributed.locate(path)) is not None or not path.is_dir():
        return directory
    iterations = [entry for entry in sorted(path.glob("iter_*")) if distributed.kind(entry)]
    return iterations[0] if len(iterations) == 1 else None


def _config(path: Path, directory: Path) -> tuple[str, str, Mapping[str, Any]] | None:
    """Where rank and alpha stand, who wrote that, and what it says."""
    return next(
        (
            (place.name, writer, config)
            for place, writer, config in _candidates(path, directory)
            if isinstance(config, Mapping) and config.get(_ALPHA) is not None
        ),
        None,
    )


def _candidates(path: Path, directory: Path) -> Iterator[tuple[Path, str, Any]]:
    for place in dict.fromkeys((path / "lora.json", directory / "lora.json", directory.parent / "lora.json")):
        if place.is_file():
            yield place, "Megatron", mapping(place)
    if (place := directory / "run_config.yaml").is_file():
        yield place, "Megatron-Bridge", mapping(place).get("peft")
    if (place := directory / "adapter_metadata.json").is_file():
        yield place, "NeMo 2.0", mapping(place)
    for context in (directory.parent / "context", directory / "context"):
        if (place := context / "model.yaml").is_file():
            yield place, "NeMo 2.0", mapping(place).get("model_transform")
        elif (place := context / "io.json").is_file():
            yield place, "NeMo 2.0", fiddle.lora(place)


def _scaling(said: str, config: Mapping[str, Any]) -> Scaling:
    kind = str(config.get("_target_") or config.get("peft") or "LoRA").rpartition(".")[2]
    if kind not in _CLASSES:
        raise UnsupportedInput(f"{said} describes an adapter of {kind}; nemoport merges {' and '.join(_CLASSES)}")
    alpha, rank = config[_ALPHA], config.get(_RANK)
    try:
        if not (rank is None or type(rank) is int):
            raise ValueError(rank)
        return Scaling(rank=rank, alpha=finite(alpha))
    except (TypeError, ValueError) as error:
        raise DamagedInput(f"{said} says {_ALPHA} {alpha!r} and {_RANK} {rank!r}; numbers are needed") from error
