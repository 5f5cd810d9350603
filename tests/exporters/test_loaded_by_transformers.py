"""transformers, with compressed-tensors, loads what is written in that dialect and has the same weights."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from ml_dtypes import bfloat16

from nemoport.exporters import source
from nemoport.exporters.dequantized import dequantized
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.tensor import read

from .test_compressed_tensors import CT, METHODS, made

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
NAMES = {"attn": "self_attn", "ffn": "mlp"}
RUN = ("fp8", "fp8_dynamic", "fp8_block", "int8", "int8_sq", "int4", "int4_awq", "nvfp4_weights")


def test_every_method_is_tried() -> None:
    """Of nvfp4 transformers keeps what rounds inputs, which needs a GPU."""
    assert {*RUN, "nvfp4"} == set(METHODS)


@pytest.mark.parametrize("method", RUN)
def test_transformers_has_the_weights_that_the_fields_stand_for(method: str, tmp_path: Path) -> None:
    path = made(method, CT, tmp_path)
    found = source.model(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = transformers.CompressedTensorsConfig(run_compressed=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, quantization_config=config)
    weights = model.state_dict()
    compared = 0
    for name, tensor in found.tensors.items():
        if isinstance(tensor, Encoded):
            _, layer, half, last, _ = name.split(".")
            theirs = weights[f"model.layers.{layer}.{NAMES[half]}.{last}_proj.weight"]
            ours = read(dequantized(tensor)).astype(bfloat16).astype(np.float32)
            np.testing.assert_allclose(theirs.to(torch.float32).numpy(), ours, rtol=2**-7, atol=1e-6, err_msg=name)
            compared += 1
    assert compared == 7 * len(found.spec.blocks)
