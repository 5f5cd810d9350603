"""TorchScript models: bound by argument name, by number or in order, held against torch itself."""

from __future__ import annotations

import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from nemoport.errors import DamagedInput, NemoportError
from nemoport.runner.model import ModelVersion, load_version
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import request_of
from nemoport.runner.tensors import Array

from .models import write_config

CONFIG = """
backend: "pytorch" max_batch_size: 8
input [ {{ name: "{}" data_type: {type} dims: [ 3 ] }}, {{ name: "{}" data_type: {type} dims: [ 3 ] }} ]
output [ {{ name: "OUTPUT__1" data_type: {type} dims: [ 3 ] }}, {{ name: "OUTPUT__0" data_type: {type} dims: [ 3 ] }} ]
"""


class Apart(torch.nn.Module):
    """Not symmetric, so that a wrong order of anything is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 2.0, 5.0]))

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return left * 2 - right, (left + right * 3) * self.scale.to(left.dtype)


def loaded(tmp_path: Path, first: str, second: str, data_type: str = "TYPE_FP32") -> ModelVersion:
    model = tmp_path / "apart"
    (model / "1").mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Apart()).save(model / "1" / "model.pt")  # type: ignore[no-untyped-call]
    write_config(model, CONFIG.format(first, second, type=data_type))
    return load_version(model, "1")


def rows(seed: int, count: int = 2) -> Array:
    return np.random.default_rng(seed).standard_normal((count, 3)).astype(np.float32)


@pytest.mark.parametrize(
    "first, second, left",
    [("right", "left", "left"), ("IN__1", "IN__0", "IN__0"), ("a", "b", "a")],
    ids=["by argument", "by number", "in order"],
)
def test_inputs_are_bound_as_triton_binds_them(tmp_path: Path, first: str, second: str, left: str) -> None:
    right = second if left == first else first
    x, y = rows(0), rows(1)
    found = loaded(tmp_path, first, second).infer(request_of({left: x, right: y})).arrays()
    minus, plus = Apart()(torch.from_numpy(x), torch.from_numpy(y))
    np.testing.assert_array_equal(found["OUTPUT__0"], minus.detach().numpy())
    np.testing.assert_array_equal(found["OUTPUT__1"], plus.detach().numpy())


def test_bfloat16_goes_in_and_comes_out(tmp_path: Path) -> None:
    x, y = rows(0).astype(ml_dtypes.bfloat16), rows(1).astype(ml_dtypes.bfloat16)
    version = loaded(tmp_path, "left", "right", "TYPE_BF16")
    found = version.infer(request_of({"left": x, "right": y}, ("OUTPUT__0",))).arrays()["OUTPUT__0"]
    wanted, _ = Apart()(*(torch.from_numpy(each.astype(np.float32)).bfloat16() for each in (x, y)))
    np.testing.assert_array_equal(found.astype(np.float32), wanted.float().numpy())


def test_what_is_no_torchscript_is_refused(tmp_path: Path) -> None:
    model = loaded(tmp_path, "left", "right").name
    (tmp_path / model / "1" / "model.pt").write_bytes(b"no archive at all")
    with pytest.raises(DamagedInput, match=r"torch cannot load .*model\.pt"):
        load_version(tmp_path / model, "1")


def test_a_config_without_tensors_is_refused_since_the_file_does_not_say_them(tmp_path: Path) -> None:
    model = loaded(tmp_path, "left", "right").name
    write_config(tmp_path / model, 'backend: "pytorch"')
    with pytest.raises(NemoportError, match="needs inputs and outputs in its config"):
        load_version(tmp_path / model, "1")


def test_an_answer_of_another_type_is_not_passed_on(tmp_path: Path) -> None:
    version = loaded(tmp_path, "left", "right", "TYPE_FP64")
    x = rows(0).astype(np.float64)
    assert version.infer(request_of({"left": x, "right": x})).arrays()["OUTPUT__0"].dtype == np.float64
    with pytest.raises(Refusal):
        version.infer(request_of({"left": rows(0), "right": x}))
