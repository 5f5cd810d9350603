"""What every target leaves: a ledger in which everything is accounted for, right digests, the same bytes every time."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from nemoport import plugins
from nemoport.artifact import LEDGER, MANIFEST, ORIGIN
from nemoport.errors import DamagedInput
from nemoport.exporters import source
from nemoport.exporters.convert import TARGETS

from .commands import artifact_of, contents, converted
from .conftest import Once
from .fixtures import LLAMA, Fixture

WRITTEN = sorted({*plugins.names(TARGETS)} - {"tokenizer"})
"""Targets that write tensors."""
ENCODERS = {"torchscript"}
"""Those that write nothing else; they are given the same tensors as a model that sees both ways."""
every_target = pytest.mark.parametrize("target", WRITTEN)
PAIRS = {
    f"{name}-{target}": (fixture, target)
    for name, fixture in LLAMA.items()
    for target in WRITTEN
    if target not in ENCODERS or fixture.format not in ("huggingface", "nemo_automodel")
}
every_pair = pytest.mark.parametrize("fixture, target", PAIRS.values(), ids=PAIRS)
PLANS: dict[str, dict[str, Any]] = {"trtllm": {"tp": 2, "pp": 2}, "vllm": {"tp": 2}, "llmapi": {"tp": 2, "pp": 2}}


@every_pair
def test_every_source_tensor_is_accounted_for_exactly_once(fixture: Fixture, target: str, once: Once) -> None:
    checkpoint = source.checkpoint(fixture.path, fixture.config)
    rows = [row for row in ledger(made(once, fixture, target)) if "source" in row]
    assert sorted(row["source"] for row in rows) == sorted([*checkpoint.tensors, *checkpoint.skipped])
    for row in rows:
        assert row["fate"] in ("used", "skipped")
        if row["fate"] == "skipped":
            assert row["rule"]
        else:
            tensor = checkpoint.tensors[row["source"]]
            assert (row["dtype"], row["shape"]) == (tensor.dtype, list(tensor.shape))


@pytest.mark.parametrize("name", [name for name, fixture in LLAMA.items() if any(fixture.path.rglob(".metadata"))])
def test_the_ledger_knows_every_name_of_the_index(name: str, once: Once) -> None:
    """The judge reads the names in `.metadata` itself; layers that lie stacked under one name are a row each."""
    strings = {
        value
        for value in _strings((LLAMA[name].weights / ".metadata").read_bytes())
        if value.startswith(("decoder.", "embedding.", "output_layer.", "rng_state", "optimizer."))
        and value != "rng_state"  # which torch lists apart, as a step on the way to its names
    }
    named = {row["source"] for row in ledger(once(LLAMA[name], "hf")) if "source" in row}
    assert {_unnumbered(each) for each in named} >= {_unnumbered(each) for each in strings}


@every_pair
def test_every_target_tensor_is_written_once_with_the_digest_of_its_bytes(
    fixture: Fixture, target: str, once: Once
) -> None:
    directory = made(once, fixture, target)
    rows = [row for row in ledger(directory) if "target" in row]
    used = {row["source"] for row in ledger(directory) if row.get("fate") == "used"}
    assert len({(row["file"], row["target"]) for row in rows}) == len(rows)
    for row in rows:
        with (directory / row["file"]).open("rb") as file:
            file.seek(row["offset"])
            assert blake3(file.read(row["bytes"])).hexdigest() == row["blake3"], row["target"]
        assert set(row["sources"]) <= used
        assert bool(row["sources"]) == bool(row["parts"])
    assert {name for row in rows for name in row["sources"]} == used


@every_target
def test_the_ledger_lists_what_the_files_hold(target: str, once: Once) -> None:
    directory = made(once, LLAMA["nemo2"], target)
    rows = {(row["file"], row["target"]): row for row in ledger(directory) if "target" in row}
    held = dict(_tensors(directory))
    assert rows.keys() == held.keys()
    for place, (dtype, shape) in held.items():
        assert (rows[place]["dtype"], tuple(rows[place]["shape"])) == (dtype, shape), place


@every_pair
def test_every_byte_is_under_a_digest(fixture: Fixture, target: str, once: Once) -> None:
    """Of the whole file in the manifest, or of its pieces in the ledger, with zeros between."""
    directory = made(once, fixture, target)
    manifest = json.loads((directory / MANIFEST).read_bytes())
    files = contents(directory, MANIFEST)
    assert {row["path"]: row["size"] for row in manifest["files"]} == {name: len(files[name]) for name in files}
    assert manifest["kind"] == target
    for row in manifest["files"]:
        content = files[row["path"]]
        if row["blake3"] is not None:
            assert blake3(content).hexdigest() == row["blake3"], row["path"]
            continue
        end = 0
        for piece in (each for each in ledger(directory) if each.get("file") == row["path"]):
            assert not any(content[end : piece["offset"]]), "between the pieces are zeros"
            end, start = piece["offset"] + piece["bytes"], piece["offset"]
            assert start >= 0
            assert blake3(content[start:end]).hexdigest() == piece["blake3"], piece
        assert end == len(content)
    artifact_of(directory)


@every_target
@pytest.mark.parametrize("fixture", [LLAMA["torch_dist at tp 2 pp 2"], LLAMA["nemo2"]], ids=["torch_dist", "nemo2"])
def test_same_inputs_give_the_same_bytes_however_they_are_worked_on(
    fixture: Fixture, target: str, once: Once, tmp_path: Path
) -> None:
    expected = contents(made(once, fixture, target))
    for workers in (1, 7):
        again = converted(
            given(fixture, target), target, tmp_path / str(workers), workers=workers, **PLANS.get(target, {})
        )
        assert contents(again) == expected


@every_target
def test_nothing_in_an_artifact_tells_where_or_when_it_was_made(target: str, once: Once) -> None:
    directory = made(once, LLAMA["megatron_lm"], target)
    for name, content in contents(directory).items():
        assert str(directory.parent).encode() not in content, name
        assert str(LLAMA["megatron_lm"].path).encode() not in content, name
    assert json.loads((directory / ORIGIN).read_bytes())["path"] == str(LLAMA["megatron_lm"].path.resolve())


@every_target
def test_an_altered_byte_is_noticed(target: str, tmp_path: Path) -> None:
    directory = converted(given(LLAMA["nemo2"], target), target, tmp_path / "out", **PLANS.get(target, {}))
    found = artifact_of(directory)
    for file in found.files:
        path = directory / file.path
        before = path.read_bytes()
        for place in (0, len(before) - 1):
            path.write_bytes(before[:place] + bytes([before[place] ^ 1]) + before[place + 1 :])
            with pytest.raises(DamagedInput, match=re.escape(file.path)):
                artifact_of(directory)
        path.write_bytes(before)
    artifact_of(directory)


def given(fixture: Fixture, target: str) -> Fixture:
    return fixture.seeing_both_ways if target in ENCODERS else fixture


def made(once: Once, fixture: Fixture, target: str) -> Path:
    return once(given(fixture, target), target, **PLANS.get(target, {}))


def ledger(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / LEDGER).read_text().splitlines()]


def _tensors(directory: Path) -> Any:
    """Every tensor in the files of an artifact, as the formats' own libraries list them."""
    import onnx
    import torch
    from onnx import TensorProto
    from safetensors import safe_open

    codes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    names = {TensorProto.FLOAT: "float32", TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}
    for path in directory.rglob("*.safetensors"):
        with safe_open(path, "np") as file:
            for name in file.keys():  # noqa: SIM118
                view = file.get_slice(name)
                yield (path.relative_to(directory).as_posix(), name), (codes[view.get_dtype()], tuple(view.get_shape()))
    for path in directory.glob("*.onnx"):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            if where := {entry.key: entry.value for entry in tensor.external_data}:
                yield (where["location"], tensor.name), (names[tensor.data_type], tuple(tensor.dims))
    for path in directory.glob("*.pt"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of TorchScript as a whole
            held = torch.jit.load(path).state_dict()  # type: ignore[no-untyped-call]
        for name, tensor in held.items():
            yield (path.name, name), (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _strings(content: bytes) -> set[str]:
    import pickletools

    assert pickle.DEFAULT_PROTOCOL >= 2
    return {argument for _, argument, _ in pickletools.genops(content) if isinstance(argument, str)}


def _unnumbered(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)|/shard_\S*$", "", name)
