"""What cannot be quantized is refused in a sentence that names it, with the exit code of its kind."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemoport import plugins
from nemoport.exporters.dequantized import QUANTIZERS
from nemoport.exporters.methods import DIALECTS, rows
from nemoport.spec import Dense

from . import made
from .commands import command, sentence
from .fixtures import LLAMA
from .quantizing import JUDGE, METHODS, WIDE, needs, normal, statistics_for

ODD = replace(WIDE, blocks=(replace(WIDE.blocks[0], ffn=Dense(intermediate=200)),))
"""Divides by no group."""


def test_a_description_or_a_flag_without_a_quantized_source_is_refused(tmp_path: Path) -> None:
    said = refused(JUDGE, tmp_path, "--quantize", "int8", "--requantize", code=2)
    assert "is not quantized; leave --requantize out" in said


def refused(path: Path, at: Path, *more: object, code: int, to: str = "hf") -> str:
    result = command("convert", path, "--to", to, "-o", at / "out", *more)
    assert result.exit_code == code, result.output
    assert not (at / "out").exists()
    assert not list(at.glob(".out*")), "nothing is left behind"
    return sentence(result.stderr)


def test_what_the_table_refuses_is_refused_with_its_reason(tmp_path: Path) -> None:
    for row in rows():
        to = DIALECTS[row.dialect][0]
        more = ("--quantize", row.method, *(("--dialect", row.dialect) if to == "hf" else ()))
        if row.refused:
            assert row.refused in refused(JUDGE, tmp_path, *more, to=to, code=3)
        elif row.needs and row.method != "nvfp4":
            assert "with --calib FILE" in refused(JUDGE, tmp_path, *more, to=to, code=2)
    assert "no quantizer is called 'fp9'" in refused(JUDGE, tmp_path, "--quantize", "fp9", code=2)


def changed(edit: Callable[[dict[str, Tensor]], object], at: Path) -> Path:
    path = shutil.copytree(JUDGE, at / "changed")
    stored = load_file(path / "model.safetensors")
    edit(stored)
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    return path


UP = "model.layers.0.mlp.up_proj.weight"


CALIBRATED = {"--calib-stats": JUDGE / "statistics.npz", "--calib": JUDGE / "tokens.npz"}
METHODS_CALIBRATED = [(method, by) for method in METHODS for by in ((*CALIBRATED,) if needs(method, "hf") else ("",))]
every_calibration = pytest.mark.parametrize("method, by", METHODS_CALIBRATED)


def calibrated(by: str) -> tuple[object, ...]:
    return (by, CALIBRATED[by]) if by else ()


@every_calibration
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_no_scale_fits_are_named(method: str, by: str, number: float, tmp_path: Path) -> None:
    def edit(stored: dict[str, Tensor]) -> None:
        stored[UP][37, 5] = number

    found = refused(changed(edit, tmp_path), tmp_path, "--quantize", method, *calibrated(by), code=3)
    assert "layers.0.ffn.up.weight" in found
    assert "not finite" in found


@every_calibration
def test_a_weight_of_zeros_is_named(method: str, by: str, tmp_path: Path) -> None:
    path = changed(lambda stored: stored[UP].zero_(), tmp_path)
    found = refused(path, tmp_path, "--quantize", method, *calibrated(by), code=3)
    assert "layers.0.ffn.up.weight is zero throughout" in found
    assert "--exclude" in found


NORM = "model.layers.0.input_layernorm.weight"


@pytest.mark.parametrize("method", [method for method in METHODS if needs(method, "hf")])
@pytest.mark.parametrize("to", ["hf", "trtllm"])
def test_activations_that_no_scale_fits_are_named(method: str, to: str, tmp_path: Path) -> None:
    """What is not quantized itself may spoil what is."""
    path = changed(lambda stored: stored[NORM].fill_(float("nan")), tmp_path)
    asked = ("--quantize", method, "--calib", JUDGE / "tokens.npz")
    found = refused(path, tmp_path, *asked, to=to, code=3)
    assert re.search(r"among the (amax|losses) of layers\.0\.attn\.q is one that is not finite", found)
    shutil.rmtree(path)
    path = changed(lambda stored: stored[NORM].zero_(), tmp_path)
    if method == "int4_awq":  # has no scale of its input, and weights are rounded whatever it is
        assert command("convert", path, "--to", to, "-o", tmp_path / "out", *asked).exit_code == 0
    else:
        found = refused(path, tmp_path, *asked, to=to, code=3)
        assert "the input of layers.0.attn.q was zero throughout calibration" in found


@pytest.mark.parametrize("method, dialect", [(row.method, row.dialect) for row in rows() if row.loads])
def test_inputs_that_groups_do_not_divide_are_named(method: str, dialect: str, tmp_path: Path) -> None:
    group, to = plugins.load(QUANTIZERS, method).encoding(None).group, DIALECTS[dialect][0]
    path = made.save_huggingface(tmp_path / "model", ODD, normal(ODD))
    stats = ("--calib-stats", statistics_for(ODD, tmp_path / "odd.npz"))
    more = {"hf": ("--dialect", dialect), "onnx": ("--dtype", "float32")}.get(to, ())
    asked = ("--quantize", method, *stats, *more)
    if group:
        found = refused(path, tmp_path, *asked, to=to, code=3)
        assert f"layers.0.ffn.down has 200 inputs, and {method} has scales for groups of {group}" in found
        assert "--exclude layers.0.ffn.down, or use" in found
    else:
        assert command("convert", path, "--to", to, "-o", tmp_path / "out", *asked).exit_code == 0


def _written(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def write(at: Path) -> Path:
        (at / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return at / name

    return write


def _saved(**arrays: Any) -> Callable[[Path], Path]:
    def write(at: Path) -> Path:
        np.savez(at / "ids.npz", **arrays)
        return at / "ids.npz"

    return write


def _half(at: Path) -> Path:
    whole = _saved(tokens=np.zeros((2, 3), np.int64))(at)
    whole.write_bytes(whole.read_bytes()[:-40])
    return whole


def _bare(at: Path) -> Path:
    np.save(at / "ids.npy", np.zeros((2, 3), np.int64))
    return (at / "ids.npy").rename(at / "ids.npz")


BAD_INPUT: dict[str, tuple[Callable[[Path], Path], int, str]] = {
    "no text": (_written("empty.txt", ""), 2, "no token came of it"),
    "blank lines of JSON": (_written("empty.jsonl", "\n\n"), 2, "no token came of it"),
    "no JSON": (_written("bad.jsonl", "{"), 3, "line 1 is no JSON"),
    "no text in the JSON": (_written("bad.jsonl", '{"content": "x"}'), 3, 'line 1 has no "text"'),
    "no UTF-8": (_written("bad.txt", b"\xff\xfe\xfa"), 3, "is no UTF-8 text"),
    "no file": (lambda at: at / "none.txt", 2, "is no file"),
    "no archive": (_written("bad.npz", "x"), 3, "is no .npz file"),
    "half of an archive": (_half, 3, "is no .npz file"),
    "an array by itself": (_bare, 3, "is no .npz file"),
    "no ids": (_saved(tokens=np.zeros((2, 3), np.float32)), 3, "has no `tokens`"),
    "ids beyond the vocabulary": (_saved(tokens=np.full((2, 3), 300)), 2, "outside of the vocabulary"),
}


@pytest.mark.parametrize("write, code, said", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_for_calibration_is_a_sentence(
    write: Callable[[Path], Path], code: int, said: str, tmp_path: Path
) -> None:
    path = LLAMA["nemo2"].path
    assert said in refused(path, tmp_path, "--quantize", "fp8", "--calib", write(tmp_path), code=code)


@pytest.mark.parametrize("write", [_half, _bare, _written("x.npz", "x"), _written("x.npz", "")])
def test_what_is_no_file_of_statistics_is_refused(write: Callable[[Path], Path], tmp_path: Path) -> None:
    asked = ("--quantize", "fp8", "--calib-stats", write(tmp_path))
    assert "is no file of statistics" in refused(JUDGE, tmp_path, *asked, code=3)


def test_other_requests_that_make_no_sense_are_a_sentence(tmp_path: Path) -> None:
    stats = ("--calib-stats", JUDGE / "statistics.npz")
    assert "means no linear of this model" in refused(
        JUDGE, tmp_path, "--quantize", "int8", "--exclude", "*.w1", code=2
    )
    assert "runtimes fuse them" in refused(JUDGE, tmp_path, "--quantize", "int8", "--exclude", "*.q_proj", code=2)
    assert "leaves nothing to quantize" in refused(JUDGE, tmp_path, "--quantize", "int8", "--exclude", "*", code=2)
    assert "go with --quantize METHOD" in refused(JUDGE, tmp_path, "--kv-cache", "fp8", code=2)
    assert "--kv-cache fp8 takes scales" in refused(JUDGE, tmp_path, "--quantize", "int8", "--kv-cache", "fp8", code=2)
    assert "have no keys of layers.0.attn" in refused(
        JUDGE, tmp_path, "--quantize", "int8", "--kv-cache", "fp8", *stats, code=3
    )
    for limit in ("--calib-samples", "--calib-length", "--calib-batch"):
        asked = ("--quantize", "fp8", "--calib", JUDGE / "tokens.npz", limit, 0)
        assert "count from 1 on" in refused(JUDGE, tmp_path, *asked, code=2)
    assert "both say where scales come from" in refused(
        JUDGE, tmp_path, "--quantize", "fp8", "--calib", JUDGE / "tokens.npz", *stats, code=2
    )
    assert "use a smaller tp" in refused(JUDGE, tmp_path, "--quantize", "int4", "--tp", 4, to="trtllm", code=3)
