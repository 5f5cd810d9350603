"""The KServe protocol over gRPC, asked by NVIDIA's own clients where they can ask."""

from __future__ import annotations

import os
import queue
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc  # type: ignore[import-untyped]
from onnx import TensorProto
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from nemoport.runner.grpc.messages import shortened
from nemoport.runner.model import ModelVersion
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import Response
from nemoport.runner.serve import Addresses, serving_all
from nemoport.runner.server import start

from .models import SIMPLE_CONFIG, WEIGHT, add_sub, identity, linear, write_model

ROUNDS = int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "4")) * 100
ONES = np.ones((1, 16), np.int32)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    root: Path = tmp_path_factory.mktemp("repository")
    write_model(root, "simple", add_sub(), SIMPLE_CONFIG)
    write_model(root, "linear", linear(), "version_policy { all {} }", versions=["1", "3"])
    write_model(root, "text", identity(TensorProto.STRING, ("b", 2)))
    write_model(root, "brain", identity(TensorProto.BFLOAT16, ("b", 2)))
    write_model(root, "flat", identity(TensorProto.FLOAT, (1, "n")))
    with serving_all(start([root], explicit=True, load_model=["*"])) as at:
        yield at


@pytest.fixture
def client(addresses: Addresses) -> Iterator[Any]:
    with triton.InferenceServerClient(addresses.grpc) as made:
        yield made


@pytest.fixture(scope="module")
def stub(addresses: Addresses) -> Iterator[Any]:
    with grpc.insecure_channel(addresses.grpc) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def tensor(name: str, array: np.ndarray, datatype: str) -> Any:
    made = triton.InferInput(name, array.shape, datatype)
    made.set_data_from_numpy(array)
    return made


def two(value: int = 1) -> list[Any]:
    return [tensor(name, ONES * value, "INT32") for name in ("INPUT0", "INPUT1")]


def test_health_and_metadata_as_the_client_reads_them(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear", "3")
    assert not client.is_model_ready("linear", "2")
    assert not client.is_model_ready("nope")
    assert client.get_server_metadata().name == "nemoport"
    metadata = client.get_model_metadata("linear", as_json=True)
    assert metadata["versions"] == ["1", "3"]
    assert metadata["inputs"] == [{"name": "X", "datatype": "FP32", "shape": ["-1", "4"]}]
    assert client.get_model_config("simple").config.max_batch_size == 8
    assert {(row.name, row.version, row.state) for row in client.get_model_repository_index().models} >= {
        ("linear", "3", "READY")
    }


def test_the_health_service_says_serving(addresses: Addresses) -> None:
    with grpc.insecure_channel(addresses.grpc) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_client_gets_the_numbers_that_it_gets_over_http(client: Any) -> None:
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    answer = client.infer("linear", [tensor("X", x, "FP32")], model_version="1", request_id="r1")
    np.testing.assert_allclose(answer.as_numpy("Y"), x @ WEIGHT, rtol=1e-5)
    assert (answer.get_response().id, answer.get_response().model_version) == ("r1", "1")
    wanted = [triton.InferRequestedOutput("OUTPUT1")]
    answer = client.infer("simple", two(), outputs=wanted, priority=1, timeout=10**7)
    assert [output.name for output in answer.get_response().outputs] == ["OUTPUT1"]


@pytest.mark.parametrize(
    "model, datatype, array",
    [
        ("text", "BYTES", np.array([[b"ab", "zwölf".encode()]], np.object_)),
        ("brain", "BF16", np.array([[1.5, -2]], ml_dtypes.bfloat16)),
    ],
)
def test_datatypes_pass(client: Any, model: str, datatype: str, array: np.ndarray) -> None:
    assert client.infer(model, [tensor("X", array, datatype)]).as_numpy("Y").tolist() == array.tolist()


def test_messages_above_four_megabytes_pass_both_ways(addresses: Addresses) -> None:
    x = np.arange(5 * 2**20, dtype=np.float32)[None]
    with triton.InferenceServerClient(addresses.grpc) as client:
        assert (client.infer("flat", [tensor("X", x, "FP32")]).as_numpy("Y") == x).all()


def typed(model: str, datatype: str, shape: list[int], **contents: Any) -> Any:
    given = pb.InferTensorContents(**contents)
    entry = pb.ModelInferRequest.InferInputTensor(name="X", datatype=datatype, shape=shape, contents=given)
    return pb.ModelInferRequest(model_name=model, inputs=[entry])


def test_typed_contents_are_read(stub: Any) -> None:
    answer = stub.ModelInfer(typed("linear", "FP32", [1, 4], fp32_contents=[1, 0, 0, 0]))
    np.testing.assert_allclose(np.frombuffer(answer.raw_output_contents[0], np.float32), WEIGHT[0])
    answer = stub.ModelInfer(typed("text", "BYTES", [1, 2], bytes_contents=[b"a", b""]))
    assert answer.raw_output_contents[0] == b"\1\0\0\0a\0\0\0\0"


def mixed() -> Any:
    message = typed("linear", "FP32", [1, 4], fp32_contents=[0] * 4)
    message.raw_input_contents.append(bytes(16))
    return message


def raw(*tails: bytes, model: str = "linear", version: str = "", shape: Any = (1, 4), **parameters: Any) -> Any:
    entry = pb.ModelInferRequest.InferInputTensor(name="X", datatype="FP32", shape=shape)
    message = pb.ModelInferRequest(
        model_name=model, model_version=version, inputs=[entry], raw_input_contents=tails, id="i"
    )
    for name, value in parameters.items():
        message.parameters[name].CopyFrom(value)
    return message


@pytest.mark.parametrize(
    "message, code, error",
    [
        (raw(bytes(16), model="nope"), "NOT_FOUND", "Request for unknown model: 'nope' is not found"),
        (raw(bytes(16), version="9"), "NOT_FOUND", "'linear' version 9 is not found"),
        (raw(bytes(16), version="x"), "INVALID_ARGUMENT", "failed to get model version"),
        (raw(bytes(16), version="9" * 50), "INVALID_ARGUMENT", "failed to get model version"),
        (raw(bytes(15)), "INVALID_ARGUMENT", "byte size mismatch for input 'X'"),
        (raw(bytes(20), shape=(1, 5)), "INVALID_ARGUMENT", "[request id: i] unexpected shape for input 'X'"),
        (raw(bytes(16), shape=(-1, 4)), "INVALID_ARGUMENT", "All input dimensions should be"),
        (raw(bytes(16), shape=(2**62, 4)), "INVALID_ARGUMENT", "too many elements"),
        (raw(bytes(16), shape=(1,) * 99), "INVALID_ARGUMENT", "99 dimensions"),
        (raw(bytes(16), bytes(16)), "INVALID_ARGUMENT", "expected 1 inputs but got 2 raw input contents"),
        (raw(), "INVALID_ARGUMENT", "unable to find data for input tensor 'X'"),
        (raw(bytes(16), priority=pb.InferParameter(string_param="1")), "INVALID_ARGUMENT", "'priority' must be"),
        (raw(bytes(16), triton_x=pb.InferParameter(bool_param=True)), "INVALID_ARGUMENT", "'triton_' are reserved"),
        (raw(bytes(16), sequence_id=pb.InferParameter(bool_param=True)), "INVALID_ARGUMENT", "type for 'sequence_id'"),
        (raw(bytes(16), a=pb.InferParameter()), "INVALID_ARGUMENT", "invalid value type for 'a' parameter"),
        (mixed(), "INVALID_ARGUMENT", "contents field must not be specified when using raw_input_contents"),
        (typed("linear", "FP32", [1, 4], fp32_contents=[0] * 3), "INVALID_ARGUMENT", "byte size mismatch"),
        (typed("linear", "FP32", [1, 4], int_contents=[0] * 4), "INVALID_ARGUMENT", "unexpected explicit tensor data"),
        (typed("linear", "FP16", [1, 4], fp32_contents=[0] * 4), "INVALID_ARGUMENT", "expected datatype 'FP16'"),
        (typed("linear", "INT8", [1, 4], int_contents=[300] * 4), "INVALID_ARGUMENT", "out of its range"),
        (typed("linear", "FP7", [1, 4]), "INVALID_ARGUMENT", "invalid datatype for input X"),
        (pb.ModelInferRequest(model_name="linear"), "INVALID_ARGUMENT", "expected 1 inputs but got 0"),
        (pb.ModelInferRequest(model_name="n" * 50_000), "NOT_FOUND", "unknown model"),
    ],
)
def test_requests_that_make_no_sense_are_refused(stub: Any, message: Any, code: str, error: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.ModelInfer(message, timeout=10)
    assert (refused.value.code().name, error in refused.value.details()) == (code, True), refused.value.details()


@pytest.mark.parametrize(
    "ask, code",
    [
        (lambda c: c.get_model_metadata("nope"), "StatusCode.NOT_FOUND"),
        (lambda c: c.get_model_config("nope"), "StatusCode.NOT_FOUND"),
        (lambda c: c.get_inference_statistics("nope"), "StatusCode.INVALID_ARGUMENT"),
        (lambda c: c.load_model("nope"), "StatusCode.INTERNAL"),
        (lambda c: c.get_system_shared_memory_status(), "StatusCode.UNIMPLEMENTED"),
        (lambda c: c.get_trace_settings(), "StatusCode.UNIMPLEMENTED"),
    ],
)
def test_calls_have_the_status_of_triton(client: Any, ask: Callable[[Any], Any], code: str) -> None:
    with pytest.raises(InferenceServerException) as refused:
        ask(client)
    assert refused.value.status() == code


def test_models_are_loaded_and_unloaded(client: Any) -> None:
    client.unload_model("flat")
    assert not client.is_model_ready("flat")
    client.load_model("flat")
    assert client.is_model_ready("flat")
    statistics = client.get_inference_statistics("linear", "3", as_json=True)["model_stats"]
    assert statistics[0]["inference_stats"]["success"].keys() <= {"count", "ns"}


def test_a_stream_answers_in_order_and_survives_errors(addresses: Addresses) -> None:
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(addresses.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for value in range(50):
            client.async_stream_infer("simple", two(value), request_id=str(value))
            if value % 10 == 3:
                client.async_stream_infer("nope", two(value), request_id="bad")
        found = [answers.get(timeout=10) for _ in range(55)]
        client.stop_stream()
    good = [result for result, error in found if error is None]
    assert [result.get_response().id for result in good] == [str(value) for value in range(50)]
    assert [result.as_numpy("OUTPUT0")[0, 0] for result in good] == [2 * value for value in range(50)]
    assert [str(error) for _, error in found if error] == ["Request for unknown model: 'nope' is not found"] * 5
    assert [at for at, (_, error) in enumerate(found) if error] == [4, 15, 26, 37, 48]


def test_a_stream_goes_on_after_a_model_that_fails_when_it_has_answered(
    addresses: Addresses, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = ModelVersion.submit

    def broken(self: ModelVersion, request: Any, deliver: Callable[[Response], None], *more: Any) -> Any:
        told = Event()

        def answered(response: Response) -> None:
            deliver(response)
            told.set()

        submit(self, request, answered)
        assert told.wait(10)
        raise ValueError("a mistake of ours")

    monkeypatch.setattr(ModelVersion, "submit", broken)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(addresses.grpc) as client:
        client.start_stream(lambda result, error: answers.put((result, error)))
        for value in range(3):
            client.async_stream_infer("simple", two(value), request_id=str(value))
        found = [answers.get(timeout=10) for _ in range(3)]
        client.stop_stream()
    assert [error or result.get_response().id for result, error in found] == ["0", "1", "2"]
    assert answers.empty()


AIO = """
import asyncio, sys
import numpy as np
import tritonclient.grpc.aio as triton

async def main():
    async with triton.InferenceServerClient(sys.argv[1]) as client:
        assert await client.is_server_ready()
        def two(value):
            made = [triton.InferInput(name, [1, 16], "INT32") for name in ("INPUT0", "INPUT1")]
            for each in made:
                each.set_data_from_numpy(np.full((1, 16), value, np.int32))
            return made
        answers = await asyncio.gather(*(client.infer("simple", two(value)) for value in range(50)))
        assert [answer.as_numpy("OUTPUT0")[0, 0] for answer in answers] == [2 * value for value in range(50)]
        async def requests():
            for value in range(5):
                yield {"model_name": "simple", "inputs": two(value)}
        streamed = [result.as_numpy("OUTPUT0")[0, 0] async for result, error in client.stream_infer(requests())]
        assert streamed == [0, 2, 4, 6, 8]

asyncio.run(main())
"""


def test_the_client_for_asyncio_works(addresses: Addresses) -> None:
    """In a process of its own, as the loop of the server is in this one."""
    subprocess.run([sys.executable, "-c", AIO, addresses.grpc], check=True, timeout=60)


def test_a_cancelled_call_leaves_the_server_well(stub: Any) -> None:
    calls = [stub.ModelInfer.future(raw(bytes(16))) for _ in range(20)]
    for call in calls[::2]:
        call.cancel()
    assert all(len(call.result(timeout=10).raw_output_contents) == 1 for call in calls[1::2])


def hostile(chance: random.Random) -> Any:
    """A request that was right, with some fields turned into something else."""
    x = chance.choice([b"", bytes(16), bytes(15), chance.randbytes(40)])
    entry = pb.ModelInferRequest.InferInputTensor(
        name=chance.choice(["X", "X", "X", "Y", "", "é"]),
        datatype=chance.choice(["FP32", "FP32", "BYTES", "BF16", "", "x"]),
        shape=[chance.choice([0, 1, 1, 4, 4, -1, 2**31, 2**63 - 1]) for _ in range(chance.randint(0, 3))],
    )
    if chance.random() < 0.3:
        entry.contents.CopyFrom(pb.InferTensorContents(fp32_contents=[1] * chance.randint(0, 5)))
    message = pb.ModelInferRequest(
        model_name=chance.choice(["linear", "text", "flat", "brain", "nope"]),
        model_version=chance.choice(["", "", "1", "-1", "1.5"]),
        id=chance.choice(["", "a"]),
        inputs=[entry] * chance.choice([0, 1, 1, 1, 2]),
        raw_input_contents=[x] * chance.choice([0, 1, 1, 1, 2]),
    )
    if chance.random() < 0.2:
        message.outputs.add(name=chance.choice(["Y", "Y", "Z", ""]))
    if chance.random() < 0.2:
        message.parameters[chance.choice(["priority", "timeout", "sequence_id", "x"])].int64_param = chance.randint(
            -1, 1
        )
    return message


@pytest.mark.soak
def test_any_message_is_answered_or_refused_and_good_ones_are_answered_right(stub: Any) -> None:
    chance = random.Random(5)
    for _ in range(ROUNDS // 20):
        calls = [stub.ModelInfer.future(hostile(chance), timeout=20) for _ in range(19)]
        good = stub.ModelInfer(typed("linear", "FP32", [1, 4], fp32_contents=[1, 0, 0, 0]), timeout=20)
        np.testing.assert_allclose(np.frombuffer(good.raw_output_contents[0], np.float32), WEIGHT[0])
        codes = {call.code().name for call in calls}
        assert codes <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}


def test_bytes_that_are_no_message_are_refused(addresses: Addresses) -> None:
    with grpc.insecure_channel(addresses.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        with pytest.raises(grpc.RpcError):
            call(b"\xff" * 100, timeout=10)
        assert service_pb2_grpc.GRPCInferenceServiceStub(channel).ServerLive(pb.ServerLiveRequest()).live


def test_bfloat16_is_two_bytes_on_the_wire(stub: Any) -> None:
    x = np.array([[1.5, -2]], ml_dtypes.bfloat16).tobytes()
    entry = pb.ModelInferRequest.InferInputTensor(name="X", datatype="BF16", shape=[1, 2])
    message = pb.ModelInferRequest(model_name="brain", inputs=[entry], raw_input_contents=[x])
    assert stub.ModelInfer(message).raw_output_contents[0] == x


@pytest.mark.parametrize("text", ["", "short", "x" * 9000, "é" * 9000, "%" * 9000, "\n" * 9000, "a" + "日" * 3000])
def test_a_status_fits_into_a_header_and_says_what_it_can(text: str) -> None:
    found = shortened(Refusal(text))
    sizes = [1 if 32 <= byte < 127 and byte != ord("%") else 3 for byte in found.encode()]
    assert text.startswith(found)
    assert sum(sizes) <= 4000
    assert found == text or sum(sizes) > 3980
