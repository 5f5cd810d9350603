"""The module that Python models import under this name: tensors, requests, responses, errors.

Names and behaviour are those of Triton's python backend. What this server does not do raises and says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemoport.runner.datatypes import DATATYPES
from nemoport.runner.python_model.auto_complete import ModelConfig
from nemoport.runner.python_model.tensor import Tensor

__all__ = [
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_END",
    "TRITONSERVER_REQUEST_FLAG_SEQUENCE_START",
    "TRITONSERVER_REQUEST_RELEASE_ALL",
    "TRITONSERVER_REQUEST_RELEASE_RESCHEDULE",
    "TRITONSERVER_RESPONSE_COMPLETE_FINAL",
    "TRITON_STRING_TO_NUMPY",
    "InferenceRequest",
    "InferenceResponse",
    "Logger",
    "ModelConfig",
    "Tensor",
    "TritonError",
    "TritonModelException",
    "get_input_config_by_name",
    "get_input_tensor_by_name",
    "get_model_dir",
    "get_output_config_by_name",
    "get_output_tensor_by_name",
    "numpy_to_triton_type",
    "triton_string_to_numpy",
    "triton_to_numpy_type",
    "using_decoupled_model_transaction_policy",
]

TRITONSERVER_REQUEST_FLAG_SEQUENCE_START = 1
TRITONSERVER_REQUEST_FLAG_SEQUENCE_END = 2
TRITONSERVER_RESPONSE_COMPLETE_FINAL = 1
TRITONSERVER_REQUEST_RELEASE_ALL = 1
TRITONSERVER_REQUEST_RELEASE_RESCHEDULE = 2

_INTEGERS = ["UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"]
_ORDER = ["BOOL", *_INTEGERS, "FP16", "FP32", "FP64", "BYTES"]  # counted from 1
_SCALARS = {row.name: row.numpy.type for row in DATATYPES}
TRITON_STRING_TO_NUMPY: dict[str, Any] = {
    row.config: bool if row.name == "BOOL" else row.numpy.type for row in DATATYPES if row.name in _ORDER
}
"""BF16 has none, as on Triton."""


class TritonModelException(Exception):
    """What Triton's own calls raise in a model."""


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = str(message), code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(
        self,
        output_tensors: Iterable[Tensor] = (),
        error: TritonError | None = None,
        parameters: Mapping[str, Any] | str | None = None,
    ) -> None:
        self._tensors, self._error = list(output_tensors or ()), error
        self._parameters = json.loads(parameters) if isinstance(parameters, str) and parameters else parameters or {}
        for tensor in self._tensors:
            if not isinstance(tensor, Tensor):
                raise TritonModelException(f"output_tensors holds a {type(tensor).__name__}, which is no Tensor")

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def parameters(self) -> str:
        return json.dumps(self._parameters)


class InferenceRequest:
    """Made by the server. A model that makes one asks for other models (BLS), which this server does not do."""

    def __init__(self, *_: Any, **said: Any) -> None:
        raise TritonModelException(
            "requests of a model to other models (business logic scripting) are not done by this server; "
            "use an ensemble, or serve this model on Triton"
        )

    def inputs(self) -> list[Tensor]:
        return self._inputs

    def request_id(self) -> str:
        return self._id

    def correlation_id(self) -> int | str:
        return self._correlation_id

    def flags(self) -> int:
        return self._flags

    def model_name(self) -> str:
        return self._model

    def model_version(self) -> int:
        return self._version

    def requested_output_names(self) -> list[str]:
        return self._wanted

    def parameters(self) -> str:
        """JSON, without those that mean something to the server."""
        return json.dumps(self._parameters)

    def priority(self) -> int:
        return self._priority

    def timeout(self) -> int:
        return self._timeout

    def is_cancelled(self) -> bool:
        return self._is_cancelled()

    def get_response_sender(self) -> Any:
        return self._sender

    def set_release_flags(self, flags: int) -> None:
        if flags != TRITONSERVER_REQUEST_RELEASE_ALL:
            raise TritonModelException("rescheduling a request is not done by this server")

    _inputs: list[Tensor]
    _wanted: list[str]
    _id: str
    _model: str
    _version: int
    _parameters: dict[str, Any]
    _priority: int
    _timeout: int
    _flags: int
    _correlation_id: int | str
    _is_cancelled: Callable[[], bool]
    _sender: Any


def get_input_tensor_by_name(inference_request: InferenceRequest, name: str) -> Tensor | None:
    return next((tensor for tensor in inference_request.inputs() if tensor.name() == name), None)


def get_output_tensor_by_name(inference_response: InferenceResponse, name: str) -> Tensor | None:
    return next((tensor for tensor in inference_response.output_tensors() if tensor.name() == name), None)


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return _named(model_config.get("input", ()), name)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    return _named(model_config.get("output", ()), name)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


def triton_string_to_numpy(triton_type_string: str) -> Any:
    return TRITON_STRING_TO_NUMPY[triton_type_string]


def triton_to_numpy_type(data_type: int) -> Any:
    return _SCALARS[_ORDER[data_type - 1]] if 0 < data_type <= len(_ORDER) else None


def numpy_to_triton_type(data_type: Any) -> int | None:
    wanted = np.dtype(data_type)
    kind = np.object_ if wanted.kind == "S" else wanted.type
    return next((at for at, name in enumerate(_ORDER, 1) if _SCALARS[name] is kind), None)


def get_model_dir() -> str:
    """The version directory of the model that asks: where its model.py is."""
    import sys

    return str(Path(sys._getframe(1).f_globals["__file__"]).parent)


class Logger:
    """To the log of the server."""

    INFO, WARNING, ERROR, VERBOSE = logging.INFO, logging.WARNING, logging.ERROR, logging.DEBUG
    _log = logging.getLogger("nemoport.python_model")

    @classmethod
    def log(cls, message: str, level: int = INFO) -> None:
        cls._log.log(level, "%s", message)

    @classmethod
    def log_info(cls, message: str) -> None:
        cls.log(message, cls.INFO)

    @classmethod
    def log_warn(cls, message: str) -> None:
        cls.log(message, cls.WARNING)

    @classmethod
    def log_error(cls, message: str) -> None:
        cls.log(message, cls.ERROR)

    @classmethod
    def log_verbose(cls, message: str) -> None:
        cls.log(message, cls.VERBOSE)


def _named(tensors: Sequence[dict[str, Any]], name: str) -> dict[str, Any] | None:
    return next((tensor for tensor in tensors if tensor["name"] == name), None)


def __getattr__(name: str) -> Any:
    raise AttributeError(
        f"triton_python_backend_utils.{name} is not done by this server; there are {', '.join(sorted(__all__))}"
    )
