"""Executes ONNX graphs, on the execution providers that the config and the placement ask for."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from nemoport.errors import DamagedInput, MachineError, MissingPackage, NemoportError, UnsupportedInput
from nemoport.runner.batching import merged
from nemoport.runner.blame import refused
from nemoport.runner.config_rules import check_tensors
from nemoport.runner.datatypes import BY_NAME, BYTES
from nemoport.runner.devices import visible_gpus
from nemoport.runner.execution_providers import CPU, CUDA, Provider, Providers, not_taken, providers, started
from nemoport.runner.generation.graph import GraphExecutor, is_decoder
from nemoport.runner.generation.loading import generator
from nemoport.runner.generation.texts import Generator
from nemoport.runner.instances import Placement
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.refusal import Refusal
from nemoport.runner.session_options import SessionOptions, session_options
from nemoport.runner.signature import TensorSignature, check_agreement, completed
from nemoport.runner.tensors import Array

log = logging.getLogger(__name__)

_DATATYPES = {  # what onnxruntime calls a tensor type
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(bfloat16)": "BF16",
    "tensor(string)": "BYTES",
}
_ENUMS = {"graph_optimization_level": ort.GraphOptimizationLevel, "execution_mode": ort.ExecutionMode}
_BF16 = BY_NAME["BF16"]
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def gpus() -> tuple[int, ...]:
    if CUDA not in ort.get_available_providers():
        return ()
    return visible_gpus()


def load(version_directory: Path, config: ModelConfig, placement: Placement, *, complete: bool) -> OnnxSession:
    """Load by path, so that external data beside the file is found.

    The file may be a directory of the same name that holds the file, as Triton allows for large models.
    """
    path = version_directory / config.default_model_filename
    path = path / path.name if path.is_dir() else path
    if not path.is_file():
        raise DamagedInput(
            f"model '{config.name}' has no file {path}; its config asks for it by default_model_filename"
        )
    wanted = providers(config, placement.gpu, ort.get_available_providers())
    options = session_options(config, placement)
    session = _session(path, config, placement, wanted, options)
    notes = (*wanted.notes, *options.notes, *not_taken(wanted, session.get_providers()))
    return OnnxSession(session, version_directory, config, _run_options(options), notes, complete=complete)


class OnnxSession:
    """`inputs` and `outputs` are the signature of the graph; one session serves any number of threads."""

    def __init__(
        self,
        session: Any,
        directory: Path,
        config: ModelConfig,
        run_options: Any,
        notes: tuple[str, ...],
        *,
        complete: bool,
    ) -> None:
        self.inputs = {node.name: _signature(node, config.name) for node in session.get_inputs()}
        self.outputs = {node.name: _signature(node, config.name) for node in session.get_outputs()}
        self.config = completed(config, self.inputs, self.outputs) if complete else config
        check_tensors(self.config)
        check_agreement(self.config, self.inputs, self.outputs)
        self.generator = _generator(session, directory, self.config, run_options)
        self.notes = notes
        self._session, self._run_options = session, run_options
        signature = (*self.inputs.values(), *self.outputs.values())
        self._run = _run_values if any(tensor.datatype is _BF16 for tensor in signature) else _run_arrays
        self.run = merged(self.execute)
        self.computes_only = session.get_providers() == [CPU]

    def close(self) -> None:
        """onnxruntime frees what it holds with its session."""
        if self.generator is not None:
            self.generator.close()

    def execute(self, feeds: Mapping[str, Array], wanted: Sequence[str]) -> list[Array]:
        ready = {name: _feed(self.inputs[name], array) for name, array in feeds.items()}
        try:
            arrays = self._run(self._session, wanted, ready, self._run_options)
        except Exception as error:  # onnxruntime has no common class of its own
            raise refused(error) from error
        return [
            _as_bytes(array) if self.outputs[name].datatype is BYTES else array
            for name, array in zip(wanted, arrays, strict=True)
        ]


def _generator(session: Any, directory: Path, config: ModelConfig, run_options: Any) -> Generator | None:
    """A decoder answers tensors whether or not it can answer text."""
    if not is_decoder(session):
        return None
    try:
        return generator(directory, config, GraphExecutor(session, run_options))
    except MissingPackage as error:
        log.warning("model '%s' answers tensors only: %s", config.name, error)
        return None


def _run_arrays(session: Any, wanted: Sequence[str], feeds: Mapping[str, Array], options: Any) -> list[Array]:
    arrays: list[Array] = session.run(wanted, feeds, options)
    return arrays


def _run_values(session: Any, wanted: Sequence[str], feeds: Mapping[str, Array], options: Any) -> list[Array]:
    """For graphs with bfloat16 at their ends, whose 16-bit words onnxruntime does not exchange with numpy."""
    values = {name: _to_value(array) for name, array in feeds.items()}
    return [_from_value(value) for value in session.run_with_ort_values(wanted, values, options)]


def _to_value(array: Array) -> Any:
    if array.dtype != _BF16.numpy:
        return ort.OrtValue.ortvalue_from_numpy(array)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(array).view(np.uint16), _BFLOAT16)


def _from_value(value: Any) -> Array:
    if value.element_type() == _BFLOAT16:
        words = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
        return np.frombuffer(words, _BF16.numpy).reshape(value.shape())
    array: Array = value.numpy()
    return array


def _feed(tensor: TensorSignature, array: Array) -> Array:
    if tensor.datatype is BYTES:
        array = _as_text(array, tensor.name)
    return array if tensor.shape else array.reshape(())


def _as_text(array: Array, name: str) -> Array:
    """onnxruntime holds text; it would take `bytes` by their repr."""
    text = np.empty(array.shape, np.object_)
    try:
        text.reshape(-1)[:] = [element.decode() for element in array.reshape(-1)]
    except UnicodeDecodeError as error:
        raise Refusal(f"input '{name}' is not UTF-8 text, which onnxruntime needs: {error}") from None
    return text


def _as_bytes(array: Array) -> Array:
    encoded = np.empty(array.shape, np.object_)
    encoded.reshape(-1)[:] = [element.encode() for element in array.reshape(-1)]
    return encoded


def _session(path: Path, config: ModelConfig, placement: Placement, wanted: Providers, options: SessionOptions) -> Any:
    """Never with other providers than those that are wanted: ONNX Runtime's own second try would lose their options."""

    def make(row: Sequence[Provider]) -> Any:
        providers = [(provider.name, dict(provider.options)) for provider in row]
        return ort.InferenceSession(path, _options(options), providers=providers, enable_fallback=0)

    try:
        session = started(make, wanted)
    except Exception as error:  # onnxruntime has no common class of its own
        if placement.gpu is not None and isinstance(error, RuntimeError | ValueError):  # what providers raise
            raise _no_provider(config, placement, f" ({error})") from error
        raise _load_error(error, path, config) from error
    if placement.gpu is not None and CUDA not in session.get_providers():
        raise _no_provider(config, placement, "")
    return session


def _no_provider(config: ModelConfig, placement: Placement, why: str) -> MachineError:
    return MachineError(
        f"model '{config.name}' is placed on GPU {placement.gpu}, and onnxruntime could not start its CUDA "
        f"provider, or one that the config asks for{why}; check the driver and the CUDA libraries, or use KIND_CPU"
    )


def _options(said: SessionOptions) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    for name, value in said.attributes.items():
        setattr(options, name, getattr(_ENUMS[name], str(value)) if name in _ENUMS else value)
    for name, text in said.session_entries.items():
        options.add_session_config_entry(name, text)
    return options


def _run_options(said: SessionOptions) -> Any:
    """For every run; None where nothing is said of them."""
    if not said.run_entries:
        return None
    options = ort.RunOptions()
    for name, text in said.run_entries.items():
        options.add_run_config_entry(name, text)
    return options


def _load_error(error: Exception, path: Path, config: ModelConfig) -> NemoportError:
    if "NOT_IMPLEMENTED" in str(error) and _has_bfloat16(path):
        return MachineError(
            f"model '{config.name}' computes in bfloat16 ({path}), for which onnxruntime has no kernels on the CPU; "
            f"serve it on a GPU, or convert it with --dtype float32 ({error})"
        )
    return DamagedInput(f"onnxruntime cannot load {path}: {error}")


def _has_bfloat16(path: Path) -> bool:
    import onnx  # only to explain a failure

    graph = onnx.load(path, load_external_data=False).graph
    ends = [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)]
    casts = [a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute if a.name == "to"]
    return _BFLOAT16 in (*ends, *casts, *(tensor.data_type for tensor in graph.initializer))


def _signature(node: Any, model: str) -> TensorSignature:
    if node.type not in _DATATYPES:
        raise UnsupportedInput(
            f"model '{model}' has tensor '{node.name}' of type {node.type}, which Triton cannot carry"
        )
    shape = tuple(dim if isinstance(dim, int) and dim >= 0 else -1 for dim in node.shape)
    return TensorSignature(node.name, BY_NAME[_DATATYPES[node.type]], shape)
