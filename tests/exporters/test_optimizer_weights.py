"""`--weights optimizer`: the float32 copies of training in place of the rounded weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemoport.artifact import LEDGER
from nemoport.errors import DamagedInput, NemoportError, UnsupportedInput
from nemoport.exporters import source
from nemoport.exporters.tensor import Held, LazyTensor, read
from nemoport.spec import tensors

from .commands import artifact_of, command, contents, converted
from .made import SPECS, config, save_torch_dist, stored, torch_tensor

SPEC = SPECS["llama"]["plain"]
CONFIG = config(SPEC, "megatron")
PREFIX = "optimizer.state.fp32_param."


def _masters() -> dict[str, LazyTensor]:
    """Canonical, in float32, of numbers that bfloat16 must round."""
    bits = np.random.default_rng(3)
    shapes = {name: tensor.shape for name, tensor in tensors(SPEC).items()}
    return {name: Held(bits.standard_normal(shape).astype(np.float32), "float32") for name, shape in shapes.items()}


def _named(canonical: Mapping[str, LazyTensor]) -> dict[str, torch.Tensor]:
    return {name: torch_tensor(tensor).clone() for name, tensor in stored(SPEC, "megatron", canonical).items()}


def _rounded(canonical: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    return {
        name: Held(torch_tensor(tensor).bfloat16().view(torch.int16).numpy(), "bfloat16")
        for name, tensor in canonical.items()
    }


def _saved(directory: Path, optimizer: Mapping[str, Any], canonical: Mapping[str, LazyTensor]) -> Path:
    return save_torch_dist(directory, SPEC, _rounded(canonical), more=dict(optimizer))


def test_what_megatron_core_saved_of_an_optimizer_is_taken(tmp_path: Path) -> None:
    masters = _masters()
    save_file(_named(masters), tmp_path / "numbers.safetensors")
    here = Path(__file__).parents[2]
    arguments = ["-m", "tests.exporters.mcore_optimizer", tmp_path / "saved", tmp_path / "numbers.safetensors"]
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = source.model(tmp_path / "saved", CONFIG, weights="optimizer")
    assert model.checkpoint.format == "torch_dist"
    _check_equal(model.tensors, masters)
    _check_equal(source.model(tmp_path / "saved", CONFIG).tensors, _rounded(masters))


@pytest.mark.parametrize("prefix", [PREFIX, f"chained_1.{PREFIX}"])
def test_an_artifact_holds_them_and_says_so(prefix: str, tmp_path: Path) -> None:
    masters = _masters()
    optimizer = {f"{prefix}{name}": tensor for name, tensor in _named(masters).items()}
    optimizer["optimizer.state.exp_avg.output_layer.weight"] = torch.zeros(131, 10)
    path = _saved(tmp_path / "saved", optimizer, masters)
    out = converted(path, "hf", tmp_path / "out", config=CONFIG, weights="optimizer")
    plain = converted(path, "hf", tmp_path / "plain", config=CONFIG)
    made, rounded = (load_file(directory / "model.safetensors") for directory in (out, plain))
    assert {tensor.dtype for tensor in made.values()} == {torch.float32}
    assert all(torch.equal(made[name].bfloat16(), rounded[name]) for name in made)
    assert not all(torch.equal(made[name], rounded[name].float()) for name in made)
    assert artifact_of(out).plan.weights == "optimizer"
    rows = [json.loads(line) for line in (out / LEDGER).read_text().splitlines()]
    used = {row["source"]: row["dtype"] for row in rows if row.get("fate") == "used"}
    assert set(used.values()) == {"float32"}
    skipped = {row["source"]: row["rule"] for row in rows if row.get("fate") == "skipped"}
    assert set(skipped) == {f"{name} (bfloat16)" for name in used} | {"optimizer.state.exp_avg.output_layer.weight"}


def test_the_command_takes_them(tmp_path: Path) -> None:
    masters = _masters()
    path = _saved(tmp_path / "saved", {f"{PREFIX}{name}": each for name, each in _named(masters).items()}, masters)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    out = tmp_path / "out"
    arguments = ("convert", path, "--to", "hf", "--config", tmp_path / "config.json", "--weights", "optimizer")
    assert command(*arguments, "-o", out).exit_code == 0
    assert contents(out) == contents(converted(path, "hf", tmp_path / "function", config=CONFIG, weights="optimizer"))


def test_casting_them_gives_another_artifact_than_the_model(tmp_path: Path) -> None:
    """The same command but for --weights does not continue, or take for done, the other's work."""
    masters = _masters()
    path = _saved(tmp_path / "saved", {f"{PREFIX}{name}": each for name, each in _named(masters).items()}, masters)
    converted(path, "hf", tmp_path / "out", config=CONFIG, weights="optimizer", dtype="bfloat16")
    with pytest.raises(NemoportError):
        converted(path, "hf", tmp_path / "out", config=CONFIG, dtype="bfloat16")


def test_weights_that_the_model_has_in_float32_need_no_copy(tmp_path: Path) -> None:
    masters = _masters()
    path = save_torch_dist(
        tmp_path / "saved", SPEC, masters, more={f"{PREFIX}output_layer.weight": torch.ones(131, 10)}
    )
    model = source.model(path, CONFIG, weights="optimizer")
    _check_equal(model.tensors, masters | {"head.weight": Held(np.ones((131, 10), np.float32), "float32")})
    assert set(model.transforms) == {"head.weight"}


@pytest.mark.parametrize(
    "optimizer, error, says",
    [
        ({}, UnsupportedInput, "nowhere"),
        (
            {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_bf16.bucket_idx_0.param": torch.zeros(8)},
            UnsupportedInput,
            "buckets",
        ),
        ({f"{PREFIX}output_layer.weight": torch.zeros(131, 10)}, DamagedInput, "no float32 copy"),
        ({"flat": True}, UnsupportedInput, "flattened"),
        ({"stranger": True}, UnsupportedInput, "no weight of that name"),
    ],
    ids=["absent", "buckets", "incomplete", "flattened", "of another model"],
)
def test_what_cannot_be_taken_is_refused(
    optimizer: dict[str, Any], error: type[NemoportError], says: str, tmp_path: Path
) -> None:
    masters = _masters()
    whole = {f"{PREFIX}{name}": tensor for name, tensor in _named(masters).items()}
    if optimizer.pop("flat", None):
        optimizer = {name: tensor.flatten() for name, tensor in whole.items()}
    elif optimizer.pop("stranger", None):
        optimizer = whole | {f"{PREFIX}decoder.layers.0.mlp.gate": torch.zeros(3)}
    path = _saved(tmp_path / "saved", optimizer, masters)
    _check_equal(source.model(path, CONFIG).tensors, _rounded(masters))
    with pytest.raises(error, match=says):
        source.model(path, CONFIG, weights="optimizer")


def _check_equal(found: Mapping[str, LazyTensor], expected: Mapping[str, LazyTensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(read(found[name]), read(expected[name]), name)
