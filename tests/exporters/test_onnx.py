"""The ONNX target against transformers: the same weights must give the same logits, however they are asked for."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from nemoport.exporters.targets import onnx as target
from nemoport.exporters.tensor import Held, nbytes
from nemoport.spec import (
    Plan,
    tensors,
)

from .onnx_models import (
    CASES,
    LENGTH,
    SIZES,
    VOCAB,
    Array,
    Case,
    Exported,
    Runner,
    hf_name,
    model_of,
    run_on_cpu,
    write,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    case: Case = request.param
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        eps = {"rms_norm_eps": case.norm.eps} if case.norm.kind == "rms" else {}
        config = case.config(**SIZES | eps | case.words)
        hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    case.alter(hf)
    for name, parameter in hf.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, mean=float("norm.weight" in name or "layernorm.weight" in name), std=0.2)
    hf.eval()
    state = {name: value.numpy() for name, value in hf.state_dict().items()}
    wanted = tensors(case.spec)
    assert {hf_name(name) for name in wanted} == state.keys() - ({"lm_head.weight"} if case.tied else set())
    model = model_of(case.spec, {name: Held(state[hf_name(name)], "float32") for name in wanted})
    output = target.output(model, Plan())
    return Exported(case, model, output, write(output, tmp_path_factory.mktemp("onnx")), hf)


@pytest.fixture(scope="module")
def ids() -> Array:
    return np.random.default_rng(1).integers(0, VOCAB, (2, LENGTH))


def test_logits_are_those_of_transformers(exported: Exported, ids: Array) -> None:
    np.testing.assert_allclose(exported.runner(2)(ids), exported.truth(ids), rtol=0, atol=1e-4)


def test_decoding_token_by_token_equals_prefill(exported: Exported, ids: Array) -> None:
    whole, step = exported.runner(2)(ids), exported.runner(2)
    steps = [step(ids[:, i : i + 1]) for i in range(LENGTH)]
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, rtol=0, atol=1e-5)


def test_a_prompt_may_come_in_chunks(exported: Exported, ids: Array) -> None:
    whole, chunk = exported.runner(2)(ids), exported.runner(2)
    chunks = [chunk(ids[:, :6]), chunk(ids[:, 6:7]), chunk(ids[:, 7:])]
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_leaves_real_rows_alone(exported: Exported, ids: Array, side: str) -> None:
    short = 9
    alone = exported.runner()(ids[1:, :short])
    real = slice(LENGTH - short, None) if side == "left" else slice(0, short)
    mask = np.ones((2, LENGTH), np.int64)
    padded = np.zeros_like(ids)
    padded[0], padded[1, real] = ids[0], ids[1, :short]
    mask[1] = 0
    mask[1, real] = 1
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    logits = exported.runner(2)(padded, mask, positions)
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[1, real], alone[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits[0], exported.runner()(ids[:1])[0], rtol=0, atol=1e-5)


def test_decoding_goes_on_after_left_padding(exported: Exported, ids: Array) -> None:
    missing = 4
    alone = exported.runner()(ids[:1, missing:])
    mask, step = np.ones((1, LENGTH), np.int64), exported.runner()
    mask[0, :missing] = 0
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    step(ids[:1, :8], mask[:, :8], positions[:, :8])
    last = [step(ids[:1, i : i + 1], mask[:, : i + 1], positions[:, i : i + 1]) for i in range(8, LENGTH)]
    np.testing.assert_allclose(np.concatenate(last, axis=1), alone[:, 8 - missing :], rtol=0, atol=1e-5)


def test_float16_is_as_close_as_its_format(exported: Exported, ids: Array, tmp_path: Path) -> None:
    path = write(target.output(exported.model, Plan(dtype="float16")), tmp_path)
    truth = exported.truth(ids)
    logits = Runner(path, exported.case.spec, 2, "float16")(ids)
    assert np.linalg.norm(logits - truth) < 8 * 2**-11 * np.linalg.norm(truth)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_graph_passes_the_checker_and_strict_shape_inference(exported: Exported, dtype: str, tmp_path: Path) -> None:
    output = target.output(exported.model, Plan(dtype=dtype))
    path = write(output, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
    known = {value.name: value.type.tensor_type for value in inferred.graph.value_info}
    assert {name for node in inferred.graph.node for name in node.output} <= known.keys() | {
        value.name for value in inferred.graph.output
    }
    assert output.dtype == dtype
    cache = onnx.load(path).graph.input[3].type.tensor_type.elem_type
    assert cache == {"float32": 1, "float16": 10, "bfloat16": 16}[dtype]


def test_graph_stays_within_what_tensorrt_takes(exported: Exported) -> None:
    graph = onnx.load_from_string(exported.output.sidecars[target.GRAPH]).graph
    assert not {node.domain for node in graph.node} - {""}
    for node in graph.node:
        if node.op_type == "Attention":
            assert (len(node.input), len(node.output)) == (4, 1)
            assert not node.attribute
    scalars = [tensor.name for tensor in graph.initializer if tensor.name.startswith("int.")]
    assert scalars
    assert all(not tensor.dims for tensor in graph.initializer if tensor.name in scalars)


def test_signature_is_that_of_the_session(exported: Exported) -> None:
    session, signature = run_on_cpu(exported.path), exported.output.signature
    assert signature is not None
    kinds = {"tensor(int64)": "int64", "tensor(float)": "float32"}
    for ours, theirs in ((signature.inputs, session.get_inputs()), (signature.outputs, session.get_outputs())):
        assert [(t.name, t.dtype, t.shape) for t in ours] == [(t.name, kinds[t.type], tuple(t.shape)) for t in theirs]


def test_every_canonical_tensor_is_stored_once_and_used(exported: Exported) -> None:
    (file,) = exported.output.files
    stored = [part for slot in file.slots for part in slot.parts]
    assert stored == list(tensors(exported.case.spec))
    graph = onnx.load_from_string(exported.output.sidecars[target.GRAPH]).graph
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used


def test_slots_lie_where_the_graph_says(exported: Exported) -> None:
    (file,) = exported.output.files
    graph = onnx.load_from_string(exported.output.sidecars[target.GRAPH]).graph
    said = {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    end = 0
    for slot, offset in zip(file.slots, file.offsets, strict=True):
        assert offset >= end
        assert offset % 64 == 0
        end = offset + nbytes(slot.tensor)
        assert said[slot.name] == {"location": file.path, "offset": str(offset), "length": str(nbytes(slot.tensor))}


def test_same_model_same_bytes(exported: Exported) -> None:
    again = target.output(exported.model, Plan())
    assert again.sidecars == exported.output.sidecars
