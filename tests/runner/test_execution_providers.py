"""What a config asks of ONNX Runtime's execution providers, row by row as Triton's onnxruntime backend has it.

The rows are facts of `ModelState::LoadModel` in that backend's onnxruntime.cc, release 26.06.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from google.protobuf import text_format

from nemoport.errors import DamagedInput, MachineError
from nemoport.runner import config_rules
from nemoport.runner.backends import find_backend
from nemoport.runner.execution_providers import Provider, Providers, not_taken, providers, started
from nemoport.runner.instances import Placement
from nemoport.runner.model import LoadOptions, load_version
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import request_of
from nemoport.runner.serve import serving
from nemoport.runner.server import Server, start

from .models import WEIGHT, linear, write_model

TENSORRT, CUDA = "TensorrtExecutionProvider", "CUDAExecutionProvider"
OPENVINO, CPU = "OpenVINOExecutionProvider", "CPUExecutionProvider"
ALL = (TENSORRT, CUDA, OPENVINO, CPU)
CUDA_OF_2 = {
    "use_tf32": "0",
    "device_id": "2",
    "cudnn_conv_algo_search": "EXHAUSTIVE",
    "gpu_mem_limit": "18446744073709551615",
    "arena_extend_strategy": "kNextPowerOfTwo",
    "do_copy_in_default_stream": "1",
}
"""The options of a model on GPU 2 whose config says nothing of them."""


def config(text: str) -> ModelConfig:
    return text_format.Parse(f'name: "m" backend: "onnxruntime" {text}', ModelConfig())


def accelerators(*names: str, kind: str = "gpu", **parameters: str) -> str:
    """All with the same parameters."""
    said = " ".join(f'parameters {{ key: "{key}" value: "{value}" }}' for key, value in parameters.items())
    entries = " ".join(f'{kind}_execution_accelerator {{ name: "{name}" {said} }}' for name in names)
    return f"optimization {{ execution_accelerators {{ {entries} }} }}"


def parameter(name: str, value: str) -> str:
    return f'parameters {{ key: "{name}" value {{ string_value: "{value}" }} }}'


def asked(text: str, gpu: int | None = 2, available: tuple[str, ...] = ALL) -> Mapping[str, Mapping[str, str]]:
    return {provider.name: provider.options for provider in providers(config(text), gpu, available).row}


def notes(text: str, gpu: int | None = 2, available: tuple[str, ...] = ALL) -> tuple[str, ...]:
    return providers(config(text), gpu, available).notes


INT, BOOL, ANY = "integral number", "boolean", ""
TENSORRT_ROWS = [  # parameter, option, what Triton's backend converts it to
    ("max_workspace_size_bytes", "trt_max_workspace_size", "unsigned long long integral number"),
    ("trt_max_partition_iterations", "trt_max_partition_iterations", INT),
    ("trt_min_subgraph_size", "trt_min_subgraph_size", INT),
    ("int8_calibration_table_name", "trt_int8_calibration_table_name", ANY),
    ("int8_use_native_calibration_table", "trt_int8_use_native_calibration_table", BOOL),
    ("trt_dla_enable", "trt_dla_enable", BOOL),
    ("trt_dla_core", "trt_dla_core", INT),
    ("trt_engine_cache_enable", "trt_engine_cache_enable", BOOL),
    ("trt_engine_cache_path", "trt_engine_cache_path", ANY),
    ("trt_engine_cache_prefix", "trt_engine_cache_prefix", ANY),
    ("trt_dump_subgraphs", "trt_dump_subgraphs", BOOL),
    ("trt_force_sequential_engine_build", "trt_force_sequential_engine_build", BOOL),
    ("trt_context_memory_sharing_enable", "trt_context_memory_sharing_enable", BOOL),
    ("trt_layer_norm_fp32_fallback", "trt_layer_norm_fp32_fallback", BOOL),
    ("trt_timing_cache_enable", "trt_timing_cache_enable", BOOL),
    ("trt_timing_cache_path", "trt_timing_cache_path", ANY),
    ("trt_force_timing_cache", "trt_force_timing_cache", BOOL),
    ("trt_detailed_build_log", "trt_detailed_build_log", BOOL),
    ("trt_build_heuristics_enable", "trt_build_heuristics_enable", BOOL),
    ("trt_sparsity_enable", "trt_sparsity_enable", BOOL),
    ("trt_builder_optimization_level", "trt_builder_optimization_level", INT),
    ("trt_auxiliary_streams", "trt_auxiliary_streams", INT),
    ("trt_tactic_sources", "trt_tactic_sources", ANY),
    ("trt_extra_plugin_lib_paths", "trt_extra_plugin_lib_paths", ANY),
    ("trt_profile_min_shapes", "trt_profile_min_shapes", ANY),
    ("trt_profile_max_shapes", "trt_profile_max_shapes", ANY),
    ("trt_profile_opt_shapes", "trt_profile_opt_shapes", ANY),
    ("trt_cuda_graph_enable", "trt_cuda_graph_enable", BOOL),
    ("trt_dump_ep_context_model", "trt_dump_ep_context_model", BOOL),
    ("trt_ep_context_file_path", "trt_ep_context_file_path", ANY),
    ("trt_ep_context_embed_mode", "trt_ep_context_embed_mode", INT),
]


@pytest.mark.parametrize("name, option, kind", TENSORRT_ROWS, ids=[row[0] for row in TENSORRT_ROWS])
def test_a_parameter_of_tensorrt_is_an_option_of_its_provider(name: str, option: str, kind: str) -> None:
    found = asked(accelerators("tensorrt", **{name: "1"}))
    assert found == {TENSORRT: {option: "True" if kind == BOOL else "1", "device_id": "2"}, CUDA: CUDA_OF_2, CPU: {}}
    wrong = accelerators("tensorrt", **{name: "1.5"})
    if kind:
        with pytest.raises(DamagedInput, match=f"failed to convert '1.5' to {kind}, for parameter {name} .model 'm'"):
            asked(wrong)
    else:
        assert asked(wrong)[TENSORRT][option] == "1.5"
        assert asked(accelerators("tensorrt", **{name: ""}))[TENSORRT] == {"device_id": "2"}


@pytest.mark.parametrize(
    "precision, options",
    [
        ("FP32", {}),
        ("FP16", {"trt_fp16_enable": "True"}),
        ("BF16", {"trt_bf16_enable": "True"}),
        ("INT8", {"trt_int8_enable": "True"}),
    ],
)
def test_a_precision_mode_turns_one_option_on(precision: str, options: Mapping[str, str]) -> None:
    assert asked(accelerators("tensorrt", precision_mode=precision))[TENSORRT] == {**options, "device_id": "2"}


@pytest.mark.parametrize(
    "text, message",
    [
        (
            accelerators("tensorrt", precision_mode="FP8"),
            "unsupported precision mode 'FP8' is requested; there are FP32",
        ),
        (accelerators("tensorrt", precision_mode=""), "unsupported precision mode '' is requested"),
        (
            accelerators("tensorrt", workspace="1"),
            "unknown parameter 'workspace' is provided for TensorRT Execution Accelerator",
        ),
        (accelerators("tensorrt", device_id="0"), "unknown parameter 'device_id' is provided for TensorRT"),
        (accelerators("tensorrt", max_workspace_size_bytes="-1"), "failed to convert '-1' to unsigned long long"),
        (accelerators("tensorrt", max_workspace_size_bytes=str(2**64)), "to unsigned long long"),
        (accelerators("tensorrt", trt_dla_core=str(2**31)), "to integral number"),
        (accelerators("tensorrt", trt_dla_core=""), "failed to convert '' to integral number"),
        (accelerators("tensorrt", trt_dla_core="9" * 5000), "to integral number"),
        (accelerators("tensorrt", trt_dla_core="\N{ARABIC-INDIC DIGIT ONE}"), "to integral number"),
        (
            accelerators("TensorRT"),
            "unknown Execution Accelerator 'TensorRT' is requested; known here: tensorrt and cuda",
        ),
        (accelerators("auto_io"), "unknown Execution Accelerator 'auto_io' is requested"),
        (accelerators("tensorrt", "tensorrt"), f"Provider {TENSORRT} has already been registered"),
        (accelerators("cuda", use_ep_level_unified_stream="yes"), "failed to convert 'yes' to boolean"),
        (accelerators("cuda", do_copy_in_default_stream="2"), "failed to convert '2' to boolean"),
        (accelerators("cuda", gpu_external_alloc="140000"), "parameter 'gpu_external_alloc' of cuda is an address"),
        (
            accelerators("onednn", kind="cpu"),
            "unknown Execution Accelerator 'onednn' is requested; known here: openvino",
        ),
        (accelerators("openvino", "openvino", kind="cpu"), f"Provider {OPENVINO} has already been registered"),
        (parameter("cudnn_conv_algo_search", "3"), "unsupported cudnn_conv_algo_search value '3' is requested"),
        (parameter("cudnn_conv_algo_search", "-1"), "unsupported cudnn_conv_algo_search value '-1' is requested"),
        (parameter("cudnn_conv_algo_search", "HEURISTIC"), "failed to convert 'HEURISTIC' to integral number"),
        (parameter("arena_extend_strategy", "2"), "unsupported arena_extend_strategy value '2' is requested"),
    ],
)
def test_what_triton_refuses_on_a_gpu_is_refused_in_its_words(text: str, message: str) -> None:
    with pytest.raises(DamagedInput, match=f"{message}.*model 'm'"):
        asked(text)


@pytest.mark.parametrize("true", ["1", "true", "TRUE", "on"])
@pytest.mark.parametrize("false", ["0", "False", "off"])
def test_a_boolean_is_given_as_onnx_runtime_s_python_takes_it(true: str, false: str) -> None:
    text = accelerators("tensorrt", trt_dla_enable=true, trt_sparsity_enable=false)
    assert asked(text)[TENSORRT] == {"trt_dla_enable": "True", "trt_sparsity_enable": "False", "device_id": "2"}


@pytest.mark.parametrize("names", [("tensorrt", "cuda"), ("cuda", "tensorrt"), ("tensorrt",)])
def test_tensorrt_comes_before_cuda_and_cuda_before_the_cpu(names: tuple[str, ...]) -> None:
    assert list(asked(accelerators(*names))) == [TENSORRT, CUDA, CPU]


def test_a_gpu_has_cuda_whether_or_not_it_is_asked_for() -> None:
    assert asked("") == asked(accelerators("cuda")) == {CUDA: CUDA_OF_2, CPU: {}}
    assert asked("", gpu=0)[CUDA]["device_id"] == "0"


def test_parameters_of_cuda_pass_through_and_float32_stays_unless_they_say_otherwise() -> None:
    said = {"cudnn_conv_use_max_workspace": "0", "use_ep_level_unified_stream": "True", "odd": "any"}
    assert asked(accelerators("cuda", **said, empty=""))[CUDA] == CUDA_OF_2 | said
    assert notes(accelerators("cuda", **said)) == ()
    assert asked(accelerators("cuda", use_tf32="1"))[CUDA] == {**CUDA_OF_2, "use_tf32": "1"}


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("cudnn_conv_algo_search", "0", "EXHAUSTIVE"),
        ("cudnn_conv_algo_search", "1", "HEURISTIC"),
        ("cudnn_conv_algo_search", "2", "DEFAULT"),
        ("gpu_mem_limit", "4294967200", "4294967200"),
        ("arena_extend_strategy", "0", "kNextPowerOfTwo"),
        ("arena_extend_strategy", "1", "kSameAsRequested"),
        ("do_copy_in_default_stream", "0", "0"),
    ],
)
def test_some_parameters_of_a_model_are_options_of_cuda(name: str, text: str, value: str) -> None:
    assert asked(parameter(name, text))[CUDA] == {**CUDA_OF_2, name: value}


@pytest.mark.parametrize("name", ["cudnn_conv_algo_search", "gpu_mem_limit", "arena_extend_strategy"])
def test_what_triton_overwrites_of_cuda_is_without_effect_and_noted(name: str) -> None:
    text = accelerators("cuda", **{name: "7"})
    assert asked(text)[CUDA] == CUDA_OF_2
    (note,) = notes(text)
    assert f"{name} of cuda, without effect as on Triton" in note
    assert notes(parameter("gpu_mem_limit", "7")) == ()


def test_a_config_does_not_say_the_device_nor_the_stream() -> None:
    text = accelerators("cuda", device_id="5", user_compute_stream="1234", has_user_compute_stream="1")
    assert asked(text)[CUDA] == CUDA_OF_2
    (note,) = notes(text)
    assert "device_id, has_user_compute_stream, user_compute_stream of cuda" in note


def test_openvino_is_asked_for_on_any_device() -> None:
    text = accelerators("openvino", kind="cpu")
    assert asked(text, gpu=None) == {OPENVINO: {"device_type": "CPU"}, CPU: {}}
    assert asked(text) == {CUDA: CUDA_OF_2, OPENVINO: {"device_type": "CPU"}, CPU: {}}
    assert notes(text) == ()
    assert len(notes(accelerators("openvino", kind="cpu", device="GPU"))) == 1


@pytest.mark.parametrize(
    "text, named",
    [
        (accelerators("tensorrt", "cuda"), "execution_accelerators: tensorrt, cuda for GPUs only"),
        (accelerators("nonsense"), "execution_accelerators: nonsense for GPUs only"),
        (parameter("gpu_mem_limit", "nonsense"), "parameters: gpu_mem_limit for GPUs only"),
    ],
)
def test_what_is_for_gpus_means_nothing_on_the_cpu_and_is_noted(text: str, named: str) -> None:
    assert asked(text, gpu=None) == {CPU: {}}
    (note,) = notes(text, gpu=None)
    assert named in note


def test_a_provider_that_is_not_there_is_left_out_and_noted() -> None:
    text = accelerators("tensorrt", precision_mode="FP16")
    assert list(asked(text, available=(CUDA, CPU))) == [CUDA, CPU]
    (note,) = notes(text, available=(CUDA, CPU))
    assert note.endswith(f"no {TENSORRT}, the graph runs without it, in its own precision instead of FP16")
    (note,) = notes(accelerators("tensorrt", precision_mode="FP32"), available=(CUDA, CPU))
    assert note.endswith("the graph runs without it")


def test_parameters_are_judged_whether_or_not_the_provider_is_there() -> None:
    with pytest.raises(DamagedInput, match="unknown parameter 'x'"):
        asked(accelerators("tensorrt", x="1"), available=(CUDA, CPU))


def test_a_provider_that_did_not_start_is_noted() -> None:
    wanted = Providers((Provider(TENSORRT, loss="worse"), Provider(CUDA), Provider(CPU)))
    (note,) = not_taken(wanted, [CUDA, CPU])
    assert note.endswith(f"could not start its {TENSORRT}, the graph runs without it, worse")
    assert not_taken(wanted, [TENSORRT, CUDA, CPU]) == ()


WITH_TENSORRT = Providers(
    (Provider(TENSORRT, {"trt_dla_core": "1"}), Provider(CUDA, {"device_id": "2"}), Provider(CPU))
)


def test_libraries_of_tensorrt_that_are_not_there_cost_tensorrt_only() -> None:
    """The words are those of ONNX Runtime 1.16 and later, which lists the provider as available all the same."""

    def make(row: Sequence[Provider]) -> Sequence[Provider]:
        if any(provider.name == TENSORRT for provider in row):
            raise RuntimeError(
                "RegisterTensorRTPluginsAsCustomOps Please install TensorRT libraries as mentioned in ..."
            )
        return row

    taken = started(make, WITH_TENSORRT)
    assert list(taken) == list(WITH_TENSORRT.row[1:])
    assert len(not_taken(WITH_TENSORRT, [provider.name for provider in taken])) == 1


def test_other_errors_of_tensorrt_are_not_passed_over() -> None:
    def make(row: Sequence[Provider]) -> Sequence[Provider]:
        if any(provider.name == TENSORRT for provider in row):
            raise RuntimeError("Invalid TensorRT EP option: trt_dla_core")
        return row

    with pytest.raises(RuntimeError, match="Invalid TensorRT EP option"):
        started(make, WITH_TENSORRT)


def test_only_graphs_of_onnx_have_accelerators() -> None:
    said = config(accelerators("tensorrt"))
    assert config_rules.notes(said) == ()
    said.backend = "pytorch"
    assert config_rules.notes(said) == ("execution_accelerators: only graphs of ONNX have them",)


X = np.arange(8, dtype=np.float32).reshape(2, 4)


def without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def index(address: str) -> list[dict[str, str]]:
    request = urllib.request.Request(f"http://{address}/v2/repository/index", b"{}", method="POST")
    with urllib.request.urlopen(request) as reply:
        rows: list[dict[str, str]] = json.load(reply)
    return rows


def test_the_index_says_what_a_model_runs_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpus(monkeypatch)
    without = f"execution_accelerators: this onnxruntime has no {OPENVINO}, the graph runs without it"
    write_model(tmp_path, "cpu", linear(), accelerators("openvino", kind="cpu"))
    write_model(tmp_path, "gpu", linear(), accelerators("tensorrt", "cuda"))
    write_model(tmp_path, "plain", linear())
    with serving(start([tmp_path])) as address:
        assert [(row["name"], row["state"], row.get("reason", "")) for row in index(address)] == [
            ("cpu", "READY", "" if OPENVINO in ort.get_available_providers() else without),
            ("gpu", "READY", "execution_accelerators: tensorrt, cuda for GPUs only, executed on the CPU"),
            ("plain", "READY", ""),
        ]


def test_openvino_executes_where_onnxruntime_has_it(tmp_path: Path) -> None:
    if OPENVINO not in ort.get_available_providers():
        pytest.skip("this onnxruntime has no OpenVINO; onnxruntime-openvino has")
    text = accelerators("openvino", kind="cpu") + "instance_group { kind: KIND_CPU }"
    loaded = load_version(write_model(tmp_path, "m", linear(), text), "1")
    assert loaded.notes == ()  # a provider that was not taken would be noted
    np.testing.assert_allclose(loaded.infer(request_of({"X": X})).arrays()["Y"], X @ WEIGHT, rtol=1e-6)


def test_a_model_answers_the_same_without_its_accelerators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpus(monkeypatch)
    text = accelerators("tensorrt", precision_mode="INT8") + "instance_group { kind: KIND_GPU }"
    loaded = load_version(write_model(tmp_path, "m", linear(), text), "1", LoadOptions(allow_cpu_fallback=True))
    np.testing.assert_array_equal(loaded.infer(request_of({"X": X})).arrays()["Y"], X @ WEIGHT)
    assert [note.partition(":")[0] for note in loaded.notes] == ["instance_group", "execution_accelerators"]
    assert loaded.placement.notes == loaded.notes


def test_a_client_is_told_which_accelerator_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_gpus(monkeypatch)
    write_model(tmp_path, "m", linear(), accelerators("xnnpack", kind="cpu"))
    server = Server([tmp_path], explicit=True)
    with pytest.raises(Refusal, match="Invalid argument: unknown Execution Accelerator 'xnnpack' is requested"):
        server.load("m")


@pytest.mark.parametrize("text", ["", accelerators("tensorrt", precision_mode="FP16")])
def test_a_placement_on_a_gpu_never_ends_on_the_cpu(tmp_path: Path, text: str) -> None:
    """The placement is that of a machine with a GPU, whether or not the onnxruntime here was built for one."""
    backend = find_backend("onnxruntime", "m")
    if backend.gpus():
        pytest.skip("there is a GPU")
    model, said = write_model(tmp_path, "m", linear()), config(f'default_model_filename: "model.onnx" {text}')
    with pytest.raises(MachineError, match=r"model 'm' is placed on GPU 0, and onnxruntime could not start its CUDA"):
        backend.load(model / "1", said, Placement(0, 1), complete=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name, provider", [("tensorrt", TENSORRT), ("cuda", CUDA)])
def test_a_model_runs_on_the_providers_that_it_asks_for(tmp_path: Path, name: str, provider: str) -> None:
    if not find_backend("onnxruntime", "m").gpus() or provider not in ort.get_available_providers():
        pytest.skip(f"no GPU, or an onnxruntime without {provider}")
    text = accelerators(name) + parameter("gpu_mem_limit", str(2**30)) + "instance_group { kind: KIND_GPU }"
    loaded = load_version(write_model(tmp_path, "m", linear(), text), "1")
    if name == "tensorrt" and any("could not start" in note for note in loaded.notes):
        pytest.skip("onnxruntime finds no libraries of TensorRT")
    assert loaded.notes == ()  # a provider that was not taken would be noted
    np.testing.assert_allclose(loaded.infer(request_of({"X": X})).arrays()["Y"], X @ WEIGHT, rtol=1e-3)
