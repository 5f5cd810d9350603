"""What a config says of a session changes the session, as in Triton's onnxruntime backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from families.test_transformers import CASES, VOCAB, save
from google.protobuf import text_format
from ml_dtypes import bfloat16
from onnx import TensorProto

from nemoport.errors import DamagedInput
from nemoport.exporters import convert, stream
from nemoport.runner.backends.onnxruntime import load
from nemoport.runner.instances import Placement
from nemoport.runner.model import load_version
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import request_of
from nemoport.runner.session_options import session_options
from nemoport.spec import Plan

from .models import WEIGHT, identity, linear, write_model

ON_CPU = Placement(None, 1)
SHRINKAGE = "memory.enable_memory_arena_shrinkage"
X = np.arange(8, dtype=np.float32).reshape(2, 4)


def config(text: str) -> ModelConfig:
    return text_format.Parse(f'name: "m" backend: "onnxruntime" {text}', ModelConfig())


def parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'


def made(tmp_path: Path, text: str) -> Any:
    """The options of the session that onnxruntime made."""
    model = write_model(tmp_path, "m", linear())
    said = config(f'default_model_filename: "model.onnx" {text}')
    session = load(model / "1", said, ON_CPU, complete=True)
    np.testing.assert_array_equal(session.execute({"X": X}, ["Y"])[0], X @ WEIGHT)
    return session._session.get_session_options()


@pytest.mark.parametrize(
    "text, attribute, value",
    [
        ("", "execution_mode", ort.ExecutionMode.ORT_SEQUENTIAL),
        (parameter("execution_mode", "0"), "execution_mode", ort.ExecutionMode.ORT_SEQUENTIAL),
        (parameter("execution_mode", "1"), "execution_mode", ort.ExecutionMode.ORT_PARALLEL),
        (parameter("intra_op_thread_count", "3"), "intra_op_num_threads", 3),
        (parameter("inter_op_thread_count", "2"), "inter_op_num_threads", 2),
        (parameter("intra_op_thread_count", "0"), "intra_op_num_threads", 0),
        (parameter("intra_op_thread_count", "-1"), "intra_op_num_threads", 0),
        ("", "enable_cpu_mem_arena", True),
        (parameter("enable_mem_arena", "0"), "enable_cpu_mem_arena", False),
        (parameter("enable_mem_arena", "True"), "enable_cpu_mem_arena", True),
        ("", "enable_mem_reuse", False),
        ("", "enable_mem_pattern", True),
        (parameter("enable_mem_pattern", "off"), "enable_mem_pattern", False),
        ("", "graph_optimization_level", ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
        ("optimization {}", "graph_optimization_level", ort.GraphOptimizationLevel.ORT_ENABLE_ALL),
        *(
            (f"optimization {{ graph {{ level: {level} }} }}", "graph_optimization_level", value)
            for level, value in {
                -1: ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
                1: ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
                2: ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
                3: ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
            }.items()
        ),
    ],
)
def test_a_parameter_is_an_option_of_the_session(tmp_path: Path, text: str, attribute: str, value: object) -> None:
    assert getattr(made(tmp_path, text), attribute) == value


@pytest.mark.parametrize("family", ["mixtral", "nemotron h, experts"])
def test_a_decoder_of_experts_answers_the_same_whether_or_not_buffers_are_planned(tmp_path: Path, family: str) -> None:
    save(CASES[family], tmp_path / "model")
    stream.run(convert.plan(tmp_path / "model", "onnx", tmp_path / "m/1", plan=Plan(dtype="float32")))
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_mem_reuse = 1, True
    planned = ort.InferenceSession(tmp_path / "m/1/model.onnx", options, providers=["CPUExecutionProvider"])
    said = config('default_model_filename: "model.onnx" ' + parameter("intra_op_thread_count", "1"))
    session = load(tmp_path / "m/1", said, ON_CPU, complete=True)
    names, numbers = [node.name for node in planned.get_outputs()], np.random.default_rng(4)
    for sequence, past in ((7, 0), (1, 7), (3, 8)):
        sizes = {"batch": 3, "sequence": sequence, "past": past, "total": past + sequence}
        shapes = {node.name: [sizes.get(dim, dim) for dim in node.shape] for node in planned.get_inputs()}
        feeds: dict[str, np.ndarray] = {
            name: numbers.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()
        }
        feeds |= {name: numbers.integers(0, VOCAB, shapes[name]) for name in ("input_ids", "position_ids")}
        feeds["attention_mask"] = np.ones(shapes["attention_mask"], np.int64)
        for name, one, other in zip(names, session.execute(feeds, names), planned.run(names, feeds), strict=True):
            np.testing.assert_array_equal(one, other, err_msg=name)
    session.close()


def test_an_entry_of_the_session_is_passed_on(tmp_path: Path) -> None:
    name = "session.use_device_allocator_for_initializers"
    assert made(tmp_path, parameter(name, "1")).get_session_config_entry(name) == "1"


def test_other_parameters_mean_nothing() -> None:
    spins = session_options(config(parameter("session.intra_op.allow_spinning", "0")), ON_CPU)
    assert spins == session_options(config(""), ON_CPU)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("execution_mode", "2", "Expected values for  execution_mode are 0 or 1 but got 2 ."),
        ("execution_mode", "parallel", "failed to convert 'parallel' to integral number"),
        ("intra_op_thread_count", "", "failed to convert '' to integral number"),
        ("inter_op_thread_count", "2.5", "failed to convert '2.5' to integral number"),
        ("enable_mem_arena", "2", "failed to convert '2' to boolean"),
        ("enable_mem_pattern", "", "failed to convert '' to boolean"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_the_words_of_triton(name: str, value: str, message: str) -> None:
    with pytest.raises(DamagedInput, match=f"model 'm' has parameter {name} = '{value}': .*{message}"):
        session_options(config(parameter(name, value)), ON_CPU)


@pytest.mark.parametrize("elem_type, dtype", [(TensorProto.FLOAT, np.float32), (TensorProto.BFLOAT16, bfloat16)])
def test_arenas_shrink_after_every_run(tmp_path: Path, elem_type: int, dtype: Any) -> None:
    """ONNX Runtime refuses a run that is told to shrink an arena that is not there, which shows that it was told."""
    graph, request = identity(elem_type, ("batch", 3)), request_of({"X": np.ones((2, 3), dtype)})
    shrinks = load_version(write_model(tmp_path / "here", "m", graph, parameter(SHRINKAGE, "cpu:0")), "1")
    for _ in range(2):
        assert shrinks.infer(request).arrays()["Y"].tolist() == [[1] * 3] * 2
    absent = load_version(write_model(tmp_path / "absent", "m", graph, parameter(SHRINKAGE, "gpu:7")), "1")
    with pytest.raises(Refusal, match="arena shrink list: gpu:7"):
        absent.infer(request)


def test_a_fallback_to_the_cpu_shrinks_no_arena_of_a_gpu() -> None:
    asks = config(parameter(SHRINKAGE, "cpu:0;gpu:0"))
    fell_back = Placement(None, 1, fell_back=True)
    assert session_options(asks, ON_CPU).run_entries == {SHRINKAGE: "cpu:0;gpu:0"}
    assert session_options(asks, ON_CPU).notes == ()
    assert session_options(asks, fell_back).run_entries == {SHRINKAGE: "cpu:0"}
    (note,) = session_options(asks, fell_back).notes
    assert f"{SHRINKAGE}: cpu:0;gpu:0, without the GPUs" in note
    assert session_options(config(parameter(SHRINKAGE, "gpu:0")), fell_back).run_entries == {}


def test_libraries_of_operations_are_not_loaded_and_noted() -> None:
    (note,) = session_options(config('model_operations { op_library_filename: "ops.so" }'), ON_CPU).notes
    assert note.startswith("model_operations: ")
