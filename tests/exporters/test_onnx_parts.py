"""Parts of an ONNX graph alone: masks, tables of cosines, casts, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from nemoport.errors import UnsupportedInput, UsageError
from nemoport.exporters.checkpoint import Output
from nemoport.exporters.dtypes import words
from nemoport.exporters.rope import tables
from nemoport.exporters.targets import onnx as target
from nemoport.exporters.tensor import cut, read
from nemoport.spec import (
    Block,
    Dense,
    LinearScaling,
    Llama3Scaling,
    Plan,
    Rope,
)

from .onnx_models import (
    ATTENTION,
    CASES,
    FFN,
    HEAD_DIM,
    LLAMA3,
    Array,
    rope,
    zeros,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers


def mask_of(output: Output, name: str, ids: Array, mask: Array) -> Array:
    """One mask of a graph, run alone."""
    model = onnx.load_from_string(output.sidecars[target.GRAPH])
    nodes = [node for node in model.graph.node if node.name.startswith("mask.")]
    constants = [tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT64]
    result = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, None)
    alone = onnx.helper.make_graph(nodes, "mask", list(model.graph.input[:2]), [result], constants)
    alone = onnx.helper.make_model(alone, ir_version=model.ir_version, opset_imports=model.opset_import)
    session = onnxruntime.InferenceSession(alone.SerializeToString(), providers=["CPUExecutionProvider"])
    seen: Array = session.run([name], {"input_ids": ids, "attention_mask": mask})[0]
    return seen


@pytest.mark.parametrize("past", [0, 3])
@pytest.mark.parametrize("window", [None, 2])
def test_a_query_sees_real_keys_up_to_its_own_and_never_nothing(past: int, window: int | None) -> None:
    spec = replace(
        CASES["llama"].spec, blocks=(Block(mixer=replace(ATTENTION, window=window), ffn=Dense(intermediate=4)),)
    )
    output = target.output(zeros(spec, "float32"), Plan())
    new, total = 4, past + 4
    mask = np.ones((2, total), np.int64)
    mask[0, :2], mask[1, -1:] = 0, 0
    seen = mask_of(output, "mask.causal" if window is None else f"mask.window_{window}", mask[:, past:], mask)
    assert seen.shape == (2, 1, new, total)
    for b, s, t in np.ndindex(2, new, total):
        own = past + s
        near = window is None or t > own - window
        assert seen[b, 0, s, t] == (t == own or (t < own and near and bool(mask[b, t])))


def test_each_distinct_rope_has_its_tables() -> None:
    local = replace(ATTENTION, rope=Rope(dims=HEAD_DIM, base=1e6))
    mixers = (ATTENTION, local, replace(ATTENTION, rope=None), ATTENTION)
    blocks = tuple(Block(mixer=mixer, ffn=Dense(intermediate=FFN)) for mixer in mixers)
    output = target.output(zeros(replace(CASES["llama"].spec, blocks=blocks), "float32"), Plan())
    computed = [slot.name for slot in output.files[0].slots if not slot.parts]
    assert computed == ["rope.0.cos", "rope.0.sin", "rope.1.cos", "rope.1.sin"]
    graph = onnx.load_from_string(output.sidecars[target.GRAPH]).graph
    used = [node.input[1] for node in graph.node if node.op_type == "RotaryEmbedding"]
    assert used == ["rope.0.cos"] * 2 + ["rope.1.cos"] * 2 + ["rope.0.cos"] * 2


def test_plan_casts_and_the_ledger_says_so() -> None:
    output = target.output(zeros(CASES["llama"].spec, "float32"), Plan(dtype="float16"))
    weights = [slot for slot in output.files[0].slots if slot.parts]
    assert {(slot.tensor.dtype, slot.transform) for slot in weights} == {("float16", "cast to float16")}
    kept = target.output(zeros(CASES["llama"].spec, "bfloat16"), Plan())
    assert kept.dtype == "bfloat16"
    assert {slot.transform for slot in kept.files[0].slots if slot.parts} == {""}


@pytest.mark.parametrize("scaling", [None, "llama3", "linear"])
def test_angles_are_those_of_transformers_up_to_long_contexts(scaling: str | None) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions, dims = 131072, 64
    words_of = {"llama3": LLAMA3 | {"original_max_position_embeddings": 8192}, "linear": {"factor": 4.0}, None: {}}
    config = transformers.LlamaConfig(
        head_dim=dims, max_position_embeddings=positions, **rope(scaling or "default", 5e5, **words_of[scaling])
    )
    asked = np.concatenate([np.arange(300), np.arange(positions - 300, positions)])
    theirs = [
        turn[0, :, : dims // 2].numpy()
        for turn in LlamaRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(asked)[None])
    ]
    scalings = {"llama3": Llama3Scaling(), "linear": LinearScaling(factor=4.0), None: None}
    ours = tables(Rope(dims=dims, base=5e5, scaling=scalings[scaling]), positions)
    for table, turn in zip(ours, theirs, strict=True):
        near: Array = read(cut(table, 0, 0, 300))
        far: Array = read(cut(table, 0, positions - 300, positions))
        np.testing.assert_allclose(near, turn[:300], rtol=0, atol=1e-4)
        # One float32 rounding of the fastest frequencies is worth this much so far out.
        np.testing.assert_allclose(far, turn[300:], rtol=0, atol=2e-2)


def test_a_cut_of_a_table_is_a_part_of_it() -> None:
    cosines, _ = tables(Rope(dims=HEAD_DIM), 5000)
    whole = read(cosines)
    np.testing.assert_array_equal(read(cut(cut(cut(cosines, 0, 10, 4900), 0, 7, 4500), 1, 1, 4)), whole[17:4510, 1:4])
    out = np.empty(cosines.shape, words("float32"))
    cosines.fill(out)
    np.testing.assert_array_equal(out.view(np.float32), whole)


def test_tensor_parallel_is_refused_with_a_pointer() -> None:
    with pytest.raises(UsageError, match="--to trtllm"):
        target.output(zeros(CASES["llama"].spec, "float32"), Plan(tp=2))


def test_a_dtype_without_graph_is_refused() -> None:
    with pytest.raises(UnsupportedInput, match="--dtype float32"):
        target.output(zeros(CASES["llama"].spec, "float64"), Plan())
