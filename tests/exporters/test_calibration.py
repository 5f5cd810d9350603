"""Calibration on the reference gives what ModelOpt's calibration on transformers' model gives, bit for bit.

So it does with the kernels for AVX2 and for AVX-512; other processors round bfloat16 elsewhere, transformers as we."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemoport import calibration
from nemoport.exporters import source, statistics
from nemoport.exporters.statistics import Statistics

from .commands import command
from .quantizing import EXPORTS, JUDGE, digests, digests_of, quantized

ALL = ("amax", "mean", "losses", "keys", "values")
ENDS = ("transformer.vocab_embedding.weight", "lm_head.weight")
"""Of rank files: cut and padded by ModelOpt's own choice."""
SKIPPED = (*ENDS, ".k_cache_scaling_factor", ".v_cache_scaling_factor")
"""And scales that are taken together into `kv_cache_scaling_factor`, the one that TensorRT-LLM reads."""
FIXTURES = os.environ.get("NEMOPORT_FIXTURES")


@cache
def calibrated() -> Statistics:
    """All there is to know of the judge's activations."""
    found = calibration.from_tokens(JUDGE / "tokens.npz", JUDGE, None, calibration.Limits())
    return found.statistics(source.model(JUDGE), ALL)


def test_activations_are_those_of_transformers() -> None:
    theirs, _ = statistics.read(JUDGE / "statistics.npz")
    found = [name for name in calibrated().arrays if name.endswith(("/amax", "/mean"))]
    assert len(found) == 8
    for name in found:
        np.testing.assert_array_equal(calibrated().arrays[name], theirs.arrays[name], err_msg=name)


def test_the_search_of_awq_sees_the_costs_that_modelopt_sees() -> None:
    """ModelOpt's are of outputs that were rounded to bfloat16; the choice is the same."""
    assert len(EXPORTS["losses"]) == 7
    for linear, theirs in EXPORTS["losses"].items():
        ours = calibrated().of(linear, "losses")
        np.testing.assert_allclose(ours, theirs, rtol=3e-3, err_msg=linear)
        assert ours.argmin() == np.argmin(theirs), linear


@pytest.mark.parametrize("export", [name for name in EXPORTS if name != "losses"])
def test_exports_of_our_own_calibration_are_modelopts(export: str, tmp_path: Path) -> None:
    (tmp_path / statistics.FILE).write_bytes(statistics.to_bytes(calibrated()))
    (to, method, *kv_cache), wanted = export.split(), EXPORTS[export]
    kv: dict[str, Any] = {"kv_cache": "fp8"} if kv_cache else {}
    out = quantized(JUDGE, to, tmp_path / "out", method, stats=tmp_path, tp=wanted.get("tp", 1), **kv)
    files = ["model.safetensors"] if to == "hf" else [f"rank{rank}.safetensors" for rank in range(wanted["tp"])]
    for file, theirs in zip(files, wanted.get("ranks", [wanted.get("tensors")]), strict=True):
        skipped = SKIPPED if to == "trtllm" else ()
        ours, theirs = (
            {name: row for name, row in rows.items() if not name.endswith(skipped)}
            for rows in (digests(out / file), digests_of(theirs))
        )
        assert ours == theirs
    if to == "trtllm":
        said = json.loads((out / "config.json").read_text())["quantization"]
        assert {key: said[key] for key in wanted["quantization"]} == wanted["quantization"]


LARGE = {
    "hf_fp8": ("hf", "fp8", 1),
    "hf_nvfp4": ("hf", "nvfp4", 1),
    "hf_int4_awq": ("hf", "int4_awq", 1),
    "mo_fp8_t2p1": ("trtllm", "fp8", 2),
    "mo_int4_awq_t1p1": ("trtllm", "int4_awq", 1),
}


@pytest.mark.skipif(FIXTURES is None, reason="NEMOPORT_FIXTURES names no folder")
@pytest.mark.parametrize("name", LARGE)
def test_a_larger_model_too_is_exported_as_modelopt_exports_it(name: str, tmp_path: Path) -> None:
    """AWQ only where bfloat16 is multiplied as it was for ModelOpt, with AVX512_BF16: elsewhere activations are a step
    apart, and of exponents whose costs differ by 0.1 % another is the least."""
    (to, method, tp), at = LARGE[name], Path(FIXTURES or "") / "trtllm"
    result = command(
        "convert", at / "hf/mo_llama", "--to", to, "-o", tmp_path / "out", "--tp", tp, "--quantize", method,
        "--calib", at / "hf/mo_llama.calibration.npz",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for path in sorted((at / "ckpt" / name).glob("*.safetensors")):
        ours, theirs = load_file(tmp_path / "out" / path.name), load_file(path)
        assert set(ours) == set(theirs)
        for tensor, wanted in theirs.items():
            if to == "hf" or tensor not in ENDS:
                same(ours[tensor], wanted, tensor)


def same(ours: Tensor, theirs: Tensor, name: str) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
    assert torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)), name


def test_batches_change_means_and_nothing_else() -> None:
    """And are part of what an artifact says it was calibrated on."""
    at = JUDGE / "tokens.npz"
    found = calibration.from_tokens(at, JUDGE, None, calibration.Limits(batch=8))
    assert found.digest != calibration.from_tokens(at, JUDGE, None, calibration.Limits()).digest
    once: dict[str, Any] = dict(found.statistics(source.model(JUDGE), ("amax", "mean", "keys")).arrays)
    for name, array in once.items():
        other = calibrated().arrays[name]
        assert np.array_equal(array, other) != name.endswith("/mean"), name
        np.testing.assert_allclose(array, other, rtol=2**-7)
