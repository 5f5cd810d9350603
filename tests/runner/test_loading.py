"""Which models, versions and configs a repository means, and what is refused in them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from nemoport.errors import DamagedInput, InputError, MachineError, NemoportError, UnsupportedInput
from nemoport.runner.backends import find_backend
from nemoport.runner.model import LoadOptions, load_version
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import request_of
from nemoport.runner.server import Server, start

from .models import SIMPLE_CONFIG, WEIGHT, add_sub, graph, identity, linear, write_config, write_model

STRICT = LoadOptions(disable_auto_complete_config=True)


def versions_of(server: Server, name: str) -> list[str]:
    versions: list[str] = server.metadata(name)["versions"]
    return versions


@pytest.mark.parametrize(
    "policy, served",
    [
        ("", ["10"]),
        ("version_policy { latest { num_versions: 2 } }", ["3", "10"]),
        ("version_policy { all {} }", ["0", "2", "3", "10"]),
        ("version_policy { specific { versions: [2, 3] } }", ["2", "3"]),
        ("version_policy { specific { versions: [2, 77] } }", ["2"]),
    ],
)
def test_version_policy_picks_versions_by_number(tmp_path: Path, policy: str, served: list[str]) -> None:
    ignored = ["01", "v1", "staging-11", "1e3", "-4"]
    write_model(tmp_path, "m", linear(), policy, versions=["0", "2", "3", "10", *ignored])
    server = start([tmp_path])
    assert versions_of(server, "m") == served
    assert server.find("m").version == int(served[-1])


@pytest.mark.parametrize("policy", ["version_policy { specific { versions: [4] } }", "version_policy { latest {} }"])
def test_a_policy_that_leaves_no_version_is_an_error(tmp_path: Path, policy: str) -> None:
    write_model(tmp_path, "m", linear(), policy)
    with pytest.raises(DamagedInput, match="at least one version must be available under the version policy of model"):
        start([tmp_path])


def test_models_come_from_every_repository(tmp_path: Path) -> None:
    write_model(tmp_path / "a", "one", linear())
    write_model(tmp_path / "b", "two", linear())
    assert [row["name"] for row in start([tmp_path / "a", tmp_path / "b"]).index()] == ["one", "two"]


def test_a_name_in_two_repositories_is_an_error_of_that_model_only(tmp_path: Path) -> None:
    for repository, name in (("a", "m"), ("b", "m"), ("b", "n")):
        write_model(tmp_path / repository, name, linear())
    server = start([tmp_path / "a", tmp_path / "b"], exit_on_error=False)
    assert "not unique across all model repositories" in server.index()[0]["reason"]
    assert server.find("n").version == 1


def test_a_repository_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere is not a directory"):
        start([tmp_path / "nowhere"])


def test_the_config_may_be_another_file_of_configs(tmp_path: Path) -> None:
    model = write_model(tmp_path, "m", linear(), "max_batch_size: 2", versions=["1", "2"])
    (model / "configs").mkdir()
    (model / "configs/canary.pbtxt").write_text("max_batch_size: 7 version_policy { specific { versions: 1 } }")
    server = start([tmp_path], LoadOptions(model_config_name="canary"))
    assert (server.find("m").config.max_batch_size, versions_of(server, "m")) == (7, ["1"])
    assert start([tmp_path], LoadOptions(model_config_name="absent")).find("m").config.max_batch_size == 2


def test_without_a_config_everything_comes_from_the_model(tmp_path: Path) -> None:
    write_model(tmp_path, "m", linear())
    config = start([tmp_path]).find("m").config_json()
    assert (config["backend"], config["platform"]) == ("onnxruntime", "onnxruntime_onnx")
    assert (config["max_batch_size"], config["dynamic_batching"]["preferred_batch_size"]) == (4, [4])
    assert config["input"][0]["dims"] == [4]
    assert config["output"][0] | {} == {
        "name": "Y",
        "data_type": "TYPE_FP32",
        "dims": [3],
        "label_filename": "",
        "is_shape_tensor": False,
        "is_non_linear_format_io": False,
    }


def test_a_model_with_a_fixed_first_dimension_is_completed_without_batching(tmp_path: Path) -> None:
    write_model(tmp_path, "m", add_sub((3, "n")))
    config = start([tmp_path]).find("m").config_json()
    assert (config["max_batch_size"], config["input"][0]["dims"]) == (0, [3, -1])
    assert "dynamic_batching" not in config


def test_a_partial_config_keeps_what_it_says(tmp_path: Path) -> None:
    write_model(tmp_path, "m", linear(), 'max_batch_size: 9 output { name: "Y" data_type: TYPE_FP32 dims: 3 }')
    config = start([tmp_path]).find("m").config_json()
    assert (config["max_batch_size"], config["dynamic_batching"]["preferred_batch_size"]) == (9, [9])
    assert config["input"][0]["name"] == "X"


def test_a_complete_config_is_not_given_batching(tmp_path: Path) -> None:
    config = (
        SIMPLE_CONFIG.replace("max_batch_size: 8", "max_batch_size: 0")
        .replace("[ 16 ]", "[ -1, 16 ]")
        .replace("dims: 16", "dims: [ -1, 16 ]")
    )
    write_model(tmp_path, "simple", add_sub(), config)
    assert start([tmp_path]).find("simple").config_json()["max_batch_size"] == 0


def test_batching_is_refused_where_the_model_cannot(tmp_path: Path) -> None:
    write_model(tmp_path, "m", add_sub((3, 4)), "max_batch_size: 2")
    with pytest.raises(DamagedInput, match="autofill failed for model 'm': model does not support batching"):
        start([tmp_path])


def test_completion_can_be_disabled(tmp_path: Path) -> None:
    model = write_model(tmp_path, "m", linear())
    with pytest.raises(DamagedInput, match=r"has no config\.pbtxt"):
        load_version(model, "1", STRICT)
    write_config(model, "max_batch_size: 1")
    with pytest.raises(DamagedInput, match="configuration expects 0 inputs, model provides 1"):
        load_version(model, "1", STRICT)


def test_the_config_is_given_with_its_defaults_and_numbers(tmp_path: Path) -> None:
    extra = """parameters { key: "intra_op_thread_count" value { string_value: "1" } }
        version_policy { specific { versions: 1 } }"""
    write_model(tmp_path, "simple", add_sub(), SIMPLE_CONFIG + extra)
    config = start([tmp_path]).find("simple").config_json()
    assert config["version_policy"] == {"specific": {"versions": [1]}}
    assert config["optimization"]["input_pinned_memory"] == {"enable": True}
    assert config["instance_group"][0] | {"host_policy": ""} == {
        "name": "simple",
        "kind": "KIND_CPU",
        "count": 2,
        "gpus": [],
        "secondary_devices": [],
        "profile": [],
        "passive": False,
        "host_policy": "",
    }
    assert config["parameters"]["intra_op_thread_count"] == {"string_value": "1"}
    assert config["default_model_filename"] == "model.onnx"


@pytest.mark.parametrize(
    "config, message",
    [
        ('name: "other"', "unexpected directory name 'm' for model 'other', directory name must equal model name"),
        ("max_batch_size: -1", "'max_batch_size' must be non-negative value for m"),
        ("max_bath_size: 1", r'1:1 .*has no field named "max_bath_size"'),
        ('platform: "onnxruntime"', "unexpected platform type 'onnxruntime' for m"),
        (
            'backend: "python" platform: "onnxruntime_onnx"',
            "unexpected 'platform' and 'backend' pair, got:onnxruntime_onnx, python",
        ),
        ('backend: "onnxruntime" platform: "tensorrt_plan"', "unexpected 'platform' and 'backend' pair"),
        ('backend: "openvino"', "unable to find backend library for backend 'openvino'"),
        ('backend: "../onnxruntime"', "unable to find backend library"),
        ('default_model_filename: "absent.onnx" backend: "onnxruntime"', r"has no file .*absent\.onnx"),
        ("max_batch_size: 2 dynamic_batching { preferred_batch_size: 4 }", "preferred size must be <= max batch size"),
        ("dynamic_batching { priority_levels: 2 }", r"default priority level must be in range \[1, 2\] for m"),
        ("dynamic_batching { priority_levels: 2 default_priority_level: 3 }", r"default priority level must be in"),
        (
            "dynamic_batching { priority_levels: 2 default_priority_level: 2 priority_queue_policy { key: 3 } }",
            r"priority queue policy must have priority level in range \[1, 2\] for m",
        ),
        (
            "dynamic_batching { preserve_ordering: true priority_levels: 2 default_priority_level: 1 }",
            "Only one priority level is allowed when 'preserve_ordering' is true for m",
        ),
        (
            """dynamic_batching { preserve_ordering: true
            default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1 } }""",
            "Queue policy can not have DELAY as timeout action when 'preserve_ordering' is true for m",
        ),
        (
            "response_cache { enable: true } model_transaction_policy { decoupled: true }",
            "Response Cache does not currently support model m with 'decoupled' transaction policy",
        ),
        ('instance_group { kind: KIND_CPU profile: "0" }', "which is only supported for TensorRT models"),
        (
            'output { name: "Y" data_type: TYPE_FP32 dims: 3 label_filename: "labels.txt" }',
            r"failed to open text file for read .*/m/labels\.txt",
        ),
        ("sequence_batching {}", "sequence batching"),
        ("model_transaction_policy { decoupled: true }", "decoupled"),
        ('platform: "ensemble"', "ensemble scheduling must be set for ensemble m"),
        (
            'parameters { key: "intra_op_thread_count" value { string_value: "many" } }',
            "intra_op_thread_count = 'many'",
        ),
        ('input { name: "X" data_type: TYPE_FP32 }', "model input 'X' must specify 'dims' for m"),
        ('input { name: "X" dims: 4 }', "model input 'X' must specify 'data_type' for m"),
        ("input { data_type: TYPE_FP32 dims: 4 }", "model input must specify 'name' for m"),
        (
            'max_batch_size: 1 input { name: "X" data_type: TYPE_FP32 dims: 0 }',
            "model input 'X' dimension must be integer >= 1, or -1",
        ),
        (
            'max_batch_size: 1 input { name: "X" data_type: TYPE_FP32 dims: 5 reshape { shape: [2, 2] } }',
            "model input 'X' has different size for dims and reshape for m",
        ),
    ],
)
def test_a_config_is_refused_in_the_words_of_triton(tmp_path: Path, config: str, message: str) -> None:
    write_model(tmp_path, "m", linear(), config)
    with pytest.raises((DamagedInput, UnsupportedInput), match=message):
        start([tmp_path])


def test_a_model_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m/1").mkdir(parents=True)
    with pytest.raises(DamagedInput, match="Could not determine backend for model 'm'"):
        start([tmp_path])


@pytest.mark.parametrize(
    "config, message",
    [
        ("max_batch_size: 8 {in16} {in1} {out}", None),
        ("max_batch_size: 0 {in_16} {in1_} {out_}", None),
        (
            "max_batch_size: 8 {in-1} {in1} {out}",
            r"tensor 'INPUT0': the model expects 2 dimensions \(shape \[-1,16\]\)",
        ),
        ("max_batch_size: 8 {in_16} {in1} {out}", r"complete shape \[-1,-1,16\]"),
        ("max_batch_size: 0 {in16} {in1_} {out_}", r"specifies 1 dimensions \(shape \[16\]\)"),
        ("max_batch_size: 0 {in_16} {in1_} {out4}", r"'OUTPUT0': the model expects 2 dimensions \(shape \[-1,16\]\)"),
        ("max_batch_size: 8 {in16} {out}", "configuration expects 1 inputs, model provides 2"),
        ("max_batch_size: 8 {in16} {inX} {out}", "unexpected inference input 'X', allowed inputs are: INPUT0, INPUT1"),
        ("max_batch_size: 8 {in16} {in1} {outX}", "unexpected inference output 'X', allowed outputs are: OUTPUT0"),
        (
            "max_batch_size: 8 {inFP} {in1} {out}",
            "configuration expects datatype TYPE_FP32 for input 'INPUT0', model provides TYPE_INT32",
        ),
    ],
)
def test_the_dims_of_config_and_model_must_agree(tmp_path: Path, config: str, message: str | None) -> None:
    tensors = {
        "{in16}": 'input { name: "INPUT0" data_type: TYPE_INT32 dims: 16 }',
        "{in-1}": 'input { name: "INPUT0" data_type: TYPE_INT32 dims: -1 }',
        "{in_16}": 'input { name: "INPUT0" data_type: TYPE_INT32 dims: [-1, 16] }',
        "{inFP}": 'input { name: "INPUT0" data_type: TYPE_FP32 dims: 16 }',
        "{in1}": 'input { name: "INPUT1" data_type: TYPE_INT32 dims: 16 }',
        "{in1_}": 'input { name: "INPUT1" data_type: TYPE_INT32 dims: [5, 16] }',
        "{inX}": 'input { name: "X" data_type: TYPE_INT32 dims: 16 }',
        "{out}": 'output { name: "OUTPUT0" data_type: TYPE_INT32 dims: 16 }',
        "{out_}": 'output { name: "OUTPUT0" data_type: TYPE_INT32 dims: [-1, 16] }',
        "{out4}": 'output { name: "OUTPUT0" data_type: TYPE_INT32 dims: [4, 16] }',
        "{outX}": 'output { name: "X" data_type: TYPE_INT32 dims: 16 }',
    }
    for short, long in tensors.items():
        config = config.replace(short, long)
    model = write_model(tmp_path, "m", add_sub(), config)
    if message is None:
        assert list(load_version(model, "1").contract.outputs) == ["OUTPUT0"]
    else:
        with pytest.raises(DamagedInput, match=message):
            load_version(model, "1")


def test_a_batching_config_needs_a_symbolic_first_dimension(tmp_path: Path) -> None:
    config = SIMPLE_CONFIG.replace('"simple"', '"m"')
    model = write_model(tmp_path, "m", add_sub((8, 16)), config)
    with pytest.raises(DamagedInput, match="for the model to support batching the shape should have at least 1"):
        load_version(model, "1")


def test_any_version_directory_can_be_loaded_by_its_name(tmp_path: Path) -> None:
    model = write_model(tmp_path, "m", linear(), "version_policy { specific { versions: 1 } } max_batch_size: 3")
    write_model(tmp_path, "m", linear(2.0), versions=["staging-7"])
    x = np.ones((2, 4), np.float32)
    staged = load_version(model, "staging-7")
    assert (staged.version, staged.contract.max_batch_size) == (7, 3)
    np.testing.assert_allclose(staged.infer(request_of({"X": x})).arrays()["Y"], 2 * x @ WEIGHT)
    other = tmp_path / "other.pbtxt"
    other.write_text("max_batch_size: 1")
    assert load_version(model, "1", config=other).contract.max_batch_size == 1
    with pytest.raises(DamagedInput, match="has no version directory"):
        load_version(model, "staging-8")


def test_an_adopted_version_is_served_under_its_number(tmp_path: Path) -> None:
    server = Server()
    server.adopt(load_version(write_model(tmp_path, "m", linear(), versions=["staging-7"]), "staging-7"))
    assert server.index() == [{"name": "m", "version": "7", "state": "READY"}]
    assert server.ready()


def test_a_model_that_does_not_load_keeps_the_server_from_starting(tmp_path: Path) -> None:
    write_model(tmp_path, "good", linear())
    bad = write_model(tmp_path, "bad", linear())
    (bad / "1/model.onnx").write_bytes(b"junk")
    with pytest.raises(DamagedInput, match="failed to load 1 of 2 models: bad: onnxruntime cannot load"):
        start([tmp_path])
    server = start([tmp_path], exit_on_error=False)
    states = {row["name"]: row["state"] for row in server.index()}
    assert states == {"bad": "UNAVAILABLE", "good": "READY"}
    assert not server.ready()
    assert start([tmp_path], exit_on_error=False, strict_readiness=False).ready()
    with pytest.raises(Refusal, match="'bad' version 1 is not at ready state"):
        server.find("bad", 1)


def test_one_broken_version_takes_its_model_down(tmp_path: Path) -> None:
    model = write_model(tmp_path, "m", linear(), "version_policy { all {} }", versions=["1", "2"])
    (model / "2/model.onnx").write_bytes(b"junk")
    server = start([tmp_path], exit_on_error=False)
    assert [(row["version"], row["state"]) for row in server.index()] == [("2", "UNAVAILABLE")]


def test_a_reload_that_fails_leaves_the_old_version_serving(tmp_path: Path) -> None:
    model = write_model(tmp_path, "m", linear())
    server = start([tmp_path], explicit=True, load_model=["*"])
    shutil.rmtree(model / "1")
    with pytest.raises(Refusal, match="failed to load 'm', failed to poll from model repository"):
        server.load("m")
    assert server.find("m").version == 1


def test_only_named_models_are_loaded_in_explicit_mode(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_model(tmp_path, name, linear())
    server = start([tmp_path], explicit=True, load_model=["a"])
    assert server.index() == [{"name": "a", "version": "1", "state": "READY"}, {"name": "b"}]
    with pytest.raises(DamagedInput, match="nope: not in any repository"):
        start([tmp_path], explicit=True, load_model=["nope"])


GPU_CONFIG = "instance_group { kind: KIND_GPU }"


def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_a_gpu_model_is_refused_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpus(monkeypatch)
    write_model(tmp_path, "m", linear(), GPU_CONFIG)
    with pytest.raises(MachineError, match="instance group m_0 of model m has kind KIND_GPU but no GPUs are available"):
        start([tmp_path])


def test_a_fallback_to_the_cpu_is_asked_for_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpus(monkeypatch)
    model = write_model(tmp_path, "m", linear(), GPU_CONFIG)
    loaded = load_version(model, "1", LoadOptions(allow_cpu_fallback=True))
    assert loaded.fell_back_to_cpu
    assert any("KIND_GPU" in note for note in loaded.notes)
    write_config(model, "instance_group { kind: KIND_CPU count: 3 }")
    loaded = load_version(model, "1", LoadOptions(allow_cpu_fallback=True))
    assert (loaded.fell_back_to_cpu, loaded.placement.count) == (False, 3)


@pytest.mark.parametrize("kind", ["KIND_AUTO", "KIND_CPU", "KIND_MODEL"])
def test_other_kinds_run_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    without_gpus(monkeypatch)
    model = write_model(tmp_path, "m", linear(), f"instance_group {{ kind: {kind} }}")
    assert load_version(model, "1").placement.gpu is None


@pytest.mark.gpu
def test_a_gpu_model_runs_on_the_gpu(tmp_path: Path) -> None:
    if not find_backend("onnxruntime", "m").gpus():
        pytest.skip("no GPU that onnxruntime can use")
    loaded = load_version(write_model(tmp_path, "m", linear(), GPU_CONFIG), "1")
    assert loaded.placement.gpu == 0
    x = np.ones((1, 4), np.float32)
    np.testing.assert_allclose(loaded.infer(request_of({"X": x})).arrays()["Y"], x @ WEIGHT)


def test_bfloat16_arithmetic_is_refused_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpus(monkeypatch)
    weight = helper.make_tensor("W", TensorProto.BFLOAT16, [2, 2], [1.0] * 4)
    ends = [("X", TensorProto.BFLOAT16, ("b", 2))], [("Y", TensorProto.BFLOAT16, ("b", 2))]
    model = write_model(tmp_path, "m", graph([helper.make_node("MatMul", ["X", "W"], ["Y"])], *ends, [weight]))
    with pytest.raises(
        MachineError, match=r"model 'm' computes in bfloat16 .* no kernels on the CPU; serve it on a GPU"
    ):
        load_version(model, "1")


def test_external_data_is_found_beside_the_model(tmp_path: Path) -> None:
    model = write_model(tmp_path, "m", linear())
    onnx.save(
        linear(), model / "1/model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )
    x = np.ones((1, 4), np.float32)
    np.testing.assert_allclose(load_version(model, "1").infer(request_of({"X": x})).arrays()["Y"], x @ WEIGHT)
    (model / "1/model.onnx.data").unlink()
    with pytest.raises(NemoportError, match=r"onnxruntime cannot load .*model\.onnx"):
        load_version(model, "1")


def test_scalars_of_a_model_are_vectors_of_one_to_a_client(tmp_path: Path) -> None:
    per_item = graph(
        [helper.make_node("ReduceSum", ["X", "axes"], ["Y"], keepdims=0)],
        [("X", TensorProto.FLOAT, ("batch", 4))],
        [("Y", TensorProto.FLOAT, ("batch",))],
        [helper.make_tensor("axes", TensorProto.INT64, [1], [1])],
    )
    loaded = load_version(write_model(tmp_path, "item", per_item), "1")
    assert loaded.metadata([1])["outputs"] == [{"name": "Y", "datatype": "FP32", "shape": [-1, 1]}]
    assert loaded.infer(request_of({"X": np.ones((2, 4), np.float32)})).arrays()["Y"].tolist() == [[4], [4]]
    whole = load_version(write_model(tmp_path, "whole", identity(TensorProto.FLOAT, ())), "1")
    assert whole.infer(request_of({"X": np.ones(1, np.float32)})).arrays()["Y"].tolist() == [1]


def test_reshape_stands_between_client_and_model(tmp_path: Path) -> None:
    config = """max_batch_size: 4
        input { name: "X" data_type: TYPE_FP32 dims: [2, -1, 2] reshape { shape: [2, 1, -1, 2] } }
        output { name: "Y" data_type: TYPE_FP32 dims: [2, 1, -1, 1, 2] reshape { shape: [2, 1, -1, 2] } }"""
    model = write_model(tmp_path, "m", identity(TensorProto.FLOAT, ("b", 2, 1, "n", 2)), config)
    x = np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2)
    answer = load_version(model, "1").infer(request_of({"X": x})).arrays()["Y"]
    assert answer.shape == (2, 2, 1, 3, 1, 2)
    assert answer.reshape(-1).tolist() == x.reshape(-1).tolist()
