"""The KServe protocol over HTTP, asked by NVIDIA's own client where it can ask."""

from __future__ import annotations

import gzip
import json
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
from onnx import TensorProto

from nemoport.runner.contract import Contract
from nemoport.runner.http import generate as generation
from nemoport.runner.jobs import Job, Outcome
from nemoport.runner.model import load_version
from nemoport.runner.request import InferRequest
from nemoport.runner.serve import serving
from nemoport.runner.server import Server, start

from .models import SIMPLE_CONFIG, WEIGHT, add_sub, identity, linear, write_model

LIMIT = 2**20


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes
    headers: Message[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        (message,) = self.json.values()
        assert isinstance(message, str)
        return message


def ask(address: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Reply:
    """GET without a body, POST with one."""
    request = urllib.request.Request(f"http://{address}{path}", body, dict(headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return Reply(answer.status, answer.read(), answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return Reply(error.code, error.read(), error.headers)


def infer(address: str, fields: Mapping[str, Any], model: str = "simple") -> Reply:
    return ask(address, f"/v2/models/{model}/infer", json.dumps(fields).encode())


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    write_model(root, "simple", add_sub(), SIMPLE_CONFIG)
    write_model(root, "linear", linear(), "version_policy { all {} }", versions=["1", "3"])
    write_model(root, "half", identity(TensorProto.FLOAT16, ("b", 2)))
    write_model(root, "brain", identity(TensorProto.BFLOAT16, ("b", 2)))
    write_model(root, "text", identity(TensorProto.STRING, ("b", 2)))
    write_model(root, "word", identity(TensorProto.STRING, ("b", 1)))
    write_model(root, "truth", identity(TensorProto.BOOL, ("b", "n")))
    return root


@pytest.fixture(scope="module")
def address(repository: Path) -> Iterator[str]:
    with serving(start([repository], explicit=True, load_model=["*"]), http_max_input_size=LIMIT) as at:
        yield at


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with triton.InferenceServerClient(address) as made:
        yield made


def two(value: int = 1) -> list[dict[str, Any]]:
    return [
        {"name": name, "datatype": "INT32", "shape": [1, 16], "data": [value] * 16} for name in ("INPUT0", "INPUT1")
    ]


def test_health_and_metadata_as_the_client_reads_them(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert client.is_model_ready("linear", "3")
    assert not client.is_model_ready("linear", "2")
    assert not client.is_model_ready("nope")
    assert set(client.get_server_metadata()) == {"name", "version", "extensions"}
    assert client.get_model_metadata("linear") == {
        "name": "linear",
        "versions": ["1", "3"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "X", "datatype": "FP32", "shape": [-1, 4]}],
        "outputs": [{"name": "Y", "datatype": "FP32", "shape": [-1, 3]}],
    }
    assert client.get_model_metadata("linear", "1")["versions"] == ["1"]
    assert client.get_model_config("simple")["max_batch_size"] == 8


def test_the_index_lists_every_version(client: Any) -> None:
    index = client.get_model_repository_index()
    assert {"name": "linear", "version": "3", "state": "READY"} in index
    assert len(index) == 8


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_the_client_gets_the_same_numbers_either_way(client: Any, binary_in: bool, binary_out: bool) -> None:
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    tensor = triton.InferInput("X", x.shape, "FP32")
    tensor.set_data_from_numpy(x, binary_data=binary_in)
    wanted = [triton.InferRequestedOutput("Y", binary_data=binary_out)]
    answer = client.infer("linear", [tensor], outputs=wanted, request_id="r1")
    np.testing.assert_allclose(answer.as_numpy("Y"), x @ WEIGHT, rtol=1e-5)
    assert (answer.get_response()["id"], answer.get_response()["model_version"]) == ("r1", "3")
    assert ("parameters" in answer.get_output("Y")) is binary_out


@pytest.mark.parametrize("packing", ["gzip", "deflate"])
def test_packed_requests_are_unpacked(client: Any, packing: str) -> None:
    x = np.ones((1, 4), np.float32)
    tensor = triton.InferInput("X", x.shape, "FP32")
    tensor.set_data_from_numpy(x)
    answer = client.infer("linear", [tensor], request_compression_algorithm=packing)
    np.testing.assert_allclose(answer.as_numpy("Y"), x @ WEIGHT)


@pytest.mark.parametrize(
    "model, datatype, array",
    [
        ("half", "FP16", np.array([[1.5, -2]], np.float16)),
        ("text", "BYTES", np.array([[b"ab", "zwölf".encode()]], np.object_)),
        ("truth", "BOOL", np.array([[True, False, True]])),
    ],
)
def test_datatypes_pass_in_binary(client: Any, model: str, datatype: str, array: np.ndarray) -> None:
    tensor = triton.InferInput("X", array.shape, datatype)
    tensor.set_data_from_numpy(array)
    assert client.infer(model, [tensor]).as_numpy("Y").tolist() == array.tolist()


def test_bfloat16_passes_in_binary(address: str) -> None:
    x = np.array([[1.5, -2]], ml_dtypes.bfloat16)
    head = json.dumps(
        {
            "inputs": [{"name": "X", "datatype": "BF16", "shape": [1, 2], "parameters": {"binary_data_size": 4}}],
            "outputs": [{"name": "Y", "parameters": {"binary_data": True}}],
        }
    ).encode()
    reply = ask(
        address, "/v2/models/brain/infer", head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
    )
    assert reply.body.endswith(x.tobytes())


def test_text_and_truth_pass_in_json(address: str) -> None:
    text = {"name": "X", "datatype": "BYTES", "shape": [1, 2], "data": ["ab", "zwölf"]}
    assert infer(address, {"inputs": [text]}, "text").json["outputs"][0]["data"] == ["ab", "zwölf"]
    truth = {"name": "X", "datatype": "BOOL", "shape": [1, 2], "data": [[True, False]]}
    assert infer(address, {"inputs": [truth]}, "truth").json["outputs"][0]["data"] == [True, False]


def test_statistics_count_requests_items_and_executions(address: str, client: Any) -> None:
    (before,) = client.get_inference_statistics("linear", "1")["model_stats"]
    for rows in (1, 3):
        x = {"name": "X", "datatype": "FP32", "shape": [rows, 4], "data": [0.0] * 4 * rows}
        assert ask(address, "/v2/models/linear/versions/1/infer", json.dumps({"inputs": [x]}).encode()).status == 200
    assert infer(address, {"inputs": []}, "linear/versions/1").status == 400  # as on Triton, it did not come so far
    (after,) = client.get_inference_statistics("linear", "1")["model_stats"]
    grown = {name: after[name] - before[name] for name in ("inference_count", "execution_count")}
    assert grown == {"inference_count": 4, "execution_count": 2}
    counts = {name: after["inference_stats"][name]["count"] for name in ("success", "fail", "queue", "compute_infer")}
    assert counts == {"success": 2, "fail": 0, "queue": 2, "compute_infer": 2}
    assert {row["batch_size"] for row in after["batch_stats"]} == {1, 3}
    assert len(client.get_inference_statistics()["model_stats"]) == 8
    assert ask(address, "/v2/models/nope/stats").status == 400


def test_an_answer_in_json_is_flat_and_says_so_in_its_headers(address: str) -> None:
    reply = infer(address, {"inputs": two(), "parameters": {"priority": 3, "unknown": "x"}})
    assert reply.headers["content-type"] == "application/json"
    assert "Inference-Header-Content-Length" not in reply.headers
    assert reply.json["outputs"][0] == {"name": "OUTPUT0", "datatype": "INT32", "shape": [1, 16], "data": [2] * 16}


def test_binary_data_output_is_for_requests_that_list_no_outputs(address: str) -> None:
    wish = {"binary_data_output": True}
    reply = infer(address, {"inputs": two(), "parameters": wish})
    assert reply.headers["content-type"] == "application/octet-stream"
    head = int(reply.headers["Inference-Header-Content-Length"])
    assert [output["parameters"] for output in json.loads(reply.body[:head])["outputs"]] == [
        {"binary_data_size": 64}
    ] * 2
    assert len(reply.body) == head + 128
    reply = infer(address, {"inputs": two(), "parameters": wish, "outputs": [{"name": "OUTPUT1"}]})
    assert reply.json["outputs"][0]["data"] == [0] * 16


def test_outputs_are_binary_one_by_one(address: str) -> None:
    outputs = [{"name": "OUTPUT0", "parameters": {"binary_data": True}}, {"name": "OUTPUT1"}]
    reply = infer(address, {"inputs": two(), "outputs": outputs})
    head = int(reply.headers["Inference-Header-Content-Length"])
    first, second = json.loads(reply.body[:head])["outputs"]
    assert ("data" in first, "data" in second) == (False, True)
    assert np.frombuffer(reply.body[head:], np.int32).tolist() == [2] * 16


def test_a_raw_request_is_one_batch_of_bytes(address: str) -> None:
    raw = {"Inference-Header-Content-Length": "0"}
    x = np.ones((1, 4), np.float32)
    reply = ask(address, "/v2/models/linear/infer", x.tobytes(), raw)
    head = int(reply.headers["Inference-Header-Content-Length"])
    np.testing.assert_allclose(np.frombuffer(reply.body[head:], np.float32), (x @ WEIGHT)[0])
    reply = ask(address, "/v2/models/word/infer", b"hello", raw)
    assert reply.body.endswith(b"\x05\0\0\0hello")
    assert json.loads(ask(address, "/v2/models/truth/infer", b"\1\0\1", raw).body.split(b"}]}")[0] + b"}]}")["outputs"][
        0
    ]["shape"] == [1, 3]
    assert "Raw request must only have 1 input" in ask(address, "/v2/models/simple/infer", b"x", raw).error
    assert "must have input shape [1]" in ask(address, "/v2/models/text/infer", b"x", raw).error


@pytest.mark.parametrize(
    "path, body, status, error",
    [
        ("/v2/", None, 404, "Not Found"),
        ("/", None, 404, "Not Found"),
        ("/metrics", None, 404, "Not Found"),
        ("/v2/health/live", b"", 405, "Method Not Allowed"),
        ("/v2/models/simple/infer", None, 405, "Method Not Allowed"),
        ("/v2/repository/index", None, 405, "Method Not Allowed"),
        ("/v2/models/nope", None, 404, "Request for unknown model: 'nope' is not found"),
        ("/v2/models/nope/config", None, 404, "Request for unknown model: 'nope' is not found"),
        ("/v2/models/nope/infer", b"{}", 404, "Request for unknown model: 'nope' is not found"),
        ("/v2/models/simple/versions/2", None, 404, "Request for unknown model: 'simple' version 2 is not found"),
        ("/v2/models/simple/versions/99999999999999999999/ready", None, 400, "failed to get model version"),
        ("/v2/models/simple/versions/" + "0" * 5000, None, 400, "failed to get model version"),
        ("/v2/models/nope/ready", None, 400, "Model version not ready"),
        ("/v2/repository/index", b'{"ready": 1}', 400, "Invalid value for 'ready': expected a boolean"),
        ("/v2/repository/models/nope/load", b"", 500, "failed to load 'nope', failed to poll from model repository"),
    ],
)
def test_paths_answer_as_triton_does(address: str, path: str, body: bytes | None, status: int, error: str) -> None:
    reply = ask(address, path, body)
    assert (reply.status, reply.error[: len(error)]) == (status, error)


def test_models_are_loaded_and_unloaded_on_request(repository: Path) -> None:
    with (
        serving(start([repository], explicit=True, load_model=["simple"])) as at,
        triton.InferenceServerClient(at) as c,
    ):
        assert not c.is_model_ready("linear")
        c.load_model("linear")
        assert c.is_model_ready("linear")
        c.unload_model("linear")
        c.unload_model("nope")
        rows = [{"name": "linear", "version": number, "state": "UNAVAILABLE", "reason": "unloaded"} for number in "13"]
        assert [row for row in c.get_model_repository_index() if row["name"] == "linear"] == rows
        c.load_model("linear")
        assert c.is_model_ready("linear", "3")


def test_a_model_that_fails_to_load_says_why(tmp_path: Path) -> None:
    (write_model(tmp_path, "bad", linear()) / "1/model.onnx").write_bytes(b"junk")
    with serving(start([tmp_path], explicit=True)) as address:
        reply = ask(address, "/v2/repository/models/bad/load", b"")
        assert reply.status == 400
        start_of = (
            "load failed for model 'bad': version 1 is at UNAVAILABLE state: Invalid argument: onnxruntime cannot load"
        )
        assert reply.error.startswith(start_of)
        assert ask(address, "/v2/health/ready").status == 400
        assert ask(address, "/v2/health/live").status == 200


def test_model_control_needs_explicit_mode(repository: Path) -> None:
    with serving(start([repository])) as address:
        reply = ask(address, "/v2/repository/models/simple/load", b"")
        assert (reply.status, "explicit model load / unload is not allowed" in reply.error) == (503, True)


def without(tensor: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in tensor.items() if name not in names}


FIRST, SECOND = two()
HOSTILE_FIELDS: list[tuple[Any, str]] = [
    ({}, "Unable to parse 'inputs'"),
    ([], "Unable to parse the request"),
    ({"inputs": {}}, "Unable to parse 'inputs'"),
    ({"inputs": None}, "Unable to parse 'inputs'"),
    ({"inputs": [1]}, "Unable to parse an input"),
    ({"inputs": [without(FIRST, "name"), SECOND]}, "Unable to parse 'name'"),
    ({"inputs": [FIRST | {"name": 3}, SECOND]}, "Unable to parse 'name'"),
    ({"inputs": [FIRST | {"name": {}}, SECOND]}, "Unable to parse 'name'"),
    ({"inputs": [without(FIRST, "shape"), SECOND]}, "Unable to parse 'shape'"),
    ({"inputs": [FIRST | {"shape": [-1, 16]}, SECOND]}, "Unable to parse 'shape'"),
    ({"inputs": [FIRST | {"shape": [1.0, 16]}, SECOND]}, "Unable to parse 'shape'"),
    ({"inputs": [FIRST | {"shape": [True, 16]}, SECOND]}, "Unable to parse 'shape'"),
    ({"inputs": [FIRST | {"shape": [2**63, 1]}, SECOND]}, "Unable to parse 'shape'"),
    ({"inputs": [FIRST | {"shape": [2**40, 2**40]}, SECOND]}, "exceed maximum size"),
    ({"inputs": [FIRST | {"shape": [1] * 100}, SECOND]}, "100 dimensions"),
    ({"inputs": [FIRST | {"shape": [2**62, 2]}, SECOND]}, "exceed maximum size"),
    ({"inputs": [FIRST | {"shape": [2**40, 16]}, SECOND]}, "does not match true shape"),
    ({"inputs": [FIRST | {"shape": [0, 2**62], "data": []}, SECOND | {"shape": [0, 2**62], "data": []}]}, "batch-size"),
    ({"inputs": [FIRST | {"datatype": "FP7"}, SECOND]}, "invalid datatype for input INPUT0"),
    ({"inputs": [FIRST | {"datatype": "FP16"}, SECOND]}, "receiving FP16 data via JSON is not supported"),
    ({"inputs": [FIRST | {"datatype": "BF16"}, SECOND]}, "receiving BF16 data via JSON is not supported"),
    ({"inputs": [FIRST | {"data": 3}, SECOND]}, "Unable to parse 'data'"),
    ({"inputs": [FIRST | {"data": [1]}, SECOND]}, "does not match true shape"),
    ({"inputs": [without(FIRST, "data"), SECOND]}, "But no field is set"),
    ({"inputs": [FIRST | {"parameters": {"binary_data_size": 4}}, SECOND]}, "set 'data' 'binary_data_size'"),
    ({"inputs": [without(FIRST, "data") | {"parameters": {"shared_memory_region": "r"}}, SECOND]}, "shared memory"),
    ({"inputs": [without(FIRST, "data") | {"parameters": {"binary_data_size": 64}}, SECOND]}, "64 additional bytes"),
    ({"inputs": [without(FIRST, "data") | {"parameters": {"binary_data_size": -1}}, SECOND]}, "binary_data_size"),
    ({"inputs": [without(FIRST, "data") | {"parameters": {"binary_data_size": "4"}}, SECOND]}, "binary_data_size"),
    ({"inputs": [FIRST, FIRST]}, "already exists"),
    ({"inputs": [FIRST, SECOND], "outputs": [{}]}, "Unable to parse 'name'"),
    ({"inputs": [FIRST, SECOND], "outputs": 1}, "Unable to parse 'outputs'"),
    (
        {"inputs": [FIRST, SECOND], "outputs": [{"name": "OUTPUT0", "parameters": {"classification": 1}}]},
        "classification",
    ),
    ({"inputs": [FIRST, SECOND], "outputs": [{"name": "OUTPUT0", "parameters": {"binary_data": 1}}]}, "binary_data"),
    ({"inputs": [FIRST, SECOND], "parameters": []}, "Unable to parse 'parameters'"),
    ({"inputs": [FIRST, SECOND], "parameters": {"binary_data_output": "yes"}}, "binary_data_output"),
    ({"inputs": [FIRST, SECOND], "parameters": {"a": None}}, "parameter 'a' has invalid type"),
    ({"inputs": [FIRST, SECOND], "parameters": {"a": [1]}}, "parameter 'a' has invalid type"),
    ({"inputs": [FIRST, SECOND], "parameters": {"sequence_start": 1}}, "parameter 'sequence_start' has invalid type"),
    ({"inputs": [FIRST, SECOND], "parameters": {"triton_x": 1}}, "starting with 'triton_' are reserved"),
    ({"inputs": [FIRST, SECOND], "id": 7}, "Unable to parse 'id'"),
]


@pytest.mark.parametrize("fields, error", HOSTILE_FIELDS)
def test_fields_that_make_no_sense_are_refused(address: str, fields: Any, error: str) -> None:
    reply = infer(address, fields)
    assert reply.status == 400
    assert error in reply.error


def test_a_refusal_names_the_request(address: str) -> None:
    assert infer(address, {"id": "q", "inputs": [FIRST]}).error.startswith("[request id: q] expected 2 inputs")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe{",
        b"nul",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"inputs":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"inputs":[{"name":"X","shape":[' + b"9" * 5000 + b"]}]}",
        b'{"inputs":[{"name":"X","datatype":"INT32","shape":[1],"data":' + b"[" * 500 + b"1" + b"]" * 500 + b"}]}",
        '{"inputs":[]}'.encode("utf-16"),
    ],
    ids=lambda body: repr(body[:20]),
)
def test_bodies_that_are_not_requests_are_refused(address: str, body: bytes) -> None:
    for path in ("/v2/models/simple/infer", "/v2/models/text/infer"):
        reply = ask(address, path, body)
        assert reply.status == 400
        assert reply.error
    assert ask(address, "/v2/health/live").status == 200


@pytest.mark.parametrize(
    "header, error",
    [
        ("9999", "inference header size should be in range (0, "),
        ("-1", "inference header size should be in range (0, "),
        ("x", "Unable to parse Inference-Header-Content-Length, got: x"),
        ("1" * 30, "Unable to parse Inference-Header-Content-Length"),
        ("3", "failed to parse the request JSON buffer"),
    ],
)
def test_a_header_length_that_is_not_in_the_body_is_refused(address: str, header: str, error: str) -> None:
    body = json.dumps({"inputs": two()}).encode()
    reply = ask(address, "/v2/models/simple/infer", body, {"Inference-Header-Content-Length": header})
    assert reply.status == 400
    assert reply.error.startswith(error)


@pytest.mark.parametrize(
    "tail, size, error",
    [
        (bytes(4), 8, "4 additional bytes"),
        (bytes(9), 8, "unexpected additional input data"),
        (bytes(8), 8, "byte size mismatch for input 'X' for model 'half'. Expected 4, got 8"),
    ],
)
def test_tails_that_do_not_fit_are_refused(address: str, tail: bytes, size: int, error: str) -> None:
    tensor = {"name": "X", "datatype": "FP16", "shape": [1, 2], "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [tensor]}).encode()
    reply = ask(address, "/v2/models/half/infer", head + tail, {"Inference-Header-Content-Length": str(len(head))})
    assert (reply.status, error in reply.error) == (400, True)


def test_text_whose_lengths_are_wrong_is_refused(address: str) -> None:
    for tail in (b"\x09\0\0\0ab", b"\0\0", b"\xff\xff\xff\xff", b"\0\0\0\0" * 3, b"\0\0\0\0"):
        tensor = {"name": "X", "datatype": "BYTES", "shape": [1, 2], "parameters": {"binary_data_size": len(tail)}}
        head = json.dumps({"inputs": [tensor]}).encode()
        reply = ask(address, "/v2/models/text/infer", head + tail, {"Inference-Header-Content-Length": str(len(head))})
        assert (reply.status, "inference input 'X' for model 'text'" in reply.error) == (400, True)


@pytest.mark.parametrize(
    "body, packing",
    [
        (bytes(LIMIT + 1), "identity"),
        (gzip.compress(bytes(50 * LIMIT)), "gzip"),
        (zlib.compress(bytes(50 * LIMIT)), "deflate"),
    ],
)
def test_a_body_over_the_limit_is_refused_packed_or_not(address: str, body: bytes, packing: str) -> None:
    reply = ask(address, "/v2/models/simple/infer", body, {"Content-Encoding": packing})
    assert reply.status == 400
    assert "Use --http-max-input-size to increase the limit" in reply.error


@pytest.mark.parametrize(
    "packing, body", [("gzip", b"junk"), ("gzip", gzip.compress(b"{}", mtime=0)[:-4]), ("br", b"{}")]
)
def test_packing_that_cannot_be_undone_is_refused(address: str, packing: str, body: bytes) -> None:
    assert ask(address, "/v2/models/simple/infer", body, {"Content-Encoding": packing}).status == 400


def test_half_precision_answers_are_not_given_in_json(address: str) -> None:
    head = json.dumps(
        {"inputs": [{"name": "X", "datatype": "FP16", "shape": [1, 2], "parameters": {"binary_data_size": 4}}]}
    ).encode()
    reply = ask(address, "/v2/models/half/infer", head + bytes(4), {"Inference-Header-Content-Length": str(len(head))})
    assert (reply.status, reply.error[:44]) == (400, "sending FP16 data via JSON is not supported.")


def test_requests_at_the_same_time_do_not_mix(address: str) -> None:
    wrong: list[Any] = []

    def run(value: int) -> None:
        for _ in range(10):
            data = infer(address, {"inputs": two(value)}).json["outputs"][0]["data"]
            if data != [2 * value] * 16:
                wrong.append(data)

    threads = [threading.Thread(target=run, args=(value,)) for value in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("verb", ["generate", "generate_stream"])
@pytest.mark.parametrize("packs", [False, True])
def test_what_is_large_is_read_beside_the_loop(
    address: str, monkeypatch: pytest.MonkeyPatch, verb: str, packs: bool
) -> None:
    where, read = [], generation.request_of

    def seen(body: bytes, contract: Contract) -> InferRequest:
        where.append(threading.current_thread().name.partition("_")[0])
        return read(body, contract)

    monkeypatch.setattr(generation, "request_of", seen)
    for size in (10, 2**19):
        body = json.dumps({"X": "a" * size}).encode()
        headers = {"Content-Encoding": "gzip"} if packs else {}
        reply = ask(address, f"/v2/models/word/{verb}", gzip.compress(body) if packs else body, headers)
        assert (reply.status, b"a" * size in reply.body) == (200, True)
    assert where == [("infer" if packs else "endpoints"), "infer"]


def test_an_empty_server_is_ready() -> None:
    with serving(Server()) as address:
        assert ask(address, "/v2/health/ready").status == 200
        assert ask(address, "/v2/repository/index", b"").json == []


class Stalled:
    """A model that answers when told to."""

    def __init__(self, directory: Path) -> None:
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.model = load_version(directory, "1")
        scheduler: Any = self.model.scheduler
        self.inner, scheduler._run = scheduler._run, self.run

    def run(self, jobs: Sequence[Job], instance: int) -> Outcome:
        self.entered.set()
        assert self.go_on.wait(20)
        outcome: Outcome = self.inner(jobs, instance)
        return outcome


@pytest.fixture
def stalled(repository: Path) -> Stalled:
    return Stalled(repository / "simple")


def test_health_is_answered_while_a_model_computes(stalled: Stalled) -> None:
    server = Server()
    server.adopt(stalled.model)
    with serving(server) as address, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(infer, address, {"inputs": two()})
        assert stalled.entered.wait(20)
        assert ask(address, "/v2/health/ready").status == 200
        assert not answer.done()
        stalled.go_on.set()
        assert answer.result(20).status == 200


def test_a_request_under_way_is_answered_before_the_server_ends(stalled: Stalled) -> None:
    server = Server()
    server.adopt(stalled.model)
    with ThreadPoolExecutor(1) as pool:
        with serving(server) as address:
            answer = pool.submit(infer, address, {"inputs": two()})
            assert stalled.entered.wait(20)
            threading.Timer(0.2, stalled.go_on.set).start()
        assert answer.result(20).json["outputs"][0]["data"] == [2] * 16


def test_an_error_of_our_own_is_an_answer_too(stalled: Stalled, caplog: pytest.LogCaptureFixture) -> None:
    def fail(jobs: Sequence[Job], instance: int) -> Outcome:
        raise ZeroDivisionError("of our own")

    server = Server()
    scheduler: Any = stalled.model.scheduler
    scheduler._run = fail
    server.adopt(stalled.model)
    with serving(server) as address:
        reply = infer(address, {"inputs": two()})
        assert (reply.status, "of our own" in reply.error) == (500, True)
        assert ask(address, "/v2/health/live").status == 200
    assert "ZeroDivisionError" in caplog.text
