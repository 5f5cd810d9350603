"""Checkpoints that ModelOpt quantized are refused where a target has no room for them, and damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemoport.exporters.methods import rows

from .commands import command, converted, sentence
from .modelopt import SMALL, SPEC, Twin, every_method, save, stored_bytes


def refused(*arguments: object, code: int = 3) -> str:
    result = command("convert", *arguments)
    assert result.exit_code == code, result.output
    return sentence(result.stderr)


def test_scales_that_would_have_to_be_shared_are_refused(tmp_path: Path) -> None:
    twin = save(tmp_path / "twin", "fp8", SMALL, shared=False)
    said = refused(twin.path, "--to", "trtllm", "-o", tmp_path / "out")
    assert "up_proj.weight have each a scale of their own" in said
    assert not (tmp_path / "out").exists()


@every_method
def test_another_dtype_and_what_onnx_cannot_say_are_refused(
    method: str, twins: dict[str, Twin], tmp_path: Path
) -> None:
    path = twins[method].path
    if reason := {row.method: row.refused for row in rows() if row.dialect == "onnx"}[method]:
        assert f"is quantized ({method}): {reason}" in refused(path, "--to", "onnx", "-o", tmp_path / "out")
    assert "leave --dtype out" in refused(path, "--to", "hf", "--dtype", "bfloat16", "-o", tmp_path / "out", code=2)


def test_what_trtllm_cannot_load_is_refused(twins: dict[str, Twin], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "quantizes plain weights to W8A16 itself" in refused(twins["int8"].path, "--to", "trtllm", "-o", out)
    at_four = refused(twins["int4_awq"].path, "--to", "trtllm", "--tp", 4, "-o", out)
    assert "with 128 inputs to an element of its scale, and cannot be cut at inputs 0 to 64" in at_four
    odd = save(tmp_path / "odd", "int4_awq", replace(SPEC, hidden_size=384))
    at_two = refused(odd.path, "--to", "trtllm", "--tp", 2, "-o", out)
    assert "384 hidden at tp=2, which do not divide by 256" in at_two
    cached = save(tmp_path / "cached", "fp8", SMALL, kv_cache=True)
    assert "scales for k and v apart" in refused(cached.path, "--to", "trtllm", "-o", out)
    assert not out.exists()


def change(*edits: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        stored = load_file(path / "model.safetensors")
        for edit in edits:
            edit(stored)
        save_file(stored, path / "model.safetensors", {"format": "pt"})

    return apply


def describe(**changes: Any) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        data = json.loads((path / "hf_quant_config.json").read_text())
        data["quantization"] |= changes
        (path / "hf_quant_config.json").write_text(json.dumps(data))

    return apply


K = "model.layers.1.self_attn.k_proj"
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a scale is missing": (change(lambda at: at.pop(f"{K}.weight_scale")), f"{K}.weight_scale is missing"),
    "the scale of the input is missing": (change(lambda at: at.pop(f"{K}.input_scale")), "input_scale is missing"),
    "a scale is cut": (
        change(lambda at: at.update({f"{K}.weight_scale": torch.zeros(0)})),
        "float32 [0], float32 [] needed",
    ),
    "a scale in another dtype": (
        change(lambda at: at.update({f"{K}.weight_scale": torch.tensor(1.0).bfloat16()})),
        "is bfloat16 []",
    ),
    "a scale without a weight": (
        change(lambda at: at.update({f"{K}.weight": at[f"{K}.weight"].bfloat16()})),
        "scales have no weight quantized by fp8 beside them",
    ),
    "a plain weight": (
        change(
            lambda at: at.update({f"{K}.weight": at[f"{K}.weight"].bfloat16()}),
            lambda at: at.pop(f"{K}.weight_scale"),
            lambda at: at.pop(f"{K}.input_scale"),
        ),
        f"{K} is plain bfloat16, and not excluded",
    ),
    "excluded and quantized": (describe(exclude_modules=["lm_head", f"{K}*"]), "though it is excluded"),
    "two descriptions": (describe(quant_algo="NVFP4"), "its config.json says FP8"),
}


@pytest.mark.parametrize("damage, said", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(damage: Callable[[Path], None], said: str, twins: dict[str, Twin], tmp_path: Path) -> None:
    path = shutil.copytree(twins["fp8"].path, tmp_path / "twin")
    damage(path)
    assert said in refused(path, "--to", "hf", "-o", tmp_path / "out")
    assert "problem" in json.loads(command("inspect", path, "--json").stdout)


def test_an_unknown_algorithm_is_refused_by_name(twins: dict[str, Twin], tmp_path: Path) -> None:
    path = shutil.copytree(twins["fp8"].path, tmp_path / "twin")
    describe(quant_algo="W4A8_AWQ")(path)
    assert "W4A8_AWQ" in refused(path, "--to", "hf", "-o", tmp_path / "out")


def test_a_plain_linear_that_is_excluded_is_passed_on(twins: dict[str, Twin], tmp_path: Path) -> None:
    path = shutil.copytree(twins["fp8"].path, tmp_path / "twin")
    DAMAGE["a plain weight"][0](path)
    describe(exclude_modules=["lm_head", K])(path)
    out = converted(path, "hf", tmp_path / "out")
    assert stored_bytes(out / "model.safetensors") == stored_bytes(path / "model.safetensors")
    assert "layers.1.attn.k.weight is not" in refused(path, "--to", "trtllm", "-o", tmp_path / "ranks")
