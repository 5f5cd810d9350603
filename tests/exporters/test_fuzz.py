"""Whatever the files say, the answer is a model or one of our own errors, and quickly."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from nemoport.errors import NemoportError
from nemoport.exporters import source

from .fixtures import HUGGINGFACE, LLAMA, LLAMA_GQA, Fixture

ROUNDS = int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "4")) * 10
ODD: tuple[Any, ...] = (
    None,
    "",
    "x",
    -1,
    0,
    1.5,
    True,
    [],
    [1],
    [-1, 0],
    [3, 0, 1],
    {},
    {"a": 1},
    float("inf"),
    float("nan"),
    2**70,
    -(2**31),
)
FILES = {
    "index": (LLAMA["torch_dist"], ".metadata"),
    "arguments": (LLAMA["megatron_lm"], "common.pt"),
    "run config": (LLAMA["megatron_bridge"], "run_config.yaml"),
    "model config": (LLAMA["nemo2"], "model.yaml"),
    "tokenizer": (LLAMA["nemo2"], "tokenizer.json"),
    "safetensors": (LLAMA["huggingface"], "model.safetensors"),
    "config": (LLAMA["huggingface"], "config.json"),
    "zarr": (LLAMA["zarr"], "model.decoder.layers.mlp.linear_fc1.weight/.zarray"),
    "torch_dcp": (LLAMA["torch_dcp"], ".metadata"),
    "shard": (LLAMA["nemo_automodel"], "shard-00002-model-00001-of-00001.safetensors"),
}
MORE_MEGATRON = ("window_size", "seq_len_interpolation_factor", "rope_scaling", "rope_scaling_factor", "qk_layernorm")
MORE_HUGGINGFACE = ("rope_parameters", "sliding_window", "quantization_config")


@pytest.mark.parametrize("value", ODD, ids=repr)
@pytest.mark.parametrize("fixture", [LLAMA["torch_dist"], LLAMA["huggingface"]], ids=["megatron", "huggingface"])
def test_a_config_with_an_odd_value_is_read_or_refused(fixture: Fixture, value: object) -> None:
    config: dict[str, Any] = {**source.checkpoint(fixture.path, fixture.config).config}
    more = MORE_HUGGINGFACE if fixture.format == "huggingface" else MORE_MEGATRON
    for key in (*config, *more):
        _model(fixture.path, config | {key: value}, f"{key}={value!r}")


@pytest.mark.parametrize("value", ODD, ids=repr)
def test_a_rope_with_an_odd_value_is_read_or_refused(value: object) -> None:
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 64}
    for rope in (llama3, {"rope_type": "linear", "factor": 2.0}):
        for key in rope:
            _model(HUGGINGFACE, {"rope_scaling": rope | {key: value}}, f"{key}={value!r}")
            _model(HUGGINGFACE, {"rope_scaling": {k: v for k, v in rope.items() if k != key}}, f"no {key}")
    megatron = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 64}
    for key in megatron:
        words = {**(LLAMA["torch_dist"].config or {}), **megatron, key: value}
        _model(LLAMA["torch_dist"].path, words, f"{key}={value!r}")


@pytest.mark.soak
@pytest.mark.parametrize("what", FILES)
def test_a_file_with_bytes_changed_is_read_or_refused(what: str, tmp_path: Path) -> None:
    fixture, name = FILES[what]
    copy = Path(shutil.copytree(fixture.path, tmp_path / "copy"))
    (path,) = copy.rglob(name)
    before = path.read_bytes()
    part = min(len(before), 8192)  # of a file of tensors, the header
    bits = random.Random(what)
    for _ in range(ROUNDS):
        damaged = bytearray(before)
        for _ in range(bits.choice((1, 1, 2, 8))):
            at = bits.randrange(min(part, len(damaged)))
            match bits.randrange(4):
                case 0:
                    damaged[at] ^= 1 << bits.randrange(8)
                case 1:
                    damaged[at] = bits.randrange(256)
                case 2:
                    del damaged[at : at + bits.randrange(1, 16)]
                case 3:
                    damaged[at:at] = bits.randbytes(bits.randrange(1, 8))
        path.write_bytes(damaged)
        _model(copy, fixture.config, f"{len(damaged)} bytes of {name}")


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "head_dim"])
def test_an_enormous_number_costs_no_time(key: str) -> None:
    for number in (10**6, 10**9, 10**15):
        began = time.monotonic()
        with pytest.raises(NemoportError):
            source.model(LLAMA_GQA, {key: number})
        assert time.monotonic() - began < 2


def _model(path: Path, config: Any, what: str) -> None:
    said = ""
    try:
        source.model(path, config)
    except NemoportError as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"{what} gives {error!r}") from error
    assert "\n" not in said, what
