"""The python backend by itself: what a model may do, and what becomes of one that does something else."""

from __future__ import annotations

import gc
import json
import queue
import sys
import urllib.request
from collections.abc import Callable
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from nemoport.errors import NemoportError
from nemoport.runner.model import ModelVersion, load_version
from nemoport.runner.python_model import triton_python_backend_utils as pb_utils
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import Response, request_of
from nemoport.runner.serve import Addresses, serving_all
from nemoport.runner.server import start
from nemoport.runner.statistics import Failure

from .python_models import ADD_SUB, REPEAT_CONFIG, TEXT, TEXT_CONFIG, X_CONFIG, write_python
from .test_control import until

HEAD = "import sys, numpy as np\nimport triton_python_backend_utils as pb_utils\nclass TritonPythonModel:\n"
ECHO = "[pb_utils.Tensor('Y', pb_utils.get_input_tensor_by_name(r, 'X').as_numpy()) for r in requests]"
ONE = request_of({"X": np.array([1], np.int32)})


def model(tmp_path: Path, body: str, config: str = X_CONFIG) -> ModelVersion:
    return load_version(write_python(tmp_path, "m", HEAD + body, config), "1")


def responses(loaded: ModelVersion) -> list[Any]:
    """All that a decoupled model says."""
    answers: queue.SimpleQueue[Response] = queue.SimpleQueue()
    loaded.submit(ONE, answers.put)
    found = [answers.get(timeout=10)]
    while not found[-1].last:
        found.append(answers.get(timeout=10))
    return [each.content for each in found]


def test_two_models_have_modules_of_one_name(tmp_path: Path) -> None:
    words = request_of({"TEXT": np.array([[b"a"]], np.object_)})
    for name, suffix in (("one", "1"), ("two", "2")):
        made = load_version(write_python(tmp_path, name, TEXT, TEXT_CONFIG, words=f"SUFFIX = '{suffix}'"), "1")
        assert made.infer(words).arrays()["UPPER"].tolist() == [[b"A" + suffix.encode()]]
    assert "words" not in sys.modules
    assert not any(str(tmp_path) in place for place in sys.path)


def test_inputs_may_be_written_to(tmp_path: Path) -> None:
    made = model(
        tmp_path,
        """    def execute(self, requests):
        made = []
        for r in requests:
            x = pb_utils.get_input_tensor_by_name(r, 'X').as_numpy()
            x += 1
            made.append(pb_utils.InferenceResponse([pb_utils.Tensor('Y', x)]))
        return made
""",
    )
    sent = np.array([1], np.int32)
    sent.flags.writeable = False
    assert made.infer(request_of({"X": sent})).arrays()["Y"].tolist() == [2]


def test_each_instance_is_an_object_that_is_told_when_it_ends(tmp_path: Path) -> None:
    body = """    def initialize(self, args):
        self.name = args['model_instance_name']
        LOG.append(self.name)
    def execute(self, requests):
        return []
    def finalize(self):
        LOG.append('end of ' + self.name)
LOG = []
"""
    made = model(tmp_path, body, X_CONFIG + " instance_group { count: 2 kind: KIND_CPU }")
    session: Any = made.scheduler
    log = sys.modules[type(session._run.__self__._objects[0]).__module__].LOG
    assert log == ["m_0_0", "m_0_1"]
    del made, session
    gc.collect()
    assert log[2:] == ["end of m_0_0", "end of m_0_1"]


def test_one_that_fails_at_its_end_keeps_nobody_from_ending(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    body = """    def initialize(self, args):
        self.name = args['model_instance_name']
    def execute(self, requests):
        return []
    def finalize(self):
        LOG.append('end of ' + self.name)
        raise RuntimeError('a bad end')
LOG = []
"""
    made = model(tmp_path, body, X_CONFIG + " instance_group { count: 2 kind: KIND_CPU }")
    session: Any = made.scheduler
    log = sys.modules[type(session._run.__self__._objects[0]).__module__].LOG
    made.close()
    assert log == ["end of m_0_0", "end of m_0_1"]
    assert "a bad end" in caplog.text


@pytest.mark.parametrize(
    "body, message",
    [
        ("    pass\n", "has no function execute"),
        (
            "    def initialize(self, args): raise KeyError('here')\n",
            r"KeyError: 'here'\n\nAt:\n  .*model.py\(4\): ini",
        ),
        ("    def execute(self, requests: 1 1\n", "SyntaxError"),
        ("    def initialize(self, args): sys.exit(3)\n", r"SystemExit: 3\n\nAt:\n  .*model.py\(4\): ini"),
        ("    sys.exit(3)\n", "SystemExit: 3"),
        ("    import nothing_of_this_name\n", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("    x = pb_utils.MetricFamily\n", "MetricFamily is not done by this server"),
        ("    x = pb_utils.InferenceRequest(model_name='n')\n", "business logic scripting"),
    ],
)
def test_a_model_that_does_not_load_says_where(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(NemoportError, match=message):
        model(tmp_path, body)


@pytest.mark.parametrize(
    "code, message",
    [
        ("1 / 0", r"model 'm_0', message: ZeroDivisionError: division by zero\n\nAt:\n  .*model.py\(5\): execute\n"),
        ("sys.exit(3)", r"SystemExit: 3\n\nAt:\n  .*model.py\(5\): execute\n"),
        ("return 3", "Expected a list in the execute return"),
        ("return [3]", "found type 'int'"),
        ("return [pb_utils.InferenceResponse([3])]", "holds a int, which is no Tensor"),
        ("return [pb_utils.InferenceResponse([pb_utils.Tensor('Y', np.zeros(1))])]", "as float64, and its config says"),
        ("return [None]", "let go of the request before its final response"),
    ],
)
def test_a_model_that_answers_wrongly_fails_the_request_only(tmp_path: Path, code: str, message: str) -> None:
    made = model(tmp_path, f"    def execute(self, requests):\n        {code}\n")
    for _ in range(2):
        with pytest.raises(Refusal, match=message):
            made.infer(ONE)


def test_a_model_may_answer_with_its_sender_from_a_thread(tmp_path: Path) -> None:
    body = f"""    def execute(self, requests):
        import threading
        threading.Timer(0.05, self.answer, [requests]).start()
        return [None] * len(requests)
    def answer(self, requests):
        for request, tensor in zip(requests, {ECHO}):
            request.get_response_sender().send(pb_utils.InferenceResponse([tensor]), 1)
"""
    assert model(tmp_path, body).infer(ONE).arrays()["Y"].tolist() == [1]


@pytest.mark.parametrize(
    "code, said",
    [
        ("return [1]", ["using the decoupled mode and the execute function must return None"]),
        ("raise ValueError('no')", ["ValueError: no"]),
        ("s.send(flags=1); raise ValueError('late')", [None]),
        ("pass", ["let go of the request"]),
        ("s.send(flags=1); s.send(flags=1)", [None]),
        ("s.send(flags=7)", ["Unsupported flag provided: 7"]),
        ("s.send()", ["must be provided"]),
    ],
)
def test_a_decoupled_request_always_ends(tmp_path: Path, code: str, said: list[str | None]) -> None:
    body = f"""    def execute(self, requests):
        s = requests[0].get_response_sender()
        del requests
        {code}
"""
    found = responses(model(tmp_path, body, REPEAT_CONFIG))
    assert len(found) == len(said)
    for content, part in zip(found, said, strict=True):
        assert content is None if part is None else part in str(content)


def test_a_client_that_leaves_is_known_to_the_model(tmp_path: Path) -> None:
    body = """    def execute(self, requests):
        import time
        for request in requests:
            sender = request.get_response_sender()
            end = time.monotonic() + 20
            sender.send(pb_utils.InferenceResponse([pb_utils.Tensor('Y', np.array([0], np.int32))]))
            while not request.is_cancelled() and time.monotonic() < end:
                time.sleep(0.01)
            LEFT.append(request.is_cancelled())
            sender.send(flags=1)
LEFT = []
"""
    write_python(tmp_path, "m", HEAD + body, REPEAT_CONFIG)
    server = start([tmp_path])
    with serving_all(server) as addresses:
        asked = urllib.request.Request(
            f"http://{addresses.http}/v2/models/m/generate_stream", json.dumps({"X": 1}).encode()
        )
        with urllib.request.urlopen(asked, timeout=10) as stream:
            assert stream.readline().startswith(b'data: {"Y":0')
        session: Any = server.find("m").scheduler
        left = sys.modules[type(session._run.__self__._objects[0]).__module__].LEFT
        until(lambda: left == [True])


WAITS = """    def execute(self, requests):
        import time
        end = time.monotonic() + 20
        while not all(request.is_cancelled() for request in requests) and time.monotonic() < end:
            time.sleep(0.01)
        SEEN.append([int(r.inputs()[0].as_numpy()[0]) for r in requests if r.is_cancelled()])
        return [pb_utils.InferenceResponse([pb_utils.Tensor('Y', np.array([0], np.int32))]) for _ in requests]
SEEN = []
"""


@pytest.mark.parametrize("door", ["infer", "generate", "generate_stream", "grpc"])
def test_a_client_that_waits_no_longer_is_known_to_the_model_and_leaves_the_queue(tmp_path: Path, door: str) -> None:
    write_python(tmp_path, "m", HEAD + WAITS, X_CONFIG)
    server = start([tmp_path])
    statistics = server.find("m").statistics

    scheduler: Any = server.find("m").scheduler

    def leave(addresses: Addresses, number: int) -> Callable[[], object]:
        x = {"name": "X", "datatype": "INT32", "shape": [1]}
        if door == "grpc":
            channel = grpc.insecure_channel(addresses.grpc)
            request = pb.ModelInferRequest(model_name="m", inputs=[pb.ModelInferRequest.InferInputTensor(**x)])
            request.raw_input_contents.append(number.to_bytes(4, "little"))
            call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer.future(request)
            return lambda: call.cancel() and channel.close()
        connection = HTTPConnection(addresses.http)
        body = {"inputs": [x | {"data": [number]}]} if door == "infer" else {"X": number}
        connection.request("POST", f"/v2/models/m/{door}", json.dumps(body))
        return connection.close

    with serving_all(server) as addresses:
        first = leave(addresses, 1)
        until(lambda: statistics.pending == 0 and scheduler._executing == 1)
        second = leave(addresses, 2)
        until(lambda: statistics.pending == 1)
        second()
        first()
        until(lambda: statistics.failures[Failure.CANCELED] == 1)
        assert sys.modules[type(scheduler._run.__self__._objects[0]).__module__].SEEN == [[1]]


def test_completion_agrees_with_the_config(tmp_path: Path) -> None:
    config = 'backend: "python" input { name: "INPUT0" data_type: TYPE_FP32 dims: 16 }'
    with pytest.raises(NemoportError, match="expects datatype TYPE_FP32 for input 'INPUT0', model provides TYPE_INT32"):
        load_version(write_python(tmp_path, "m", ADD_SUB, config), "1")
    with pytest.raises(NemoportError, match="specified max_batch_size 9, but in auto-complete-config"):
        load_version(write_python(tmp_path, "n", ADD_SUB, 'backend: "python" max_batch_size: 9'), "1")


def test_tensors_take_what_triton_carries() -> None:
    assert pb_utils.Tensor("t", np.array(["zwölf", b"x", 3], dtype=object)).as_numpy().tolist() == [
        "zwölf".encode(),
        b"x",
        b"3",
    ]
    assert pb_utils.Tensor("t", np.array([b"ab", b"c"])).triton_dtype() == "TYPE_STRING"
    assert pb_utils.Tensor.from_dlpack("t", np.arange(3)).as_numpy().tolist() == [0, 1, 2]
    assert pb_utils.Tensor("t", np.array(1, np.float32)).shape() == ()
    with pytest.raises(ValueError, match="which Triton cannot carry"):
        pb_utils.Tensor("t", np.array([1j]))
