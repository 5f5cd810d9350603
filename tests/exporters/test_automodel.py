"""NeMo AutoModel: a run, a step or its model, in every form that it is saved in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nemoport.errors import DamagedInput, NemoportError, UnsupportedInput, UsageError
from nemoport.exporters import source
from nemoport.exporters.tensor import read

from .fixtures import HUGGINGFACE, LLAMA
from .test_dcp import save_dcp

RUN = LLAMA["nemo_automodel"].path
STEP = "epoch_0_step_9"
PLACES = "DCP_SHARDING_INFO"


def _copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def _consolidated(model: Path) -> None:
    shutil.copytree(HUGGINGFACE, model / "consolidated")


def _consolidated_alone(model: Path) -> None:
    for shard in model.glob("shard-*"):
        shard.unlink()
    _consolidated(model)


def _dcp(model: Path) -> None:
    """With torch_save as the format there is no config; a user puts one there."""
    shutil.rmtree(model)
    save_dcp(model, load_file(HUGGINGFACE / "model.safetensors"))
    shutil.copy(HUGGINGFACE / "config.json", model)


@pytest.mark.parametrize("form", [lambda model: None, _consolidated, _consolidated_alone, _dcp])
def test_every_form_from_every_level_is_the_same_model(form: Callable[[Path], None], tmp_path: Path) -> None:
    run = _copy(tmp_path)
    form(run / STEP / "model")
    expected = source.model(HUGGINGFACE)
    for path in (run, run / STEP, run / STEP / "model"):
        model = source.model(path)
        assert (model.checkpoint.format, model.checkpoint.path) == ("nemo_automodel", path)
        assert model.spec == expected.spec
        for name, tensor in expected.tensors.items():
            np.testing.assert_array_equal(read(model.tensors[name]).view("u2"), read(tensor).view("u2"), name)


def test_the_latest_step_is_the_one_that_the_run_names(tmp_path: Path) -> None:
    """By its link or its text, else by number; an interrupted save never, and no link is followed out of the run."""
    run = _copy(tmp_path)
    shutil.copytree(run / STEP, run / "epoch_1_step_10")
    shutil.copytree(run / STEP, run / "epoch_1_step_8")
    for step in run.glob("epoch_*"):
        config = step / "model/.hf_metadata/config.json"
        words = json.loads(config.read_text()) | {"max_position_embeddings": int(step.name.rpartition("_")[2])}
        config.write_text(json.dumps(words))

    def taken() -> int:
        return source.model(run).spec.max_positions

    assert taken() == 9
    (run / "LATEST.txt").write_text("/elsewhere/epoch_1_step_8\n")
    assert taken() == 8
    (run / "LATEST.txt").unlink()
    assert taken() == 10
    (run / "LATEST").symlink_to(STEP)
    assert taken() == 9
    (run / STEP / ".incomplete").touch()
    assert taken() == 10
    with pytest.raises(DamagedInput, match="interrupted"):
        source.model(run / STEP)


def test_a_lone_dcp_of_another_name_is_not_taken_for_its_own(tmp_path: Path) -> None:
    save_dcp(tmp_path / "model", load_file(HUGGINGFACE / "model.safetensors"))
    assert source.reader(tmp_path / "model")[0] == "torch_dcp"
    with pytest.raises(UnsupportedInput):
        source.reader(tmp_path)


def _edit_places(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        shard = sorted(model.glob("shard-*"))[1]
        with safe_open(shard, "pt") as file:
            metadata = file.metadata()
        places = json.loads(metadata[PLACES])
        edit(places)
        save_file(load_file(shard), shard, metadata | {PLACES: json.dumps(places)})

    return change


NORM = "model.norm.weight"


def _drop_first(model: Path) -> None:
    sorted(model.glob("shard-*"))[0].unlink()


def _drop_last(model: Path) -> None:
    sorted(model.glob("shard-*"))[1].unlink()


def _cut(model: Path) -> None:
    shard = sorted(model.glob("shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])


def _without_config(model: Path) -> None:
    shutil.rmtree(model / ".hf_metadata")


@pytest.mark.parametrize(
    "change, error",
    [
        (_drop_first, DamagedInput),
        (_drop_last, DamagedInput),
        (_cut, DamagedInput),
        (_without_config, UsageError),
        (_edit_places(lambda places: places[NORM].update(saved_offsets=[0])), DamagedInput),
        (_edit_places(lambda places: places[NORM].update(saved_offsets=[31])), DamagedInput),
        (_edit_places(lambda places: places[NORM].update(saved_offsets=[2**45])), DamagedInput),
        (_edit_places(lambda places: places[NORM].update(saved_offsets=[2**80])), DamagedInput),
        (_edit_places(lambda places: places[NORM].update(saved_offsets=[-32])), DamagedInput),
        (_edit_places(lambda places: places[NORM].update(saved_offsets=[32, 0])), DamagedInput),
        (_edit_places(lambda places: places[NORM].update(saved_offsets="32")), DamagedInput),
        (_edit_places(lambda places: places.update({NORM: None})), DamagedInput),
        (_edit_places(lambda places: places.pop(NORM)), DamagedInput),
    ],
)
def test_shards_that_do_not_make_a_whole_are_refused(
    change: Callable[[Path], None], error: type[NemoportError], tmp_path: Path
) -> None:
    run = _copy(tmp_path)
    change(run / STEP / "model")
    with pytest.raises(error) as raised:
        source.model(run)
    assert "\n" not in str(raised.value)
