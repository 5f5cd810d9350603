"""The same Python models on a real tritonserver and on this one, asked the same over HTTP, gRPC, SSE and streams."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonserver import tritonserver

from nemoport.runner.serve import Addresses, serving_all
from nemoport.runner.server import start

from .differences import Said, unexplained
from .python_models import write_all
from .test_http import ask, two

Call = tuple[str, bytes | None] | tuple[str, bytes | None, dict[str, str]]
X = {"name": "X", "datatype": "INT32", "shape": [1], "data": [1]}


def infer(model: str, *inputs: Any, **fields: Any) -> Call:
    return f"/v2/models/{model}/infer", json.dumps({"inputs": inputs, **fields}).encode()


def generate(model: str, verb: str = "generate", **members: Any) -> Call:
    return f"/v2/models/{model}/{verb}", json.dumps(members).encode()


def tailed(model: str, tail: bytes, size: int, said: int | str | None = None, **fields: Any) -> Call:
    """INT32 X in a binary tail; `said` is where the header says that the JSON ends."""
    entry = X | {"parameters": {"binary_data_size": size}, "shape": fields.pop("shape", [1])}
    del entry["data"]
    head = json.dumps({"inputs": [entry], **fields}).encode()
    at = len(head) if said is None else said
    return f"/v2/models/{model}/infer", head + tail, {"Inference-Header-Content-Length": str(at)}


def packed(call: Call, packing: str, how: Callable[[bytes], bytes], **headers: str) -> Call:
    return call[0], how(call[1] or b""), {"Content-Encoding": packing, **headers}


TEXT = {"name": "TEXT", "datatype": "BYTES", "shape": [1, 2], "data": ["ab", "zwölf"]}
MATRIX = {"name": "X", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}
OF_NO_KIND: tuple[Any, ...] = (None, [1], {})
ALL_KINDS = {"a": 1, "b": "x", "c": True, "d": 1.5, "timeout": 5, "priority": 1, "sequence_id": 4}
WRONG: list[tuple[str, Any]] = [
    ("data", []),
    ("data", [1, 2]),
    ("data", ["1"]),
    ("data", 1),
    ("data", [[1]]),
    ("shape", [2]),
    ("shape", [-1]),
    ("shape", "1"),
    ("shape", [1, 1]),
    ("name", "NOPE"),
    ("datatype", "INT64"),
    ("datatype", 4),
]
CALLS: list[Call] = [
    ("/v2/health/live", None),
    ("/v2/health/ready", None),
    ("/v2/models/add_sub/ready", None),
    ("/v2/models/nope/ready", None),
    ("/v2/repository/models/add_sub/load", b""),
    ("/v2/repository/models/nope/unload", b""),
    ("/v2/models/add_sub", None),
    ("/v2/models/add_sub/config", None),
    ("/v2/models/repeat/config", None),
    infer("add_sub", *two()),
    infer("add_sub", *two(), outputs=[{"name": "OUTPUT1"}]),
    infer("add_sub", two()[0]),
    infer("text", TEXT, id="ü"),
    infer("about", MATRIX, id="q", parameters=ALL_KINDS),
    *(infer("failing", X | {"data": [which]}) for which in (-1, 0, 1, 2, 3, 4, 5, 6, 7, 100, 102)),
    *(infer("echo", X | {name: value}) for name, value in WRONG),
    *(("/v2/models/echo/infer", body) for body in (b"", b"{", b"[]", b"{}", b'{"inputs": {}}', b'{"inputs": [1]}')),
    infer("echo", X, id=5),
    *(infer("echo", X, parameters={"a": value}) for value in OF_NO_KIND),
    infer("echo", X, outputs=[{"name": "Y"}, {"name": "NOPE"}]),
    infer("echo", X, X),
    tailed("echo", bytes([5, 0, 0, 0]), 4),
    tailed("echo", bytes(4), 4, outputs=[{"name": "Y", "parameters": {"binary_data": True}}]),
    tailed("echo", bytes(4), 4, parameters={"binary_data_output": True}),
    tailed("echo", bytes(3), 4),
    tailed("echo", bytes(8), 4),
    tailed("echo", bytes(8), 8),
    tailed("echo", bytes(4), 4, said=9999),
    tailed("echo", bytes(4), 4, said=-1),
    ("/v2/models/echo/infer", bytes(4), {"Inference-Header-Content-Length": "0"}),
    ("/v2/models/echo/infer", bytes(3), {"Inference-Header-Content-Length": "0"}),
    ("/v2/models/add_sub/infer", bytes(4), {"Inference-Header-Content-Length": "0"}),
    packed(infer("echo", X), "gzip", gzip.compress),
    packed(infer("echo", X), "deflate", zlib.compress),
    packed(infer("echo", X), "gzip", gzip.compress, **{"Accept-Encoding": "gzip"}),
    packed(infer("echo", X), "identity", bytes, **{"Accept-Encoding": "deflate"}),
    ("/v2/models/echo/infer", None),
    ("/v2/repository/index", None),
    ("/v2/models/echo/stats", b""),
    ("/v2/health/ready", b""),
    ("/v2/nothing", None),
    ("/metrics", None),
    ("/", None),
    infer("repeat", X),
    generate("repeat", X=[1], id="z", extra=1, parameters={"q": 2}),
    generate("repeat", X=1),
    generate("repeat", X=2),
    generate("repeat", X=-1),
    generate("repeat"),
    generate("repeat", "generate_stream", X=[2]),
    generate("repeat", "generate_stream", X=-1),
    generate("repeat", "generate_stream", X="a"),
    generate("repeat", "generate_stream"),
    generate("text", TEXT="ab"),
    generate("text", TEXT=["ab", "c"]),
    generate("text/versions/1", TEXT="ab"),
    generate("text", "generate_stream", TEXT="ab"),
    generate("nope"),
    generate("nope", "generate_stream"),
    ("/v2/models/text/generate", None),
    ("/v2/models/text/generate", b"{"),
    ("/v2/models/text/generate", b"[]"),
    ("/v2/logging", None),
    ("/v2/logging", b'{"log_verbose_level": 1, "unknown": 3}'),
    ("/v2/logging", b'{"log_verbose_level": -1}'),
    ("/v2/logging", b'{"log_info": "x"}'),
    ("/v2/logging", b'{"log_format": "ISO8601"}'),
    ("/v2/logging", b'{"log_format": "x"}'),
    ("/v2/logging", b'{"log_file": "/tmp/x"}'),
    ("/v2/logging", b'{"log_verbose_level": 0, "log_format": "default"}'),
    ("/v2/models/nope/stats", None),
    ("/v2/models/text/versions/7/stats", None),
    ("/v2/models/text/stats", None),
    ("/v2/models/repeat/stats", None),
    ("/v2/models/failing/stats", None),
]


def message(model: str = "failing", value: int | None = 2, **fields: Any) -> Any:
    raw = [] if value is None else [value.to_bytes(4, "little", signed=True)]
    tensor = {"name": "X", "datatype": "INT32", "shape": [1]} | fields.pop("tensor", {})
    entry = pb.ModelInferRequest.InferInputTensor(**tensor)
    final = fields.pop("final", None)
    given: dict[str, Any] = {"id": "i", "raw_input_contents": raw} | fields
    made = pb.ModelInferRequest(model_name=model, inputs=[entry], **given)
    if final is not None:
        made.parameters["triton_enable_empty_final_response"].bool_param = final
    return made


def typed(**contents: Any) -> dict[str, Any]:
    return {"contents": pb.InferTensorContents(**contents)}


UNARY: list[tuple[str, Any]] = [
    ("ModelInfer", each)
    for each in (
        message("nope"),
        message(),
        message("repeat"),
        message(model_version="x"),
        message(model_version="3"),
        message(value=None),
        message(raw_input_contents=[b"", b""]),
        message(raw_input_contents=[b"12"]),
        message(tensor=typed(int_contents=[1])),
        message(value=None, tensor=typed(int_contents=[1, 2])),
        message(value=None, tensor=typed(fp32_contents=[1])),
        message(value=None, tensor=typed(fp32_contents=[1]) | {"datatype": "FP16"}),
        message(tensor={"datatype": "FP7"}),
        message(tensor={"shape": [-1]}),
        message(tensor={"shape": []}),
        pb.ModelInferRequest(model_name="failing"),
    )
] + [
    ("ModelReady", pb.ModelReadyRequest(name="nope")),
    ("ModelReady", pb.ModelReadyRequest(name="text", version="x")),
    ("ModelMetadata", pb.ModelMetadataRequest(name="text")),
    ("ModelMetadata", pb.ModelMetadataRequest(name="nope")),
    ("ModelConfig", pb.ModelConfigRequest(name="add_sub")),
    ("ModelConfig", pb.ModelConfigRequest(name="nope")),
    ("ModelStatistics", pb.ModelStatisticsRequest(name="nope")),
    ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="nope")),
    ("RepositoryIndex", pb.RepositoryIndexRequest(ready=True)),
    ("LogSettings", pb.LogSettingsRequest()),
]
STREAMED: list[Any] = [
    [message("repeat")],
    [message("repeat", final=True)],
    [message("repeat", 0)],
    [message("repeat", 0, final=True)],
    [message("repeat", -1)],
    [message("repeat", tensor={"shape": [7]})],
    [message("nope")],
    [message(), message("nope"), message("add_sub")],
    [message(final=True)],
]


def over_http(address: str, call: Call) -> Said:
    reply = ask(address, *call)
    kind, packing = reply.headers["content-type"], reply.headers["content-encoding"]
    content = zlib.decompress(reply.body, wbits=47) if packing else reply.body  # gzip or zlib, as its head says
    length = int(reply.headers["inference-header-content-length"] or len(content))
    try:
        body = _without_times(json.loads(content[:length]))
    except ValueError:
        body = content.decode()
    parts = [part for part in (body, content[length:], packing) if part]
    return Said(reply.status, kind, parts[0] if len(parts) == 1 else parts)


def _without_times(body: Any) -> Any:
    """Durations and dates are nobody's to repeat; a running order of outputs is neither."""
    if isinstance(body, list):
        return [_without_times(each) for each in body]
    if isinstance(body, dict):
        kept = {name: _without_times(each) for name, each in body.items() if name not in ("ns", "last_inference")}
        if "outputs" in kept and all("data" in each for each in kept["outputs"]):
            kept["outputs"].sort(key=lambda tensor: tensor["name"])
        return kept
    return body


def over_grpc(stub: Any, method: str, request: Any) -> Said:
    try:
        answer = getattr(stub, method)(request, timeout=20)
    except grpc.RpcError as error:
        return Said(error.code().name, None, error.details())
    return Said("OK", None, json_format.MessageToDict(answer, preserving_proto_field_name=True))


def streamed(stub: Any, messages: list[Any]) -> Said:
    answers = stub.ModelStreamInfer(iter(messages), timeout=20)
    return Said("OK", None, [json_format.MessageToDict(answer) for answer in answers])


def everything(addresses: Addresses) -> list[Said]:
    with grpc.insecure_channel(addresses.grpc) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        said = [over_http(addresses.http, call) for call in CALLS]
        said += [over_grpc(stub, *call) for call in UNARY]
        return said + [streamed(stub, messages) for messages in STREAMED]


def crowd(addresses: Addresses) -> list[tuple[int, str]]:
    """Ten at a model that takes its time, and has room for two to wait."""
    together = threading.Barrier(10)

    def one(_: int) -> tuple[int, str]:
        together.wait()
        said = over_http(addresses.http, infer("slow", X | {"shape": [1, 1]}))
        return int(said.status), said.error

    with ThreadPoolExecutor(10) as pool:
        return sorted(set(pool.map(one, range(10))))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Addresses, Addresses]]:
    root: Path = tmp_path_factory.mktemp("repository")
    write_all(root)
    with (
        tritonserver(root, load=["*"], exit_on_error=False) as real,
        serving_all(start([root], explicit=True, load_model=["*"])) as ours,
    ):
        yield Addresses(real.http.removeprefix("http://"), real.grpc), ours


def test_every_call_has_the_same_answer_or_one_that_is_meant(both: tuple[Addresses, Addresses]) -> None:
    theirs, ours = (everything(addresses) for addresses in both)
    left, not_needed = unexplained([*CALLS, *UNARY, *STREAMED], theirs, ours)
    assert not left, "\n".join(map(str, left))
    assert not not_needed


def test_a_full_queue_answers_503_on_both(both: tuple[Addresses, Addresses]) -> None:
    theirs, ours = (crowd(addresses) for addresses in both)
    assert theirs == ours == [(200, ""), (503, "[request id: <id_unknown>] Exceeds maximum queue size")]
