"""Python models, the same files for a real tritonserver and for this one."""

from __future__ import annotations

from pathlib import Path

ADD_SUB = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        for name in ("INPUT0", "INPUT1"):
            config.add_input({"name": name, "data_type": "TYPE_INT32", "dims": [16]})
        for name in ("OUTPUT0", "OUTPUT1"):
            config.add_output({"name": name, "data_type": "TYPE_INT32", "dims": [16]})
        config.set_max_batch_size(8)
        return config

    def initialize(self, args):
        config = json.loads(args["model_config"])
        output = pb_utils.get_output_config_by_name(config, "OUTPUT0")
        self.dtype = pb_utils.triton_string_to_numpy(output["data_type"])

    def execute(self, requests):
        responses = []
        for request in requests:
            a = pb_utils.get_input_tensor_by_name(request, "INPUT0").as_numpy()
            b = pb_utils.get_input_tensor_by_name(request, "INPUT1").as_numpy()
            outputs = [pb_utils.Tensor("OUTPUT0", (a + b).astype(self.dtype)), pb_utils.Tensor("OUTPUT1", a - b)]
            responses.append(pb_utils.InferenceResponse(output_tensors=outputs))
        return responses
"""

TEXT = """
import numpy as np
import triton_python_backend_utils as pb_utils
from words import SUFFIX

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            words = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
            upper = np.array([[word.decode().upper() + SUFFIX for word in row] for row in words], dtype=object)
            lengths = np.array([[len(word) for word in row] for row in words], dtype=np.int64)
            responses.append(pb_utils.InferenceResponse(
                [pb_utils.Tensor("UPPER", upper), pb_utils.Tensor("LENGTH", lengths)]))
        return responses
"""
TEXT_CONFIG = """backend: "python" max_batch_size: 4
input { name: "TEXT" data_type: TYPE_STRING dims: -1 }
output [ { name: "UPPER" data_type: TYPE_STRING dims: -1 }, { name: "LENGTH" data_type: TYPE_INT64 dims: -1 } ]"""

ECHO = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        arrays = [pb_utils.get_input_tensor_by_name(request, "X").as_numpy() for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", array)]) for array in arrays]
"""

FAILING = """
import numpy as np
import triton_python_backend_utils as pb_utils

CODES = ["UNKNOWN", "INTERNAL", "NOT_FOUND", "INVALID_ARG", "UNAVAILABLE", "UNSUPPORTED", "ALREADY_EXISTS", "CANCELLED"]

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            which = int(pb_utils.get_input_tensor_by_name(request, "X").as_numpy()[0])
            if which < 0:
                raise ValueError("this one raises")
            if which == 100:
                return []
            if which == 101:
                return None
            if which == 102:
                responses.append(pb_utils.InferenceResponse(error=pb_utils.TritonError("plain error")))
                continue
            error = pb_utils.TritonError("said by the model", getattr(pb_utils.TritonError, CODES[which]))
            responses.append(pb_utils.InferenceResponse(error=error))
        return responses
"""
X_CONFIG = """backend: "python"
input { name: "X" data_type: TYPE_INT32 dims: 1 } output { name: "Y" data_type: TYPE_INT32 dims: 1 }"""

REPEAT = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            count = int(pb_utils.get_input_tensor_by_name(request, "X").as_numpy()[0])
            sender = request.get_response_sender()
            if count < 0:
                error = pb_utils.TritonError("negative", pb_utils.TritonError.INVALID_ARG)
                sender.send(pb_utils.InferenceResponse(error=error), pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
                continue
            for at in range(count):
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([at], np.int32))]))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None
"""
REPEAT_CONFIG = X_CONFIG + " model_transaction_policy { decoupled: true }"

SLOW = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        time.sleep(0.3)
        output = pb_utils.Tensor("Y", np.array([[len(requests)]], np.int32))
        return [pb_utils.InferenceResponse([output]) for _ in requests]
"""
SLOW_CONFIG = """backend: "python" max_batch_size: 4
input { name: "X" data_type: TYPE_INT32 dims: 1 } output { name: "Y" data_type: TYPE_INT32 dims: 1 }
dynamic_batching { default_queue_policy { max_queue_size: 2 } }"""

ABOUT = """
import json
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.args = args

    def execute(self, requests):
        responses = []
        for request in requests:
            config = json.loads(self.args["model_config"])
            about = {
                "arguments": sorted(self.args),
                "instance": self.args["model_instance_name"],
                "kind": self.args["model_instance_kind"],
                "version": self.args["model_version"],
                "repository": self.args["model_repository"].rsplit("/", 1)[-1],
                "config": sorted(config),
                "id": request.request_id(),
                "wanted": sorted(request.requested_output_names()),
                "parameters": json.loads(request.parameters() or "{}"),
                "cancelled": request.is_cancelled(),
                "timeout": request.timeout(),
                "correlation": request.correlation_id(),
                "input": str(pb_utils.get_input_tensor_by_name(request, "X").as_numpy().dtype),
                "shape": list(pb_utils.get_input_tensor_by_name(request, "X").shape()),
                "types": [np.dtype(pb_utils.triton_to_numpy_type(at)).name for at in range(1, 14)],
                "numbers": [pb_utils.numpy_to_triton_type(each) for each in (np.int32, np.float16, np.object_)],
            }
            output = pb_utils.Tensor("ABOUT", np.array([json.dumps(about)], dtype=object))
            responses.append(pb_utils.InferenceResponse([output]))
        return responses
"""
ABOUT_CONFIG = """backend: "python"
input { name: "X" data_type: TYPE_FP32 dims: [-1, 2] } output { name: "ABOUT" data_type: TYPE_STRING dims: 1 }
instance_group { count: 1 kind: KIND_CPU }"""


def write_python(repository: Path, name: str, code: str, config: str = "", version: str = "1", **beside: str) -> Path:
    """`beside` are modules next to model.py."""
    directory = repository / name / version
    directory.mkdir(parents=True)
    (directory / "model.py").write_text(code)
    for module, content in beside.items():
        (directory / f"{module}.py").write_text(content)
    if config:
        (repository / name / "config.pbtxt").write_text(config)
    return repository / name


def write_all(repository: Path) -> None:
    write_python(repository, "add_sub", ADD_SUB)
    write_python(repository, "text", TEXT, TEXT_CONFIG, words='SUFFIX = "!"')
    write_python(repository, "failing", FAILING, X_CONFIG)
    write_python(repository, "echo", ECHO, X_CONFIG)
    write_python(repository, "repeat", REPEAT, REPEAT_CONFIG)
    write_python(repository, "slow", SLOW, SLOW_CONFIG)
    write_python(repository, "about", ABOUT, ABOUT_CONFIG)
