"""`--dtype`: the numbers that torch's own cast gives, and an error where they would be lost."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nemoport.exporters.dtypes import words
from nemoport.exporters.tensor import Held, cast, read
from nemoport.spec import DTYPES

from .commands import command, converted, sentence
from .fixtures import HUGGINGFACE, LLAMA
from .made import torch_tensor

WIDE = {"float32": torch.int32, "float16": torch.int16, "bfloat16": torch.int16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fixture", [LLAMA["torch_dist"], LLAMA["huggingface"]], ids=["torch_dist", "huggingface"])
def test_a_model_is_cast_as_torch_casts_it(fixture: object, dtype: str, tmp_path: Path) -> None:
    made = converted(fixture, "hf", tmp_path / "out", dtype=dtype)  # type: ignore[arg-type]
    found, source = load_file(made / "model.safetensors"), load_file(HUGGINGFACE / "model.safetensors")
    assert json.loads((made / "config.json").read_text())["torch_dtype"] == dtype
    assert found.keys() == source.keys()
    for name, tensor in source.items():
        expected = tensor.to(getattr(torch, dtype))
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name].view(WIDE[dtype]), expected.view(WIDE[dtype])), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("source", DTYPES)
def test_any_number_is_cast_as_torch_casts_it(source: str, dtype: str) -> None:
    """Random bits: all exponents, denormals, infinities. Not a number stays so, whichever bits say it."""
    bits = np.frombuffer(np.random.default_rng(2).bytes(400_000), words(source))
    numbers = torch.from_numpy(bits.view(f"i{bits.itemsize}").copy()).view(getattr(torch, source))
    expected = numbers.to(getattr(torch, dtype))
    fits = ~(expected.isinf() & numbers.isfinite())
    found = torch_tensor(cast(Held(bits[fits.numpy()], source), dtype))
    expected = expected[fits]
    assert torch.equal(found.isnan(), expected.isnan())
    kept = ~expected.isnan()
    assert torch.equal(found[kept].view(WIDE[dtype]), expected[kept].view(WIDE[dtype]))


def test_halfway_is_rounded_to_even() -> None:
    halfway = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)
    assert read(cast(Held(halfway, "float32"), "bfloat16")).astype(np.float32).tolist() == [1.0, 1 + 2**-6]


def test_a_value_that_does_not_fit_is_an_error_that_names_it(tmp_path: Path) -> None:
    tensors = load_file(HUGGINGFACE / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = 1e9
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model/model.safetensors")
    (tmp_path / "model/config.json").write_bytes((HUGGINGFACE / "config.json").read_bytes())
    result = command("convert", tmp_path / "model", "--to", "hf", "--dtype", "float16", "-o", tmp_path / "out")
    assert result.exit_code == 3
    said = sentence(result.stderr)
    assert f"{float(tensors['model.layers.2.mlp.up_proj.weight'][3, 5]):g}" in said
    assert "float16" in said
    assert "up_proj" in said, "which of thousands of tensors it is must be told"
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_reshard_keeps_bits_that_are_no_numbers(tmp_path: Path) -> None:
    """Without a cast nothing is computed: NaN payloads and signed zeros stay."""
    tensors = load_file(HUGGINGFACE / "model.safetensors")
    odd = torch.tensor([0x7FC1, -0x8000, 0x7F81, -1], dtype=torch.int16).view(torch.bfloat16)
    tensors["model.norm.weight"][:4] = odd
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model/model.safetensors")
    (tmp_path / "model/config.json").write_bytes((HUGGINGFACE / "config.json").read_bytes())
    made = load_file(converted(tmp_path / "model", "hf", tmp_path / "out") / "model.safetensors")
    assert torch.equal(made["model.norm.weight"][:4].view(torch.int16), odd.view(torch.int16))
