"""Ensembles of which a member answers any number of times: the same on a real tritonserver and on this one."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import service_pb2_grpc
from tritonserver import tritonserver

from nemoport.runner.model_config import ModelConfig
from nemoport.runner.overrides import Overrides
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import Response, request_of
from nemoport.runner.serve import Addresses, serving_all
from nemoport.runner.server import start

from .differences import ENSEMBLES, Said, unexplained
from .python_models import ECHO, REPEAT, REPEAT_CONFIG, X_CONFIG, write_python
from .test_ensembles import ensemble, loads
from .test_same_python_models import Call, X, generate, infer, message, over_http

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

CALLS: list[Call] = [
    *((f"/v2/models/{name}/config", None) for name in GOOD),
    *(infer(name, X) for name in ("counts", "says-no", "says-yes", "nested")),
    *(
        generate(name, verb, X=value)
        for name in GOOD
        if name != "silenced"
        for verb in ("generate", "generate_stream")
        for value in (0, 1, 2)
    ),
    *(generate(name, "generate_stream", X=-1) for name in ("counts", "doubles", "before", "nested-behind")),
    *(generate(name, "generate_stream", X=value) for name in ("doubles", "both-sides") for value in (4, 5, 9)),
    *(generate("choice", "generate_stream", X=1, M=value) for value in (2, 4)),
    generate("counts", "generate_stream"),
    *((f"/v2/models/{name}/stats", None) for name in GOOD if name != "silenced"),
]
STREAMED = [
    *([message(name, value)] for name in GOOD if name not in ("batch", "silenced") for value in (0, 3)),
    [message("both-sides", 1, id="a"), message("doubles", 8, id="b"), message("twice", 5, id="c")],
    *([message("batch", value, tensor={"shape": [1, 1]})] for value in (0, 3)),
]


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


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("repository")
    write_members(directory)
    write_ensembles(directory, GOOD | OVERTAKEN | LED)
    return directory


@pytest.fixture(scope="module")
def both(root: Path) -> Iterator[tuple[Addresses, Addresses]]:
    with tritonserver(root) as real, serving_all(start([root])) as ours:
        yield Addresses(real.http.removeprefix("http://"), real.grpc), ours


def flowing(addresses: Addresses, messages: list[Any]) -> list[tuple[str, bool, Any]]:
    """Of each answer the request, whether it is marked as the last, and the error or what its outputs are."""
    found = []
    with grpc.insecure_channel(addresses.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for answer in stub.ModelStreamInfer(iter(messages), timeout=20):
            response = answer.infer_response
            pairs = zip(response.outputs, response.raw_output_contents, strict=True)
            outputs = {out.name: (list(out.shape), np.frombuffer(raw, np.int32).tolist()) for out, raw in pairs}
            last = response.parameters["triton_final_response"].bool_param
            found.append((response.id, last, answer.error_message or outputs))
    return found


def streamed(addresses: Addresses, messages: list[Any]) -> Said:
    """Requests of decoupled models do not wait for each other."""
    answers = sorted(flowing(addresses, messages), key=lambda answer: answer[0])
    return Said("OK", None, [(request, content) for request, _, content in answers])


def asked(addresses: Addresses, call: Call) -> Said:
    said = over_http(addresses.http, call)
    body = said.body
    if said.kind and said.kind.startswith("text/event-stream") and body:
        body = [json.loads(event.removeprefix("data: ")) for event in body.split("\n\n") if event]
    return Said(said.status, None, _without_sequences(body))


def _without_sequences(body: Any) -> Any:
    """A real one adds the correlation of no sequence to answers of ensembles, and has a field of a newer schema not."""
    if isinstance(body, list):
        return [_without_sequences(each) for each in body]
    if isinstance(body, dict):
        kept = {name: _without_sequences(each) for name, each in body.items() if not name.startswith("sequence_")}
        kept.pop("max_inflight_requests", None)
        return {name: each for name, each in kept.items() if name != "parameters" or each}
    return body


def everything(addresses: Addresses) -> list[Said]:
    said = [streamed(addresses, messages) for messages in STREAMED]
    return said + [asked(addresses, call) for call in CALLS]


def test_every_answer_flows_on_as_on_triton(both: tuple[Addresses, Addresses]) -> None:
    theirs, ours = (everything(addresses) for addresses in both)
    left, not_needed = unexplained([*STREAMED, *CALLS], theirs, ours, ENSEMBLES)
    assert not left, "\n".join(map(str, left))
    assert not not_needed


def test_one_answer_is_marked_as_the_last_and_none_comes_after_it(both: tuple[Addresses, Addresses]) -> None:
    """Which one is a matter of time: the last answer, or an empty one after it."""
    for addresses in both:
        for name in GOOD:
            shape = {"shape": [1, 1]} if name == "batch" else {}
            for value in (0, 3):
                answers = flowing(addresses, [message(name, value, final=True, tensor=shape)])
                assert [last for _, last, _ in answers] == [False] * (len(answers) - 1) + [True]


def test_an_error_is_the_last_answer(both: tuple[Addresses, Addresses]) -> None:
    needs = (
        "[request id: i] expected 1 inputs but got 0 inputs for model 'echo'. Got input(s) [], but missing required "
    )
    for addresses in both:
        for name, value, possible, error in (
            ("stumbles-behind", 1, [0, 1], "stumbled"),
            ("nested-and-fails", 9, [0, 2, 4, 6, 8], "in ensemble 'doubles', five is too many"),
            ("left-out", 4, [3], needs + "input(s) ['X']. Please provide all required input(s)."),
        ):
            *before, end = flowing(addresses, [message(name, value, final=True)])
            assert end == ("i", True, f"in ensemble '{name}', {error}")
            assert [content["Y"][1] for _, _, content in before] == [[each] for each in possible][: len(before)]


def test_a_model_that_does_not_answer_fails_the_ensemble(both: tuple[Addresses, Addresses]) -> None:
    refused = "Unable to send response. Non-decoupled model cannot send complete final before "
    for addresses in both:
        ((_, last, error),) = flowing(addresses, [message("silenced", 1)])
        assert last
        assert error.startswith(
            "in ensemble 'silenced', Failed to process the request(s) for model 'silent_0', message: "
        )
        assert refused + "sending a response." in error


def test_a_member_under_way_hears_that_the_client_has_left(both: tuple[Addresses, Addresses], root: Path) -> None:
    """Triton cancels the steps that are still to come, and no other: a generation for nobody goes on to its end."""
    log = root / "endless/log"
    seen = []
    for addresses in both:
        log.write_text("")
        for model in ("endless", "led"):
            with grpc.insecure_channel(addresses.grpc) as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                call = stub.ModelStreamInfer(iter([message(model, 1, id=model)]), timeout=20)
                next(call)
                call.cancel()
            wait_for(log, model)
        seen.append(log.read_text().splitlines())
    assert seen == [["endless left", "led stayed"], ["endless left", "led left"]]


def wait_for(log: Path, name: str) -> None:
    end = time.monotonic() + 20
    while name not in log.read_text():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_what_stems_from_two_is_refused_when_it_is_loaded(root: Path, tmp_path: Path) -> None:
    write_ensembles(tmp_path, BAD)
    with tritonserver(root, also=[tmp_path], load=[], exit_on_error=False) as real:
        theirs = loads(real.http.removeprefix("http://"), BAD)
        log = real.log.read_text()
    with serving_all(start([root, tmp_path], explicit=True)) as addresses:
        ours = loads(addresses.http, BAD)
    for name, (status, error) in theirs.items():
        assert (name, ours[name][0]) == (name, status)
        assert "receives inputs originated from different decoupled models" in ours[name][1]
        assert ours[name][1].startswith(error.rstrip("\n"))
        assert ours[name][1].partition("repository: ")[2] in log


def test_answers_of_many_requests_at_once_are_complete(tmp_path: Path) -> None:
    """Steps with three instances overtake each other; no answer is lost, and none comes after the last."""
    write_members(tmp_path)
    (tmp_path / "echo/config.pbtxt").write_text(X_CONFIG + " instance_group { count: 3 }")
    write_ensembles(tmp_path, {"wide": chain("repeat", "echo", "repeat", "echo")})
    server = start([tmp_path])
    model = server.find("wide")
    heard: list[SimpleQueue[Response]] = [SimpleQueue() for _ in range(23)]
    for number, queue in enumerate(heard):
        model.submit(request_of({"X": np.array([number], np.int32)}), queue.put)
    for number, queue in enumerate(heard):
        said: list[Response] = []
        while not said or not said[-1].last:
            said.append(queue.get(timeout=30))
        values = sorted(int(each.value().arrays()["Y"][0]) for each in said if each.content is not None)
        assert values == sorted(at for count in range(number) for at in range(count))
    server.close()
    assert all(queue.empty() for queue in heard)


def test_an_ensemble_says_that_a_member_has_become_decoupled(tmp_path: Path) -> None:
    write_members(tmp_path)
    write_ensembles(tmp_path, {"plain": chain("echo")})
    server = start([tmp_path], explicit=True, load_model=["plain"])
    x = request_of({"X": np.array([1], np.int32)})
    assert server.infer("plain", x).arrays()["Y"].tolist() == [1]
    decoupled = text_format.Parse(REPEAT_CONFIG, ModelConfig())
    server.load("echo", Overrides(config=decoupled, files={"1/model.py": REPEAT.encode()}))
    with pytest.raises(Refusal, match="model 'echo' was loaded again and is decoupled now; unload this ensemble and"):
        server.infer("plain", x)
