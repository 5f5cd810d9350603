"""YaRN as published models say it, against transformers' frequencies and attention factors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemoport.exporters import rope as onnx
from nemoport.exporters.dialects.rows import scaling_of, to_scaling
from nemoport.reference import rope as reference
from nemoport.spec import Rope, YarnScaling

ORIGINAL = {"original_max_position_embeddings": 4096}
SAID: dict[str, tuple[int, float, dict[str, Any]]] = {
    "DeepSeek V2 Lite": (64, 1e4, {"factor": 40, "beta_fast": 32, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "DeepSeek V3": (64, 1e4, {"factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "Kimi K2": (64, 5e4, {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "GPT-OSS": (64, 1.5e5, {"factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}),
    "Qwen2.5": (128, 1e6, {"factor": 4.0, "original_max_position_embeddings": 32768}),
    "one mscale": (64, 1e4, {"factor": 40, "mscale": 0.5}),
    "the other mscale": (64, 1e4, {"factor": 40, "mscale_all_dim": 0.5}),
    "a factor of attention": (8, 1e4, {"factor": 4, "attention_factor": 1.5, "mscale": 0.5, "mscale_all_dim": 0.7}),
}
"""Dimensions, base, and the rest of `rope_scaling`."""


@pytest.mark.parametrize("name", SAID)
def test_frequencies_and_magnitude_are_those_of_transformers(name: str) -> None:
    dims, base, said = SAID[name]
    words = {"rope_type": "yarn", **ORIGINAL, **said}
    config = transformers.LlamaConfig(head_dim=dims, rope_parameters={"rope_theta": base, **words})
    waves, factor = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    scaling = scaling_of(words)
    assert isinstance(scaling, YarnScaling)
    assert scaling_of(to_scaling(scaling) or {}) == scaling
    rope = Rope(dims=dims, base=base, scaling=scaling)
    np.testing.assert_array_equal(reference.frequencies(rope).numpy(), waves.numpy())
    np.testing.assert_allclose(onnx.frequencies(rope), waves.numpy(), rtol=3e-7)
    np.testing.assert_allclose(rope.magnitude, factor, rtol=1e-12)
