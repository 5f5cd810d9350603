"""What loaders expect of a quantized directory: nothing is found in what is written here, and every mutant of it is
found with its sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemoport.check import Request, check
from nemoport.exporters import contract

from .commands import command
from .test_compressed_tensors import CT, METHODS, SOURCE, made

Q = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, Tensor]
Said = dict[str, Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    at = tmp_path_factory.mktemp("written")
    found = {(method, dialect): made(method, dialect, at) for method in METHODS for dialect in ("modelopt", CT)}
    cached = at / "cached"
    said = ("--quantize", "fp8", "--kv-cache", "fp8", "--calib", SOURCE / "tokens.npz")
    assert command("convert", SOURCE, "--to", "hf", "-o", cached, *said).exit_code == 0
    other = at / "cached-ct"
    assert command("convert", cached, "--to", "hf", "-o", other, "--dialect", CT).exit_code == 0
    return found | {("fp8 kv", "modelopt"): cached, ("fp8 kv", CT): other}


def test_nothing_is_found_in_what_is_written(written: dict[tuple[str, str], Path]) -> None:
    for case, path in written.items():
        assert contract.is_quantized(path), case
        assert contract.breaches(path) == (), case
        assert not [each for each in check(Request(directory=path)).findings if each.code == "NP904"], case
    assert not contract.is_quantized(SOURCE)


def reciprocal(suffix: str) -> Callable[[Tensors, Said], None]:
    def edit(tensors: Tensors, config: Said) -> None:
        for name in [name for name in tensors if name.endswith(suffix)]:
            tensors[name] = (1 / tensors[name].float()).to(tensors[name].dtype)

    return edit


def without(name: str) -> Callable[[Tensors, Said], object]:
    return lambda tensors, config: tensors.pop(name)


def cast(name: str, dtype: torch.dtype) -> Callable[[Tensors, Said], None]:
    def edit(tensors: Tensors, config: Said) -> None:
        tensors[name] = tensors[name].float().to(dtype)

    return edit


def times(name: str, by: float) -> Callable[[Tensors, Said], None]:
    def edit(tensors: Tensors, config: Said) -> None:
        tensors[name] = tensors[name] * by

    return edit


def renamed(old: str, new: str) -> Callable[[Tensors, Said], None]:
    def edit(tensors: Tensors, config: Said) -> None:
        tensors[new] = tensors.pop(old)

    return edit


def tied_head(tensors: Tensors, config: Said) -> None:
    config["tie_word_embeddings"] = True
    scales = {name.removeprefix(f"{Q}."): tensor for name, tensor in tensors.items() if name.startswith(f"{Q}.")}
    tensors["lm_head.weight"] = torch.zeros(67, 256, dtype=torch.float8_e4m3fn)
    tensors["lm_head.weight_scale"], tensors["lm_head.input_scale"] = scales["weight_scale"], scales["input_scale"]


def listed(tensors: Tensors, config: Said) -> None:
    config["quantization_config"]["ignore"].append("model.layers.0.self_attn.q_proj")


def unlisted(tensors: Tensors, config: Said) -> None:
    """A linear made plain behind the description's back."""
    for name in [name for name in tensors if name.startswith(f"{Q}.")]:
        del tensors[name]
    tensors[f"{Q}.weight"] = torch.zeros(256, 256, dtype=torch.bfloat16)


V = "model.layers.0.self_attn.v_proj.v_scale"
MUTANTS: dict[str, tuple[tuple[str, str], Callable[[Tensors, Said], object], str]] = {
    **{
        f"reciprocal, {method}, {dialect}": ((method, dialect), reciprocal(suffix), "as if it were turned over")
        for method, dialect, suffix in (
            ("fp8", "modelopt", ".weight_scale"),
            ("fp8_dynamic", CT, ".weight_scale"),
            ("fp8_block", "modelopt", ".weight_scale"),
            ("int8", CT, ".weight_scale"),
            ("int4", "modelopt", ".weight_scale"),
            ("int4_awq", CT, ".weight_scale"),
            ("nvfp4", "modelopt", ".weight_scale_2"),
            ("nvfp4", CT, ".weight_global_scale"),
        )
    },
    "no scale": (("fp8", "modelopt"), without(f"{Q}.weight_scale"), f"{Q}.weight_scale is missing"),
    "no scale, packed": (("int4", CT), without(f"{Q}.weight_scale"), f"{Q}.weight_scale is missing"),
    "a scale in another dtype": (
        ("int8", "modelopt"),
        cast(f"{Q}.weight_scale", torch.float16),
        f"{Q}.weight_scale is float16 [256]; needed: float32 [256]",
    ),
    "a weight in another dtype": (
        ("fp8_dynamic", CT),
        cast(f"{Q}.weight", torch.bfloat16),
        f"{Q}.weight is bfloat16 and has scales beside it; needed: float8_e4m3fn",
    ),
    "a quantized head of a tied model": (("fp8", CT), tied_head, "lm_head is quantized, and config.json ties it"),
    "unequal scales of what is fused": (
        ("nvfp4", "modelopt"),
        times(f"{Q}.weight_scale_2", 1.5),
        f"{Q}.weight_scale_2, model.layers.0.self_attn.k_proj.weight_scale_2",
    ),
    "unequal global scales": (("nvfp4", CT), times(f"{Q}.weight_global_scale", 1.5), "weight_global_scale differ"),
    "ignored and quantized": (("fp8", CT), listed, "q_proj is quantized, and quantization_config lists"),
    "plain and not ignored": (("fp8", CT), unlisted, "q_proj is plain bfloat16"),
    "a scale of the cache is missing": (("fp8 kv", "modelopt"), without(V), f"{V} is missing"),
    "a scale of the cache by another name": (
        ("fp8 kv", "modelopt"),
        renamed(V, "model.layers.0.self_attn.v_scale"),
        "model.layers.0.self_attn.v_scale is no name for the scale of a KV cache",
    ),
    "by another name in the other dialect": (
        ("fp8 kv", CT),
        renamed("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.k_proj.k_scale"),
        "model.layers.0.self_attn.k_proj.k_scale is no name for the scale of a KV cache",
    ),
    "a scale of zero": (("fp8", "modelopt"), times(f"{Q}.input_scale", 0), f"{Q}.input_scale is not above zero"),
}


@pytest.mark.parametrize("case, edit, said", MUTANTS.values(), ids=MUTANTS)
def test_every_mutant_is_found_with_its_sentence(
    case: tuple[str, str],
    edit: Callable[[Tensors, Said], object],
    said: str,
    written: dict[tuple[str, str], Path],
    tmp_path: Path,
) -> None:
    path = shutil.copytree(written[case], tmp_path / "mutant")
    (path / "manifest.json").unlink()
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    edit(tensors, config)
    save_file({name: each.clone() for name, each in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    assert any(said in str(each) for each in contract.breaches(path)), contract.breaches(path)
    report = check(Request(directory=path))
    assert not report.passed
    assert "NP904" in {each.code for each in report.findings if said in each.sentence}
    result = command("check", path)
    assert result.exit_code == 1
