"""Checkpoints of any size that take no room on the disk, in every format: their numbers are holes, all zeros.

Archives are torch's own (`torch.serialization.skip_data`), and so is the index of distributed checkpoints.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import torch
import yaml
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemoport.spec import ModelSpec

from . import ranks
from .made import bound, config, save_holes, save_sparse

Shapes = Mapping[str, tuple[int, ...]]
_LAYOUT = {(tp, pp): f"tp_rank_{tp:02d}_pp_rank_{pp:03d}" for pp in range(2) for tp in range(2)}


def shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {binding.stored: binding.shape for binding in bound(spec, "megatron")}


def torch_dist(directory: Path, spec: ModelSpec) -> Path:
    _distributed(directory, spec, "")
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return directory


def torch_dcp(directory: Path, spec: ModelSpec) -> Path:
    return _distributed(directory, spec, "model.module.")


def megatron_lm(directory: Path, spec: ModelSpec) -> Path:
    torch.save({"args": ranks.arguments(spec)}, torch_dist(directory, spec) / "common.pt")
    return directory


def megatron_bridge(directory: Path, spec: ModelSpec) -> Path:
    (torch_dist(directory, spec) / "run_config.yaml").write_text(yaml.safe_dump({"model": config(spec, "megatron")}))
    return directory


def nemo2(directory: Path, spec: ModelSpec) -> Path:
    torch_dist(directory / "weights", spec)
    (directory / "context").mkdir()
    (directory / "context/model.yaml").write_text(yaml.safe_dump({"config": config(spec, "megatron")}))
    return directory


def zarr(directory: Path, spec: ModelSpec) -> Path:
    return _zarr(directory, spec, None, lambda path, size: os.truncate(path, size))


def zarr_compressed(directory: Path, spec: ModelSpec) -> Path:
    codec = numcodecs.Zstd()
    known: dict[int, bytes] = {}

    def write(path: Path, size: int) -> None:
        if size not in known:
            known[size] = bytes(codec.encode(np.zeros(size, np.uint8)))
        path.write_bytes(known[size])

    return _zarr(directory, spec, codec.get_config(), write)


def megatron_legacy(directory: Path, spec: ModelSpec) -> Path:
    """At tp 2 and pp 2."""
    for (tp, pp), state in _ranks(spec, directory).items():
        place = directory / f"mp_rank_{tp:02d}_{pp:03d}"
        place.mkdir()
        args = ranks.arguments(spec, tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
        _save({"args": args, "checkpoint_version": 3.0, "model": state}, place / "model_optim_rng.pt")
    return directory


def nemo1(directory: Path, spec: ModelSpec) -> Path:
    """A tar, at tp 2 and pp 2."""
    archive = directory / "model.nemo"
    with archive.open("xb") if directory.is_dir() else _created(archive) as tar:
        text = yaml.safe_dump(ranks.nemo1_config(spec)).encode()
        _member(tar, "./model_config.yaml", len(text))
        tar.write(text + bytes(-len(text) % 512))
        for place, state in _ranks(spec, directory).items():
            whole = directory / "rank.ckpt"
            _save(state, whole)
            _member(tar, f"./{_LAYOUT[place]}/model_weights.ckpt", whole.stat().st_size)
            _append(tar, whole)
            whole.unlink()
        tar.write(bytes(1024))
        tar.truncate()
    (directory / "hole").unlink()
    return archive


def huggingface(directory: Path, spec: ModelSpec) -> Path:
    return save_sparse(directory, spec)


def nemo_automodel(directory: Path, spec: ModelSpec) -> Path:
    """In two shards, each with half of the rows."""
    model = directory / "epoch_0_step_9" / "model"
    (model / ".hf_metadata").mkdir(parents=True)
    (model / ".hf_metadata/config.json").write_text(json.dumps(config(spec, "huggingface")))
    whole = {binding.stored: binding.shape for binding in bound(spec, "huggingface")}
    for rank in range(2):
        halves = {name: (shape[0] // 2, *shape[1:]) for name, shape in whole.items()}
        corners = {name: [rank * shape[0], *[0] * (len(shape) - 1)] for name, shape in halves.items()}
        places = json.dumps({name: {"saved_offsets": corner} for name, corner in corners.items()})
        name = f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"
        save_holes(model / name, halves, metadata={"DCP_SHARDING_INFO": places})
    return directory


FORMATS: Mapping[str, Callable[[Path, ModelSpec], Path]] = {
    function.__name__: function
    for function in (
        *(torch_dist, torch_dcp, megatron_lm, megatron_bridge, nemo2, zarr, zarr_compressed),
        *(megatron_legacy, nemo1, huggingface, nemo_automodel),
    )
}


def _created(path: Path) -> Any:
    path.parent.mkdir(parents=True)
    return path.open("xb")


def _hole(directory: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over a hole in a file that all share."""
    size = 2 * math.prod(shape)
    path = directory / "hole"
    directory.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.truncate(path, max(size, path.stat().st_size))
    storage = torch.UntypedStorage.from_file(str(path), False, size)
    return torch.tensor([], dtype=torch.bfloat16).set_(storage, 0, shape)  # type: ignore[no-any-return,call-overload]


def _save(saved: Any, path: Path) -> None:
    with torch.serialization.skip_data():
        torch.save(saved, path)


def _ranks(spec: ModelSpec, directory: Path) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """What each of four ranks holds: cut by shape, then put over holes."""
    whole = {name: torch.empty(shape, device="meta") for name, shape in shapes(spec).items()}
    layers = len(spec.blocks) // 2
    return {
        (tp, pp): {name: _hole(directory, tuple(each.shape)) for name, each in ranks.tensor_rank(stage, tp, 2).items()}
        for pp, stage in enumerate(ranks.stages(whole, (layers, layers)))
        for tp in range(2)
    }


def _distributed(directory: Path, spec: ModelSpec, prefix: str) -> Path:
    """Every tensor in two chunks, each the only archive of its file."""
    index = Metadata(state_dict_metadata={}, storage_data={})
    properties = TensorProperties(dtype=torch.bfloat16)
    for number, (bare, shape) in enumerate(shapes(spec).items()):
        name, half = prefix + bare, (shape[0] // 2, *shape[1:])
        chunks = []
        for rank in range(2):
            corner, file = torch.Size((rank * half[0], *[0] * (len(shape) - 1))), f"__{rank}_{number}.distcp"
            _save(_hole(directory, half), directory / file)
            chunks.append(ChunkStorageMetadata(corner, torch.Size(half)))
            place = _StorageInfo(file, 0, (directory / file).stat().st_size)
            index.storage_data[MetadataIndex(name, corner)] = place
        index.state_dict_metadata[name] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
    (directory / ".metadata").write_bytes(pickle.dumps(index))
    (directory / "hole").unlink()
    return directory


def _zarr(directory: Path, spec: ModelSpec, compressor: Any, write: Callable[[Path, int], object]) -> Path:
    """Every matrix in four chunks."""
    for name, shape in shapes(spec).items():
        chunks = (shape[0] // 4, *shape[1:])
        said = {"shape": shape, "chunks": chunks, "dtype": "bfloat16", "compressor": compressor, "fill_value": None}
        (directory / name).mkdir(parents=True)
        (directory / name / ".zarray").write_text(json.dumps({**said, "order": "C", "filters": None, "zarr_format": 2}))
        for number in range(4):
            place = directory / name / ".".join(map(str, (number, *[0] * (len(shape) - 1))))
            place.touch()
            write(place, 2 * math.prod(chunks))
    return directory


def _member(tar: io.BufferedWriter, name: str, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size = size
    tar.write(member.tobuf(tarfile.GNU_FORMAT))


def _append(tar: io.BufferedWriter, path: Path) -> None:
    """Holes as holes, up to the next block of the tar."""
    start, size = tar.tell(), path.stat().st_size
    with path.open("rb", buffering=0) as file:
        at = 0
        while at < size:
            try:
                low = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:  # nothing but a hole follows
                break
            at = os.lseek(file.fileno(), low, os.SEEK_HOLE)
            tar.seek(start + low)
            tar.write(os.pread(file.fileno(), at - low, low))
    tar.seek(start + -(-size // 512) * 512)
