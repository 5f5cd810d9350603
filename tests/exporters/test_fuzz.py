"""Whatever the files say, the answer is a model or one of our own errors, and quickly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nemoport.errors import DamagedInput, NemoportError
from nemoport.exporters import source
from nemoport.exporters.formats.unpickle import unpickle

from .fixtures import HUGGINGFACE, LLAMA, LLAMA_GQA, Fixture

SOAK = "NEMOPORT_SOAK_ROUNDS" in os.environ
CASES = int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "1")) * 200
ROOT = Path(__file__).parents[2]
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
def test_a_damaged_checkpoint_is_converted_or_refused(tmp_path: Path) -> None:
    """In a process of its own, which ends at the first case that goes wrong; `fuzzing.py` says what that is."""
    seed = os.environ.get("NEMOPORT_FUZZ_SEED") or (str(time.time_ns()) if SOAK else "1")
    arguments = [sys.executable, "-W", "error", "-m", "tests.exporters.fuzzing", seed]
    ended = subprocess.run(
        [*arguments, "0", str(CASES), str(tmp_path / "work")], cwd=ROOT, capture_output=True, text=True
    )
    cases = [json.loads(line) for line in ended.stdout.splitlines()]
    again = f"python -m tests.exporters.fuzzing {seed} {len(cases)} 1 DIRECTORY"
    assert ended.returncode == 0, f"seed {seed}, case {len(cases)}; again alone: {again}\n{ended.stderr}"
    outcomes = Counter(case["outcome"] for case in cases)
    assert len(cases) == CASES
    assert outcomes["equal"] > CASES / 10, f"seed {seed}: {outcomes}"
    assert outcomes["refused 3"] > CASES / 10, f"seed {seed}: {outcomes}"


@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "hidden_size", "num_attention_heads", "head_dim"])
def test_an_enormous_number_costs_no_time(key: str) -> None:
    for number in (10**6, 10**9, 10**15):
        began = time.monotonic()
        with pytest.raises(NemoportError):
            source.model(LLAMA_GQA, {key: number})
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("content", [b"\x80\x02]r\xff\xff\xff\x7f.", b"(lp2000000000\n."], ids=["binary", "text"])
def test_a_pickle_that_numbers_too_many_objects_is_refused_before_room_is_made(content: bytes) -> None:
    """Python's unpickler makes an array up to that number, and fills it."""
    began = time.monotonic()
    with pytest.raises(DamagedInput, match="more objects than it can hold"):
        unpickle(content, "it")
    assert time.monotonic() - began < 1


def _model(path: Path, config: Any, what: str) -> None:
    said = ""
    try:
        source.model(path, config)
    except NemoportError as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"{what} gives {error!r}") from error
    assert "\n" not in said, what
