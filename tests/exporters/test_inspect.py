"""`inspect` says of any path what it is, and judges every pickle in it without opening those that need not be."""

from __future__ import annotations

import os
import pickle
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nemoport.exporters.formats import pickles
from nemoport.exporters.formats.tree import Directory, archive
from nemoport.exporters.formats.unpickle import survey
from nemoport.exporters.inspect import inspect

from .commands import command
from .fixtures import LLAMA, MEGATRON, Fixture, every_llama
from .made import SPECS, config, random_tensors, save_torch_dist


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/executed",)


BARE = pickle.dumps(Evil())


@every_llama
def test_every_format_is_told_by_its_name_and_numbers(fixture: Fixture) -> None:
    facts = inspect(fixture.path, fixture.config)
    assert (facts["format"], facts["family"], facts["dtype"]) == (fixture.format, "llama", "bfloat16")
    assert facts["parameters"] == 272_448
    assert facts["vocabulary"] == {"true": 300, "padded": fixture.rows}
    assert all(each["verdict"] == "clean" for each in facts["pickles"] if not each["path"].startswith("context/"))
    assert "problem" not in facts
    result = command("inspect", fixture.path)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"format      {fixture.format}, written by ")


@every_llama
def test_facts_without_the_architecture_are_told_all_the_same(fixture: Fixture) -> None:
    facts = inspect(fixture.path)
    assert facts["vocabulary"]["padded"] == fixture.rows
    assert ("family" in facts) == (fixture.config_file is None)


@pytest.mark.parametrize(
    "name, tp", [("torch_dist", 1), ("torch_dist at tp 2 pp 2", 2), ("torch_dist, a key a layer", 1), ("zarr", 1)]
)
def test_tensor_parallelism_that_no_config_tells_is_inferred(name: str, tp: int) -> None:
    facts = inspect(LLAMA[name].path, LLAMA[name].config)
    assert (facts["trained"], facts["inferred"]) == ({"tp": tp}, ["tp"])
    assert f"tp {tp} (inferred)" in command("inspect", LLAMA[name].path).stdout


def test_what_the_config_tells_is_not_inferred() -> None:
    facts = inspect(LLAMA["megatron_lm"].path)
    assert (facts["trained"]["tp"], facts["inferred"]) == (2, [])


def test_the_versions_of_the_writers_are_told() -> None:
    assert inspect(LLAMA["nemo1"].path)["writer"] == "NeMo 2.2.0"
    assert inspect(LLAMA["huggingface"].path)["versions"] == {"transformers": "4.57.6"}
    assert inspect(LLAMA["nemo2"].path)["versions"] == {"torch_dist": "1"}


def test_the_optimizers_weights_are_counted(tmp_path: Path) -> None:
    spec = SPECS["llama"]["plain"]
    more = {"optimizer.state.fp32_param.decoder.final_layernorm.weight": torch.zeros(10)}
    path = save_torch_dist(tmp_path / "model", spec, random_tensors(spec), more=more)
    assert inspect(path, config(spec, "megatron"))["masters"] == 1
    assert "float32 copies of 1 tensors" in command("inspect", path).stdout


def test_an_adapter_is_told_with_its_pickles() -> None:
    facts = inspect(MEGATRON / "lora/bridge_adapter")
    assert facts["format"] == "adapter (megatron)"
    assert {each["path"] for each in facts["pickles"]} == {"iter_0000010/.metadata", "iter_0000010/common.pt"}


def test_archives_of_chunks_are_counted_and_not_opened() -> None:
    facts = inspect(LLAMA["nemo2"].path)
    assert facts["archives"] == 52
    assert not any(".distcp" in each["path"] for each in facts["pickles"])


def test_the_arguments_among_the_tensors_are_judged() -> None:
    facts = inspect(LLAMA["torch_dcp"].path)
    assert any(each["path"].endswith(".distcp/args") for each in facts["pickles"])


def _zip(path: Path) -> None:
    torch.save({"x": Evil()}, path)


def _before_zip(path: Path) -> None:
    torch.save({"x": Evil()}, path, _use_new_zipfile_serialization=False)


HIDDEN: Mapping[str, tuple[str, Any]] = {
    "torch.save": ("optimizer.pt", _zip),
    "torch.save before 1.6": ("optimizer.pt", _before_zip),
    "bare": ("state.pkl", lambda path: path.write_bytes(BARE)),
    "text": ("state.pkl", lambda path: path.write_bytes(pickle.dumps(Evil(), 0))),
    "without a suffix": ("0b1c", lambda path: path.write_bytes(BARE)),
    "in a directory": ("modelopt_state/common.pt", _zip),
    "an index": ("modelopt_state/.metadata", lambda path: path.write_bytes(BARE)),
}


@pytest.mark.parametrize("place", ["torch_dist", "nemo2, weights", "megatron_legacy, iteration", "huggingface"])
@pytest.mark.parametrize("name, write", HIDDEN.values(), ids=HIDDEN.keys())
def test_a_suspicious_pickle_is_found_wherever_it_lies(name: str, write: Any, place: str, tmp_path: Path) -> None:
    fixture = LLAMA[place]
    root = fixture.path.parent if fixture.path.name == "weights" else fixture.path
    shutil.copytree(root, tmp_path / "copy")
    copy = tmp_path / "copy" / fixture.path.relative_to(root)
    (copy / name).parent.mkdir(exist_ok=True)
    write(copy / name)
    facts = inspect(copy, fixture.config)
    (found,) = (each for each in facts["pickles"] if each["path"].endswith(name))
    assert (found["verdict"], found["globals"]) == ("suspicious, not needed", ("posix.system",))
    assert not Path("/tmp/executed").exists()


def test_a_suspicious_pickle_is_found_in_a_tar(tmp_path: Path) -> None:
    _zip(tmp_path / "more.pt")
    with tarfile.open(tmp_path / "model.nemo", "w") as tar:
        tar.add(tmp_path / "more.pt", "./sub/more.pt")
    (found,) = pickles.found(archive(tmp_path / "model.nemo"), ("model_weights.ckpt",)).pickles
    assert (found.path, found.verdict) == ("sub/more.pt", "suspicious, not needed")


@pytest.mark.parametrize("content", [BARE[:-9], b"\x80\x04\x95", BARE[:2] + b"\xff" * 9])
def test_a_pickle_that_is_cut_is_not_called_clean(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cut.pkl").write_bytes(content)
    (found,) = pickles.found(Directory(tmp_path), ()).pickles
    assert (found.verdict, found.note) == ("suspicious, not needed", "it is damaged")


def test_numbers_that_begin_as_a_pickle_does_are_none(tmp_path: Path) -> None:
    """A chunk of zarr."""
    (tmp_path / "weight").mkdir()
    for name in ("0", "0.0", "12.3.0"):
        (tmp_path / "weight" / name).write_bytes(BARE)
    assert not pickles.found(Directory(tmp_path), ()).pickles


def test_looking_through_builds_nothing() -> None:
    assert survey(BARE) == (("posix.system",), True)
    assert not Path("/tmp/executed").exists()
