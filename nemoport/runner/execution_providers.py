"""Which of ONNX Runtime's execution providers a config asks for, in what order and with what options.

What Triton's onnxruntime backend makes of `optimization.execution_accelerators` and of the model's parameters, in
`ModelState::LoadModel`. On a GPU: TensorRT where it is asked for, then CUDA always. On any device: OpenVINO where it is
asked for, and the CPU at last. Accelerators for GPUs mean nothing on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from nemoport.errors import DamagedInput
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.parameters import Read, anything, boolean, integer, unsigned

TENSORRT, CUDA = "TensorrtExecutionProvider", "CUDAExecutionProvider"
OPENVINO, CPU = "OpenVINOExecutionProvider", "CPUExecutionProvider"
PROVIDERS = (TENSORRT, CUDA, OPENVINO, CPU)
"""All that a config can ask for."""


NO_TENSORRT = "install TensorRT libraries"
"""What ONNX Runtime says where it has the provider and not what that needs."""
Session = TypeVar("Session")


@dataclass(frozen=True)
class Provider:
    name: str
    options: Mapping[str, str] = field(default_factory=dict)
    loss: str = ""
    """What else the graph does without it, besides taking longer."""


@dataclass(frozen=True)
class Providers:
    """In the order in which ONNX Runtime offers them nodes. `notes` say what the config asks for in vain."""

    row: tuple[Provider, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Legacy:
    """A parameter of the model that is an option of the CUDA provider, and its value where none is given."""

    default: str
    names: tuple[str, ...] = ()
    """What 0, 1 and so on are called; none where the text is the value."""


PRECISION = "precision_mode"
PRECISIONS: Mapping[str, Mapping[str, str]] = {
    "FP32": {},
    "FP16": {"trt_fp16_enable": "True"},
    "BF16": {"trt_bf16_enable": "True"},  # not before the backend of 26.02
    "INT8": {"trt_int8_enable": "True"},
}
TENSORRT_PARAMETERS: Mapping[str, Read] = {
    "max_workspace_size_bytes": unsigned,
    "int8_calibration_table_name": anything,
    "int8_use_native_calibration_table": boolean,
    "trt_max_partition_iterations": integer,
    "trt_min_subgraph_size": integer,
    "trt_dla_enable": boolean,
    "trt_dla_core": integer,
    "trt_engine_cache_enable": boolean,
    "trt_engine_cache_path": anything,
    "trt_engine_cache_prefix": anything,
    "trt_dump_subgraphs": boolean,
    "trt_force_sequential_engine_build": boolean,
    "trt_context_memory_sharing_enable": boolean,
    "trt_layer_norm_fp32_fallback": boolean,
    "trt_timing_cache_enable": boolean,
    "trt_timing_cache_path": anything,
    "trt_force_timing_cache": boolean,
    "trt_detailed_build_log": boolean,
    "trt_build_heuristics_enable": boolean,
    "trt_sparsity_enable": boolean,
    "trt_builder_optimization_level": integer,
    "trt_auxiliary_streams": integer,
    "trt_tactic_sources": anything,
    "trt_extra_plugin_lib_paths": anything,
    "trt_profile_min_shapes": anything,
    "trt_profile_max_shapes": anything,
    "trt_profile_opt_shapes": anything,
    "trt_cuda_graph_enable": boolean,
    "trt_dump_ep_context_model": boolean,
    "trt_ep_context_file_path": anything,
    "trt_ep_context_embed_mode": integer,
}
"""How the text is read. A boolean is given as True or False, since ONNX Runtime's Python takes no 1 here."""
TENSORRT_OPTIONS: Mapping[str, str] = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
"""Parameters that the provider calls otherwise."""

CUDA_PARAMETERS: Mapping[str, Read] = {
    "do_copy_in_default_stream": boolean,
    "use_ep_level_unified_stream": boolean,
}
"""Those whose text is read; the others are for ONNX Runtime to judge."""
CUDA_DEFAULTS: Mapping[str, str] = {"use_tf32": "0"}
"""float32 means float32: on by default, TF32 would round the factors of every product to 11 bits."""
CUDA_ADDRESSES = ("gpu_external_alloc", "gpu_external_free", "gpu_external_empty_cache")
"""Functions in a process, and a file can know none of this one."""
CUDA_OF_THE_SERVER = ("device_id", "has_user_compute_stream", "user_compute_stream")
CUDA_LEGACY: Mapping[str, Legacy] = {
    "cudnn_conv_algo_search": Legacy("EXHAUSTIVE", ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")),
    "gpu_mem_limit": Legacy(str(2**64 - 1)),
    "arena_extend_strategy": Legacy("kNextPowerOfTwo", ("kNextPowerOfTwo", "kSameAsRequested")),
    "do_copy_in_default_stream": Legacy("1"),
}
"""Triton's backend sets all of these last, by default where the model has no such parameter: what `cuda` itself says
of them is lost."""


def providers(config: ModelConfig, gpu: int | None, available: Collection[str]) -> Providers:
    """Of a model on `gpu`, or on the CPU when None; `available` are the providers that this ONNX Runtime has."""
    try:
        wanted = (*(() if gpu is None else _on_gpu(config, gpu)), *_on_cpu(config))
        _check_once(wanted)
    except DamagedInput as error:
        raise DamagedInput(f"{error} (model '{config.name}')") from None
    absent = [provider for provider in wanted if provider.name not in available]
    return Providers(
        (*(provider for provider in wanted if provider.name in available), Provider(CPU)),
        (
            *(_only_for_gpus(config) if gpu is None else _overwritten(config)),
            *_not_read(config),
            *(_without(provider, f"this onnxruntime has no {provider.name}") for provider in absent),
        ),
    )


def not_taken(wanted: Providers, taken: Collection[str]) -> tuple[str, ...]:
    """Notes on the providers that ONNX Runtime left out of a session; it only warns of it."""
    left = [provider for provider in wanted.row if provider.name not in taken]
    return tuple(_without(provider, f"onnxruntime could not start its {provider.name}") for provider in left)


def started(make: Callable[[Sequence[Provider]], Session], wanted: Providers) -> Session:
    """The session that `make` gives, without TensorRT on a machine that lacks its libraries.

    A provider that does not start is passed over by ONNX Runtime itself, but for this one: an onnxruntime that was
    built with TensorRT lists it as available, and raises.
    """
    try:
        return make(wanted.row)
    except RuntimeError as error:
        if NO_TENSORRT not in str(error):
            raise
    return make([provider for provider in wanted.row if provider.name != TENSORRT])


def _on_gpu(config: ModelConfig, gpu: int) -> Iterator[Provider]:
    of_cuda: dict[str, str] = {}
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        if accelerator.name == "tensorrt":
            yield _tensorrt(accelerator.parameters, gpu)
        elif accelerator.name == "cuda":
            of_cuda |= _cuda(accelerator.parameters)
        else:
            raise _unknown(accelerator.name, "tensorrt and cuda")
    given = {name: text for name, text in of_cuda.items() if name not in CUDA_OF_THE_SERVER}
    yield Provider(CUDA, {**CUDA_DEFAULTS, **given, **_legacy(config), "device_id": str(gpu)})


def _on_cpu(config: ModelConfig) -> Iterator[Provider]:
    for accelerator in config.optimization.execution_accelerators.cpu_execution_accelerator:
        if accelerator.name != "openvino":
            raise _unknown(accelerator.name, "openvino")
        yield Provider(OPENVINO, {"device_type": "CPU"})


def _tensorrt(parameters: Mapping[str, str], gpu: int) -> Provider:
    options: dict[str, str] = {}
    for name, text in sorted(parameters.items()):
        if name == PRECISION:
            continue
        if name not in TENSORRT_PARAMETERS:
            raise DamagedInput(f"unknown parameter '{name}' is provided for TensorRT Execution Accelerator")
        value = _value(TENSORRT_PARAMETERS[name], name, text)
        if value:
            options[TENSORRT_OPTIONS.get(name, name)] = value
    precision = parameters.get(PRECISION, "FP32")
    if precision not in PRECISIONS:
        raise DamagedInput(f"unsupported precision mode '{precision}' is requested; there are {', '.join(PRECISIONS)}")
    loss = f"in its own precision instead of {precision}" if PRECISIONS[precision] else ""
    return Provider(TENSORRT, {**options, **PRECISIONS[precision], "device_id": str(gpu)}, loss)


def _cuda(parameters: Mapping[str, str]) -> dict[str, str]:
    """What is said by an empty text is not said."""
    if addresses := [name for name in CUDA_ADDRESSES if parameters.get(name)]:
        raise DamagedInput(f"parameter '{addresses[0]}' of cuda is an address in a process; take it away")
    read = {name: _value(CUDA_PARAMETERS.get(name, anything), name, text) for name, text in parameters.items()}
    return {name: value for name, value in read.items() if value}


def _legacy(config: ModelConfig) -> dict[str, str]:
    said = {name: config.parameters[name].string_value for name in CUDA_LEGACY if name in config.parameters}
    return {
        name: _legacy_value(name, legacy, said[name]) if name in said else legacy.default
        for name, legacy in CUDA_LEGACY.items()
    }


def _legacy_value(name: str, legacy: Legacy, text: str) -> str:
    if not legacy.names:
        return text
    value = _value(integer, name, text)
    known = {str(number): meaning for number, meaning in enumerate(legacy.names)}
    if value not in known:
        told = ", ".join(f"{number} ({meaning})" for number, meaning in known.items())
        raise DamagedInput(f"unsupported {name} value '{value}' is requested; there are {told}")
    return known[value]


def _value(read: Read, name: str, text: str) -> str:
    try:
        return str(read(text))
    except DamagedInput as error:
        raise DamagedInput(f"{error}, for parameter {name}") from None


def _check_once(wanted: Sequence[Provider]) -> None:
    """ONNX Runtime registers no provider twice. All entries of `cuda` are one."""
    names = [provider.name for provider in wanted]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DamagedInput(f"Provider {twice} has already been registered; ask for its accelerator once")


def _unknown(name: str, known: str) -> DamagedInput:
    return DamagedInput(f"unknown Execution Accelerator '{name}' is requested; known here: {known}")


def _only_for_gpus(config: ModelConfig) -> Iterator[str]:
    names = [each.name for each in config.optimization.execution_accelerators.gpu_execution_accelerator]
    if names:
        yield f"execution_accelerators: {', '.join(names)} for GPUs only, executed on the CPU"
    if legacy := [name for name in CUDA_LEGACY if name in config.parameters]:
        yield f"parameters: {', '.join(legacy)} for GPUs only, executed on the CPU"


def _overwritten(config: ModelConfig) -> Iterator[str]:
    for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator:
        if accelerator.name != "cuda":
            continue
        if lost := [name for name in CUDA_LEGACY if name in accelerator.parameters]:
            yield (
                f"execution_accelerators: {', '.join(lost)} of cuda, without effect as on Triton, which takes them "
                "from the parameters of the model only"
            )
        if lost := [name for name in CUDA_OF_THE_SERVER if name in accelerator.parameters]:
            yield f"execution_accelerators: {', '.join(lost)} of cuda, for the server to say as on Triton"


def _not_read(config: ModelConfig) -> Iterator[str]:
    if any(each.parameters for each in config.optimization.execution_accelerators.cpu_execution_accelerator):
        yield "execution_accelerators: parameters of openvino, which Triton does not read either"


def _without(provider: Provider, why: str) -> str:
    return f"execution_accelerators: {why}, the graph runs without it{', ' if provider.loss else ''}{provider.loss}"
