"""NeMo AutoModel: Hugging Face names in `epoch_E_step_S/model/`, consolidated, in shards, or in plain PyTorch's format.

    run/LATEST -> epoch_0_step_9, or LATEST.txt that names it
    run/epoch_0_step_9/model/consolidated/            a Hugging Face directory, ready to load
                             shard-00001-model-00001-of-00001.safetensors   what rank 1 had, and where it belongs
                             .hf_metadata/config.json, tokenizer.json, ...
                             .metadata, __0_0.distcp  with model_save_format: torch_save, which carries no config
    run/epoch_0_step_9/optim/

Source: NVIDIA-NeMo/Automodel, nemo_automodel/components/checkpoint/{checkpointing,addons,utils}.py and
_backports/hf_storage.py; the shards are those of torch.distributed.checkpoint.hf_storage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import distributed, safetensors, tokenizer
from nemoport.exporters.formats.shards import Corner, tiled
from nemoport.exporters.formats.tree import Directory, Tree
from nemoport.exporters.readers import huggingface, torch_dcp
from nemoport.exporters.tensor import Files, LazyTensor

WRAPS = ("huggingface", "torch_dcp")
LOOKS_FOR = "epoch_*_step_*/model"
NEEDED = (distributed.INDEX, "*.distcp/args")
_FORMAT, _WRITER = "nemo_automodel", "NeMo AutoModel"
_EPOCH = re.compile(r"epoch_\d+_step_(\d+)")
_SHARDS, _METADATA, _CONSOLIDATED = "shard-*-model-*-of-*.safetensors", ".hf_metadata", "consolidated"
_INCOMPLETE = ".incomplete"
"""AutoModel's mark of a save that was interrupted."""
_PLACES = "DCP_SHARDING_INFO"


def recognises(path: Path) -> bool:
    return _model(path) is not None


def files(path: Path) -> Tree:
    return Directory(_model(path) or path)


def read(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    model = _model(path)
    assert model is not None
    if (model.parent / _INCOMPLETE).exists():
        raise DamagedInput(f"{model.parent} is marked {_INCOMPLETE}: saving it was interrupted; use an earlier step")
    if huggingface.recognises(model / _CONSOLIDATED):
        found = huggingface.read(model / _CONSOLIDATED, config)
    elif distributed.kind(model) == "torch_dcp":
        found = torch_dcp.read(model, config)
    else:
        found = _sharded(model, config)
    return replace(found, path=path, format=_FORMAT, writer=_WRITER)


def _model(path: Path) -> Path | None:
    """The `model/` of a run, of one of its steps, or given."""
    try:
        return next((place for place in (path, path / "model", *_steps(path)) if _is_model(place)), None)
    except OSError:
        return None


def _is_model(path: Path) -> bool:
    """By what only AutoModel leaves there, or by the name of the step."""
    if not path.is_dir():
        return False
    if any(path.glob(_SHARDS)):
        return True
    ours = (path / _METADATA).is_dir() or (path.name == "model" and _EPOCH.fullmatch(path.resolve().parent.name))
    return bool(ours) and (huggingface.recognises(path / _CONSOLIDATED) or distributed.kind(path) == "torch_dcp")


def _steps(run: Path) -> list[Path]:
    """The `model/` of the latest step first, as the run says or by their numbers; interrupted ones left out."""
    steps = {entry: int(match[1]) for entry in run.glob("epoch_*_step_*") if (match := _EPOCH.fullmatch(entry.name))}
    whole = [entry for entry in steps if not (entry / _INCOMPLETE).exists()]
    latest = _pointed(run)
    return [step / "model" for step in sorted(whole, key=lambda step: (step.name == latest, steps[step]), reverse=True)]


def _pointed(run: Path) -> str:
    """The name of the step that LATEST points to; the pointer is never followed out of the run."""
    if (link := run / "LATEST").is_symlink():
        return link.readlink().name
    text = run / "LATEST.txt"
    return Path(text.read_text(errors="replace").strip()).name if text.is_file() else ""


def _sharded(model: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    """Every tensor from the boxes that the ranks wrote, each with its corner in its file's header."""
    files = Files()
    boxes: dict[str, list[tuple[Corner, LazyTensor]]] = {}
    shards = sorted(model.glob(_SHARDS))
    for shard in shards:
        corners = _corners(shard)
        for name, tensor in safetensors.read(files, shard).items():
            corner = corners.get(name, (0,) * len(tensor.shape))
            if len(corner) != len(tensor.shape):
                raise DamagedInput(f"{shard.name} places {name} at {list(corner)}, it has {len(tensor.shape)} axes")
            boxes.setdefault(name, []).append((corner, tensor))
    tensors = {name: _whole(name, found, model) for name, found in boxes.items()}
    given = next((place for place in (model / _METADATA, model) if (place / huggingface.CONFIG).is_file()), None)
    return Checkpoint(
        path=model,
        format=_FORMAT,
        writer=_WRITER,
        naming="huggingface",
        config=huggingface.words(given, config) if given else dict(config or {}),
        tensors={name: tensor for name, tensor in tensors.items() if not huggingface.skipped_by(name)},
        skipped={name: rule for name in tensors if (rule := huggingface.skipped_by(name))},
        tokenizer=tokenizer.find(Directory(model / _METADATA), Directory(model)),
    )


def _whole(name: str, boxes: list[tuple[Corner, LazyTensor]], model: Path) -> LazyTensor:
    """No file says the whole shape: it ends where the last box does, and the config's proof finds a lost shard."""
    first = boxes[0][1]
    if any(len(piece.shape) != len(first.shape) or piece.dtype != first.dtype for _, piece in boxes):
        raise DamagedInput(f"the shards of {name} in {model} differ in axes or dtype; copy the checkpoint again")
    shape = tuple(max(corner[axis] + piece.shape[axis] for corner, piece in boxes) for axis in range(len(first.shape)))
    return tiled(name, shape, first.dtype, boxes, str(model))


def _corners(shard: Path) -> dict[str, Corner]:
    said = safetensors.metadata(shard).get(_PLACES)
    try:
        places = {name: tuple(place["saved_offsets"]) for name, place in json.loads(said).items()} if said else {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DamagedInput(f"{shard.name} does not say where its tensors belong ({error!r}); copy it again") from error
    if not all(type(low) is int and 0 <= low < 2**48 for corner in places.values() for low in corner):
        raise DamagedInput(f"{shard.name} places tensors where none can be; copy it again")
    return places
