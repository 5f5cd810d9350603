"""A family that nemoport does not know: the refusal says what is unknown, and a package supplies it by entry point."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

EXAMPLE = Path(__file__).parents[2] / "examples" / "family"


@pytest.fixture(scope="module")
def unknown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("stablelm")
    config = transformers.StableLmConfig(
        vocab_size=131,
        hidden_size=48,
        intermediate_size=52,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 5e3, "partial_rotary_factor": 0.5},
        use_qkv_bias=True,
    )
    torch.manual_seed(7)
    model = transformers.StableLmForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.1, 0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's package, as pip installs it."""
    directory = tmp_path_factory.mktemp("installed")
    copy = shutil.copytree(EXAMPLE, directory / "source")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check")
    site = directory / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", site, copy], check=True)
    return site


def _convert(model: Path, to: str, out: Path, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    paths = [str(path)] if path else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "nemoport", "convert", model, "--to", to, "-o", out]
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


def test_an_unknown_family_is_refused_with_the_nearest_and_the_unknown_keys(unknown: Path, tmp_path: Path) -> None:
    refused = _convert(unknown, "hf", tmp_path / "out")
    assert refused.returncode == 3
    said = " ".join(refused.stderr.split())
    assert "matches no family; the nearest is" in said
    assert "model_type is 'stablelm'" in said
    assert "does not know" in said
    assert "use_qkv_bias" in said
    assert "dropout" not in said


def test_a_package_supplies_a_family_by_entry_point(unknown: Path, installed: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(3).integers(0, 131, (2, 9))
    with torch.no_grad():
        answers = transformers.StableLmForCausalLM.from_pretrained(unknown)(torch.from_numpy(tokens)).logits.numpy()

    done = _convert(unknown, "hf", tmp_path / "hf", path=installed)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(torch.from_numpy(tokens)).logits
    assert np.array_equal(again.numpy(), answers)

    done = _convert(unknown, "onnx", tmp_path / "onnx", path=installed)
    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(next((tmp_path / "onnx").rglob("*.onnx")))
    whole = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    whole["position_ids"] = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    empty = {
        each.name: np.zeros((2, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past")
    }
    given = {each.name: whole[each.name] for each in session.get_inputs() if each.name in whole} | empty
    logits = session.run(["logits"], given)[0]
    assert np.abs(logits - answers).max() < 1e-4
