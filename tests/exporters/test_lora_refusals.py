"""Adapters that do not fit their base, or that nemoport cannot mean, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nemoport.errors import DamagedInput, InputError, UnsupportedInput, UsageError
from nemoport.exporters import source

from .adapters import (
    WEIGHTS,
    fit,
    megatron_factors,
    merged,
)
from .fixtures import HUGGINGFACE
from .made import SPECS


def test_an_adapter_tensor_that_is_not_used_is_an_error(tmp_path: Path) -> None:
    spec = SPECS["llama"]["plain"]
    factors = megatron_factors(spec)
    factors |= {"decoder.layers.3.mlp.linear_fc2": factors["decoder.layers.2.mlp.linear_fc2"]}
    with pytest.raises(UnsupportedInput, match=r"2 of 26 .* decoder.layers.3.mlp.linear_fc2.adapter.linear_in.weight"):
        fit(tmp_path, factors, {"alpha": 6})


def test_an_adapter_of_another_model_is_an_error(tmp_path: Path) -> None:
    factors = megatron_factors(SPECS["llama"]["plain"])
    with pytest.raises(DamagedInput, match=r"is \[120, 10\], .*linear_qkv.weight of the base \[72, 10\]"):
        fit(tmp_path, factors, {"alpha": 6}, SPECS["llama"]["one group"])


BAD = {
    "no rank of its own": ({"dim": 4, "alpha": 6}, "has rank 3, lora.json says 4"),
    "no alpha": ({"dim": 3}, "does not say the alpha"),
    "alpha in words": ({"alpha": "six"}, "numbers are needed"),
    "another kind": ({"peft": "DoRA", "alpha": 6}, "an adapter of DoRA"),
}


@pytest.mark.parametrize("said, message", BAD.values(), ids=BAD)
def test_a_config_that_cannot_be_meant_is_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fit(tmp_path, megatron_factors(SPECS["llama"]["plain"]), said)


_FC2 = "decoder.layers.0.mlp.linear_fc2"
MORE = {
    "half a pair": (f"{_FC2}.adapter.adapter_down.linear_in.weight", (3, 14), "has no B beside it"),
    "twice": (f"{_FC2}.to_wrap.adapter.linear_in.weight", (3, 14), "the same factor"),
    "magnitudes": (f"{_FC2}.adapter.weight_magnitude", (10,), "of DoRA"),
    "something else": (f"{_FC2}.adapter.gate.weight", (3, 3), "of no LoRA"),
    "a weight of the base": ("decoder.final_layernorm.weight", (10,), "of no LoRA, the first is decoder.final"),
}


@pytest.mark.parametrize("name, shape, message", MORE.values(), ids=MORE)
def test_a_tensor_that_is_no_pair_is_refused(name: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fit(tmp_path, megatron_factors(SPECS["llama"]["plain"]), {"alpha": 6}, more={name: torch.ones(shape)})


PEFT = {
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "of type PROMPT_TUNING"),
    "dora": ({"use_dora": True}, "DoRA"),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, "changes the base"),
    "an expression": ({"rank_pattern": {"(a+)+$": 2}}, "write their names"),
    "no alpha": ({"lora_alpha": None}, "does not say r and lora_alpha"),
    "an alpha beyond numbers": ({"lora_alpha": 1e999}, "does not say r and lora_alpha"),
    "ranks in a list": ({"rank_pattern": [3]}, "does not say r and lora_alpha"),
    "half a pair": ({}, "lora_A.weight has no B"),
}


@pytest.mark.parametrize("said, message", PEFT.values(), ids=PEFT)
def test_what_peft_can_do_and_we_cannot_is_refused_by_name(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | said))
    save_file({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=message):
        source.model(HUGGINGFACE, adapter=tmp_path)


def test_carrying_is_refused_where_there_is_no_place_for_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--to trtllm has no place for an adapter"):
        merged("trtllm", tmp_path / "out", mode="carry")
    with pytest.raises(UsageError, match="--dtype float16 would change the base"):
        merged("hf", tmp_path / "out", mode="carry", dtype="float16")
