"""A stream whose client takes its answers slowly, or leaves: what the server then holds."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import TensorProto
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from nemoport.runner.grpc import streaming
from nemoport.runner.serve import serving_all
from nemoport.runner.server import start

from .models import identity, write_model
from .test_control import until

ELEMENTS = 2**18 + 1
ALL = 60
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[Any]:
    write_model(tmp_path, "flat", identity(TensorProto.INT32, (1, "n")))
    server = start([tmp_path])
    with serving_all(server) as addresses, grpc.insecure_channel(addresses.grpc, OPTIONS) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def asked(value: int) -> Any:
    entry = pb.ModelInferRequest.InferInputTensor(name="X", datatype="INT32", shape=[1, ELEMENTS])
    content = np.full(ELEMENTS, value, np.int32).tobytes()
    return pb.ModelInferRequest(model_name="flat", id=str(value), inputs=[entry], raw_input_contents=[content])


def test_a_client_that_reads_nothing_is_heard_no_further_and_misses_nothing(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = []
    ask = streaming._Conversation._ask

    def counted(self: Any, request: Any, size: int) -> None:
        heard.append(request.id)
        ask(self, request, size)

    monkeypatch.setattr(streaming._Conversation, "_ask", counted)
    monkeypatch.setattr(streaming, "_MOST_HELD", 4 * ELEMENTS * 4)
    answers = stub.ModelStreamInfer(asked(value) for value in range(ALL))
    until(lambda: len(heard) > 4)
    for _ in range(300):  # in the time of these calls everything would be heard
        stub.ServerLive(pb.ServerLiveRequest())
    assert len(heard) < ALL / 2
    for value, answer in enumerate(answers):
        found = np.frombuffer(answer.infer_response.raw_output_contents[0], np.int32)
        assert (answer.infer_response.id, found.size, set(found[::9999].tolist())) == (str(value), ELEMENTS, {value})
    assert heard == [str(value) for value in range(ALL)]


@pytest.mark.parametrize("leaves", [False, True])
def test_nothing_of_a_stream_waits_for_the_collector_of_cycles(stub: Any, leaves: bool) -> None:
    gc.collect()
    gc.disable()
    try:
        answers = stub.ModelStreamInfer(asked(value) for value in range(20))
        for answer in answers:
            if leaves and answer.infer_response.id == "3":
                answers.cancel()
                break
        until(lambda: not any(type(each) is streaming.Turn for each in gc.get_objects()))
    finally:
        gc.enable()
