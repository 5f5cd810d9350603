"""Ensembles of which a member answers any number of times: the same on a real tritonserver and on this one."""

from __future__ import annotations

import json
import sys
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
from nemoport.runner.server import Server, start

from .decoupled_ensembles import BAD, GOOD, LED, OVERTAKEN, chain, write_ensembles, write_members
from .differences import ENSEMBLES, LEAVING, Said, unexplained
from .python_models import REPEAT, REPEAT_CONFIG, X_CONFIG
from .test_ensembles import loads
from .test_same_python_models import Call, X, generate, infer, message, over_http

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
    *(generate(name, "generate_stream", X=value) for name in ("doubles", "both-sides") for value in (4, 5)),
    *(generate("choice", "generate_stream", X=1, M=value) for value in (2, 4)),
    generate("counts", "generate_stream"),
    *((f"/v2/models/{name}/stats", None) for name in GOOD if name != "silenced"),
]
STREAMED = [
    *([message(name, value)] for name in GOOD if name not in ("batch", "silenced") for value in (0, 3)),
    [message("both-sides", 1, id="a"), message("doubles", 4, id="b"), message("twice", 5, id="c")],
    *([message("batch", value, tensor={"shape": [1, 1]})] for value in (0, 3)),
]


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
    answers = flowing(addresses, messages)
    return Said("OK", None, sorted(json.dumps([request, said], sort_keys=True) for request, _, said in answers))


def asked(addresses: Addresses, call: Call) -> Said:
    said = over_http(addresses.http, call)
    body = said.body
    if said.kind and said.kind.startswith("text/event-stream") and body:
        events = [json.loads(event.removeprefix("data: ")) for event in body.split("\n\n") if event]
        return Said(
            said.status, None, sorted(json.dumps(_without_sequences(event), sort_keys=True) for event in events)
        )
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
    """Answers without their order: steps of a real one overtake each other now and then, and so do requests."""
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
            ("doubles", 9, [0, 2, 4, 6, 8], "five is too many"),
            ("nested-and-fails", 9, [0, 2, 4, 6, 8], "in ensemble 'doubles', five is too many"),
            ("left-out", 4, [3], needs + "input(s) ['X']. Please provide all required input(s)."),
        ):
            *before, end = flowing(addresses, [message(name, value, final=True)])
            assert end == ("i", True, f"in ensemble '{name}', {error}")
            values = [content["Y"][1][0] for _, _, content in before]
            assert set(values) <= set(possible)
            assert len(set(values)) == len(values)


@pytest.fixture(scope="module")
def alone(root: Path) -> Server:
    return start([root])


@pytest.mark.parametrize(
    "name, value, answers",
    [
        ("both-sides", 2, [0, 2, 4, 6]),
        ("again-and-again", 3, [0]),
        ("nested-behind", 3, [0, 0, 2]),
        ("closes-twice", 3, [4, 2, 0]),
        ("forked", 3, [0, 3, 6]),
        ("counts", 0, []),
    ],
)
def test_answers_keep_their_order_where_members_have_one_instance(
    name: str, value: int, answers: list[int], alone: Server
) -> None:
    said = until_the_last(asked_in_process(alone, name, value))
    assert [each.value().arrays()["Y"].item() for each in said if each.content is not None] == answers


def test_nothing_comes_after_an_error_and_it_counts_as_one_failure(alone: Server) -> None:
    before = alone.find("stumbles").statistics.as_json("stumbles", 1)["inference_stats"]["fail"]["count"]
    heard = asked_in_process(alone, "stumbles", 1)
    *_, error = until_the_last(heard)
    with pytest.raises(Refusal, match="in ensemble 'stumbles', stumbled"):
        error.value()
    until_the_last(asked_in_process(alone, "stumbling", 1))  # its only instance has done with the first
    assert heard.empty()
    after = alone.find("stumbles").statistics.as_json("stumbles", 1)["inference_stats"]["fail"]["count"]
    assert after == before + 1


def test_an_error_is_told_however_many_steps_it_calls_off(alone: Server) -> None:
    """Those that are called off say that they are cancelled, which is not why."""
    often, interval = 1e-6, sys.getswitchinterval()
    sys.setswitchinterval(often)
    try:
        for heard in [asked_in_process(alone, "stumbles-behind", 1) for _ in range(300)]:
            assert str(until_the_last(heard)[-1].content) == "in ensemble 'stumbles-behind', stumbled"
    finally:
        sys.setswitchinterval(interval)


def asked_in_process(server: Server, model: str, value: int) -> SimpleQueue[Response]:
    heard: SimpleQueue[Response] = SimpleQueue()
    server.find(model).submit(request_of({"X": np.array([value], np.int32)}), heard.put)
    return heard


def until_the_last(heard: SimpleQueue[Response]) -> list[Response]:
    said = [heard.get(timeout=30)]
    while not said[-1].last:
        said.append(heard.get(timeout=30))
    return said


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
    models = ("endless", "led")
    theirs, ours = ([left(addresses, model, root / "endless/log") for model in models] for addresses in both)
    assert unexplained(models, theirs, ours, LEAVING) == ([], [])
    assert [said.body for said in ours] == ["endless left", "led left"]


def left(addresses: Addresses, model: str, log: Path) -> Said:
    """What the model wrote of a client that leaves after the first answer."""
    log.write_text("")
    with grpc.insecure_channel(addresses.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        call = stub.ModelStreamInfer(iter([message(model, 1, id=model)]), timeout=20)
        next(call)
        call.cancel()
    wait_for(log, model)
    return Said("OK", None, log.read_text().strip())


def wait_for(log: Path, name: str) -> None:
    end = time.monotonic() + 20
    while not (text := log.read_text()).endswith("\n") or name not in text:
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
    heard = [asked_in_process(server, "wide", number) for number in range(23)]
    for number, queue in enumerate(heard):
        said = [each.value().arrays()["Y"].item() for each in until_the_last(queue) if each.content is not None]
        assert sorted(said) == sorted(at for count in range(number) for at in range(count))
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
