"""Ensembles of which a member answers any number of times, with their members: the same files for both servers."""

from __future__ import annotations

from pathlib import Path

from .python_models import ECHO, REPEAT, REPEAT_CONFIG, X_CONFIG, write_python
from .test_ensembles import ensemble

TWICE = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
            if x.ravel()[0] == 5:
                error = pb_utils.TritonError("five is too many", pb_utils.TritonError.INVALID_ARG)
                responses.append(pb_utils.InferenceResponse(error=error))
                continue
            given = pb_utils.get_input_tensor_by_name(request, "MORE")
            y = 2 * x if given is None else x + given.as_numpy()
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", y)]))
        return responses
"""
"""2 X, or X + MORE; an error for 5."""
TWICE_CONFIG = X_CONFIG + ' input { name: "MORE" data_type: TYPE_INT32 dims: 1 optional: true }'
CLOSING = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            x = pb_utils.get_input_tensor_by_name(request, "X").as_numpy()
            wanted = request.requested_output_names()
            if not x.any():
                sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            for left in reversed(range(int(x.ravel()[0]))):
                outputs = [pb_utils.Tensor("Y", np.full_like(x, left))]
                if left % 2 and "Z" in wanted:
                    outputs.append(pb_utils.Tensor("Z", np.full_like(x, 10 + left)))
                last = 0 if left else pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                sender.send(pb_utils.InferenceResponse(outputs), last)
"""
"""Counts down to 0, and says with it that it is the last. Every other answer has a Z."""
CLOSING_CONFIG = REPEAT_CONFIG + ' output { name: "Z" data_type: TYPE_INT32 dims: 1 }'
STUMBLING = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for at in range(4):
                y, error = np.array([at], np.int32), pb_utils.TritonError("stumbled", pb_utils.TritonError.NOT_FOUND)
                said = {"error": error} if at == 2 else {"output_tensors": [pb_utils.Tensor("Y", y)]}
                sender.send(pb_utils.InferenceResponse(**said))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
"""Its third answer of four is an error."""
SILENT = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            request.get_response_sender().send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return [None for _ in requests]
"""
ENDLESS = """
import time
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.log = args["model_repository"] + "/log"

    def execute(self, requests):
        for request in requests:
            sender, name = request.get_response_sender(), request.request_id()
            end = time.monotonic() + 3
            while time.monotonic() < end and not sender.is_cancelled():
                sender.send(pb_utils.InferenceResponse([pb_utils.Tensor("Y", np.array([0], np.int32))]))
                time.sleep(0.05)
            with open(self.log, "a") as stream:
                stream.write(name + (" left" if sender.is_cancelled() else " stayed") + "\\n")
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
"""Answers until it is told that its client has left, for three seconds at most, and writes down which it was."""


def step(model: str, takes: str, gives: str) -> str:
    """`takes` and `gives` are pairs, a member's tensor and the ensemble's: `X=A MORE=B`."""
    maps = [("input_map", pair) for pair in takes.split()] + [("output_map", pair) for pair in gives.split()]
    mapped = " ".join('{} {{ key: "{}" value: "{}" }}'.format(kind, *pair.split("=")) for kind, pair in maps)
    return f'step {{ model_name: "{model}" model_version: -1 {mapped} }}'


def tensors(inputs: str, outputs: str) -> str:
    rows = [("input", name) for name in inputs.split()] + [("output", name) for name in outputs.split()]
    return " ".join(f'{kind} {{ name: "{name}" data_type: TYPE_INT32 dims: 1 }}' for kind, name in rows)


def chain(*models: str, rest: str = "") -> str:
    """X goes through all of them to Y."""
    ends = ["X", *(f"t{at}" for at in range(len(models) - 1)), "Y"]
    steps = [step(model, f"X={ends[at]}", f"Y={ends[at + 1]}") for at, model in enumerate(models)]
    return ensemble(*reversed(steps), tensors=tensors("X", "Y"), rest=rest)


DECOUPLED = "model_transaction_policy { decoupled: true }"
MERGED = step("twice", "X=t MORE=u", "Y=Y")
XY = tensors("X", "Y")
GOOD = {
    "counts": chain("repeat"),
    "doubles": chain("repeat", "twice"),
    "before": chain("twice", "repeat"),
    "both-sides": chain("twice", "repeat", "echo", "twice"),
    "says-no": chain("repeat", "twice", rest=DECOUPLED.replace("true", "false")),
    "says-yes": chain("twice", rest=DECOUPLED),
    "closes": chain("closing"),
    "closes-twice": chain("closing", "twice"),
    "again": chain("repeat", "repeat"),
    "again-and-again": chain("closing", "repeat", "echo", "closing"),
    "nested": chain("doubles", "echo"),
    "nested-behind": chain("repeat", "doubles"),
    "stumbles": chain("stumbling"),
    "silenced": chain("silent", "echo"),
    "batch": chain("rows", "twice", rest="max_batch_size: 4"),
    "row": chain("rows", "twice"),
    "forked": ensemble(
        *(step("repeat", "X=X", "Y=s"), step("echo", "X=s", "Y=t"), step("twice", "X=s", "Y=u"), MERGED),
        tensors=XY,
        rest="",
    ),
    "two-outputs": ensemble(
        step("closing", "X=X", "Y=s Z=Z"), step("echo", "X=s", "Y=Y"), tensors=tensors("X", "Y Z"), rest=""
    ),
    "half-left-out": ensemble(step("closing", "X=X", "Y=t Z=u"), MERGED, tensors=XY, rest=""),
    "choice": ensemble(
        step("twice", "X=X MORE=M", "Y=t"),
        step("repeat", "X=t", "Y=Y"),
        tensors=f'{XY} input {{ name: "M" data_type: TYPE_INT32 dims: 1 optional: true }}',
        rest="",
    ),
}
OVERTAKEN = {
    "stumbles-behind": chain("stumbling", "echo"),
    "nested-and-fails": chain("doubles", "echo", "echo"),
    "left-out": ensemble(
        step("closing", "X=X", "Y=Y Z=u"), step("echo", "X=u", "Y=W"), tensors=tensors("X", "Y W"), rest=""
    ),
}
"""An error may come before answers that are under way, which then never come."""
LED = {"led": chain("echo", "endless")}
BAD = {
    "merges-two": ensemble(step("repeat", "X=X", "Y=t"), step("closing", "X=X", "Y=u"), MERGED, tensors=XY, rest=""),
    "merges-input": ensemble(step("repeat", "X=X", "Y=t"), MERGED.replace('"u"', '"X"'), tensors=XY, rest=""),
    "merges-levels": ensemble(step("repeat", "X=X", "Y=t"), step("repeat", "X=t", "Y=u"), MERGED, tensors=XY, rest=""),
    "answers-two": ensemble(
        step("repeat", "X=X", "Y=Y"), step("twice", "X=X", "Y=W"), tensors=tensors("X", "Y W"), rest=""
    ),
    "known-from-its-reader": ensemble(
        step("echo", "X=v", "Y=Y"),
        step("repeat", "X=X", "Y=t"),
        step("twice", "X=t MORE=X", "Y=v"),
        tensors=XY,
        rest="",
    ),
}


def write_members(root: Path) -> None:
    for name, code, config in (
        ("repeat", REPEAT, REPEAT_CONFIG),
        ("twice", TWICE, TWICE_CONFIG),
        ("echo", ECHO, X_CONFIG),
        ("closing", CLOSING, CLOSING_CONFIG),
        ("rows", CLOSING, CLOSING_CONFIG + " max_batch_size: 4"),
        ("stumbling", STUMBLING, REPEAT_CONFIG),
        ("silent", SILENT, X_CONFIG),
        ("endless", ENDLESS, REPEAT_CONFIG),
    ):
        write_python(root, name, code, config)


def write_ensembles(root: Path, configs: dict[str, str]) -> None:
    for name, config in configs.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "config.pbtxt").write_text(config)
