"""What was passed on of ModelOpt's checkpoints validates, and a wrong field of it does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from validation.mutants import Opened, mutate

from nemoport.validation import Request, validate

from .commands import converted
from .modelopt import METHODS, Twin

TO_TRTLLM = ("fp8", "int4_awq", "nvfp4", "int8_sq")


@pytest.mark.parametrize(
    "method, to, plan",
    [
        *((method, "hf", {}) for method in METHODS),
        *((method, "trtllm", {"tp": 2, "pp": 2}) for method in TO_TRTLLM),
    ],
)
def test_what_was_passed_on_validates(
    method: str, to: str, plan: dict[str, Any], twins: dict[str, Twin], tmp_path: Path
) -> None:
    out = converted(twins[method].path, to, tmp_path / "out", **plan)
    report = validate(Request(subject=out))
    assert report.passed, report
    assert len(report.checks) > 3
    assert any("rounds the inputs" in note for note in report.notes) == (method not in ("int4_awq", "int8"))


def reciprocal(name: str) -> Callable[[Opened], None]:
    def apply(opened: Opened) -> None:
        for array in opened.named(name):
            array[...] = 1 / array

    return apply


def swapped_nibbles(name: str) -> Callable[[Opened], None]:
    def apply(opened: Opened) -> None:
        for array in opened.named(name):
            words = array.view(np.uint8)
            words[...] = words >> 4 | words << 4

    return apply


def from_another_layer(name: str) -> Callable[[Opened], None]:
    def apply(opened: Opened) -> None:
        for array, other in zip(opened.named(name), opened.named(name.replace("layers.0", "layers.1")), strict=True):
            array[...] = other

    return apply


_HF, _RANK = "model.layers.0.mlp.down_proj", "transformer.layers.0.mlp.proj"
MUTANTS = {
    "hf fp8, reciprocal scale": ("fp8", "hf", reciprocal(f"{_HF}.weight_scale")),
    "trtllm fp8, reciprocal scale": ("fp8", "trtllm", reciprocal(f"{_RANK}.weights_scaling_factor")),
    "hf nvfp4, reciprocal scale": ("nvfp4", "hf", reciprocal(f"{_HF}.weight_scale_2")),
    "trtllm nvfp4, reciprocal scale": ("nvfp4", "trtllm", reciprocal(f"{_RANK}.weights_scaling_factor_2")),
    "hf int4_awq, swapped nibbles": ("int4_awq", "hf", swapped_nibbles(f"{_HF}.weight")),
    "trtllm int4_awq, swapped nibbles": ("int4_awq", "trtllm", swapped_nibbles(f"{_RANK}.weight")),
    "trtllm int4_awq, reciprocal pre-scale": ("int4_awq", "trtllm", reciprocal(f"{_RANK}.prequant_scaling_factor")),
    "hf fp8, scale of another layer": ("fp8", "hf", from_another_layer(f"{_HF}.weight_scale")),
}


@pytest.mark.parametrize("method, to, damage", MUTANTS.values(), ids=MUTANTS)
def test_validation_catches_a_wrong_field_by_bits_and_by_logits(
    method: str, to: str, damage: Callable[[Opened], None], twins: dict[str, Twin], tmp_path: Path
) -> None:
    clean = converted(twins[method].path, to, tmp_path / "clean")
    report = validate(Request(subject=mutate(clean, tmp_path / "mutant", damage), against=twins[method].path))
    failed = {check.name.partition(":")[0] for check in report.checks if not check.passed}
    assert {"weights of the source", "logits of the source"} <= failed
