"""PyTorch's own distributed checkpoints: whatever the trainer calls its model, and whoever wrote which part."""

from __future__ import annotations

import argparse
import json
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemoport.errors import DamagedInput, PolicyError, UsageError
from nemoport.exporters import source
from nemoport.exporters.tensor import LazyTensor, read

from .fixtures import LLAMA
from .made import SPECS, config, random_tensors, save_torch_dist, stored, torch_tensor

FIXTURE = LLAMA["torch_dcp"]
SPEC = SPECS["llama"]["every bias"]


def save_dcp(directory: Path, named: Mapping[str, Any]) -> Path:
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save(dict(named), checkpoint_id=directory, no_dist=True)
    return directory


def _named(naming: str, canonical: Mapping[str, LazyTensor], prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + name: torch_tensor(each).clone() for name, each in stored(SPEC, naming, canonical).items()}


@pytest.mark.parametrize("prefix", ["model.module.", "model.", "model.module.module."])
def test_the_halves_of_a_gated_layer_may_lie_apart(prefix: str, tmp_path: Path) -> None:
    canonical = random_tensors(SPEC)
    named = _named("megatron", canonical, prefix)
    for name in [name for name in named if "linear_fc1" in name and "norm" not in name]:
        named[f"{name}_w"], named[f"{name}_v"] = named.pop(name).chunk(2)
    model = source.model(save_dcp(tmp_path / "saved", named), config(SPEC, "megatron"))
    assert model.checkpoint.format == "torch_dcp"
    _check_equal(model.tensors, canonical)


@pytest.mark.parametrize("place", [".", ".hf_metadata", ".."])
@pytest.mark.parametrize("prefix", ["", "model.", "state.model.module."])
def test_names_of_transformers_are_read_as_such(prefix: str, place: str, tmp_path: Path) -> None:
    spec, canonical = SPECS["llama"]["plain"], random_tensors(SPECS["llama"]["plain"])
    named = {prefix + name: torch_tensor(each).clone() for name, each in stored(spec, "huggingface", canonical).items()}
    more = {"optimizer.state.exp_avg": torch.zeros(3), "step": 7, f"{prefix}model.rotary_emb.inv_freq": torch.ones(3)}
    path = save_dcp(tmp_path / "run/weights", named | more)
    (path / place).mkdir(exist_ok=True)
    (path / place / "config.json").write_text(json.dumps(config(spec, "huggingface")))
    for given in (path, path.parent):
        model = source.model(given)
        assert model.checkpoint.naming == "huggingface"
        _check_equal(model.tensors, canonical)
        assert set(model.checkpoint.skipped) == set(more)


def test_without_a_config_it_is_asked_for(tmp_path: Path) -> None:
    path = save_dcp(tmp_path / "saved", _named("huggingface", random_tensors(SPEC)))
    with pytest.raises(UsageError, match="--config"):
        source.model(path)


def test_a_bridge_checkpoint_of_fsdp_is_one_of_the_bridge(tmp_path: Path) -> None:
    path = Path(shutil.copytree(FIXTURE.path / "iter_0000010", tmp_path / "saved"))
    shutil.copy(LLAMA["megatron_bridge, iteration"].path / "run_config.yaml", path)
    model = source.model(path)
    assert model.checkpoint.format == "megatron_bridge"
    assert model.spec.hidden_size == 64


class _Exploit:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, ("touch EVIL_RAN_dcp",)


def test_the_arguments_are_data_and_other_pickles_stay_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec, canonical = SPECS["llama"]["plain"], random_tensors(SPECS["llama"]["plain"])
    arguments = argparse.Namespace(num_layers=3)
    more = {"rng_state": _Exploit(), "iteration": _Exploit(), "args": arguments}
    path = save_torch_dist(tmp_path / "saved", spec, canonical, "model.module.", more)
    found = source.checkpoint(path)
    assert found.writer == "Megatron-LM"
    assert found.config["num_layers"] == 3
    assert found.skipped.keys() == more.keys()
    hostile = save_torch_dist(tmp_path / "hostile", spec, canonical, "model.", {"args": _Exploit()})
    with pytest.raises(PolicyError, match="system"):
        source.checkpoint(hostile)
    assert not list(tmp_path.glob("EVIL_RAN*"))


def _without_chunks(metadata: Any) -> None:
    metadata.state_dict_metadata[NORM].chunks = []


def _overlapping(metadata: Any) -> None:
    """Volumes add up and corners differ, but some elements are there twice and others never."""
    chunks = metadata.state_dict_metadata[EMBEDDING].chunks
    chunks[1].offsets = torch.Size((chunks[1].offsets[0] - 1, 0))
    for key in list(metadata.storage_data):
        if key.fqn == EMBEDDING and key.offset[0]:
            metadata.storage_data[type(key)(EMBEDDING, chunks[1].offsets)] = metadata.storage_data.pop(key)


def _more_axes(metadata: Any) -> None:
    for chunk in metadata.state_dict_metadata[EMBEDDING].chunks:
        chunk.sizes = torch.Size((*chunk.sizes, 1))


NORM, EMBEDDING = "model.module.decoder.final_layernorm.weight", "model.module.embedding.word_embeddings.weight"


@pytest.mark.parametrize("edit", [_without_chunks, _overlapping, _more_axes])
def test_chunks_that_do_not_tile_their_tensor_are_refused(edit: Callable[[Any], None], tmp_path: Path) -> None:
    path = _edited(tmp_path, edit)
    with pytest.raises(DamagedInput, match="chunk"):
        source.model(path)


def test_ranks_that_own_nothing_of_a_tensor_write_empty_chunks(tmp_path: Path) -> None:
    def edit(metadata: Any) -> None:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        for entry in metadata.state_dict_metadata.values():
            if hasattr(entry, "chunks"):
                nothing = torch.Size((0, *entry.size[1:]))
                entry.chunks += [ChunkStorageMetadata(torch.Size([0] * len(entry.size)), nothing)] * 2

    found, whole = source.model(_edited(tmp_path, edit)), source.model(FIXTURE.path)
    _check_equal(found.tensors, whole.tensors)


def _edited(tmp_path: Path, edit: Callable[[Any], None]) -> Path:
    path = Path(shutil.copytree(FIXTURE.path / "iter_0000010", tmp_path / "saved"))
    metadata = pickle.loads((path / ".metadata").read_bytes())
    edit(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def _check_equal(found: Mapping[str, LazyTensor], expected: Mapping[str, LazyTensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(read(found[name]).view("u2"), read(expected[name]).view("u2"), name)
