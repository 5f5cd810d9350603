"""Requests that were right before something was done to them, over HTTP and gRPC, and bytes that never were requests.

Every maker takes its chance from a seeded generator, so that a run can be repeated.
"""

from __future__ import annotations

import base64
import copy
import gzip
import json
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tritonclient.grpc import service_pb2 as pb

MODELS = ("linear", "text", "flat", "double", "nope", "é", "..", "a" * 300)
VERBS = (
    "infer",
    "generate",
    "generate_stream",
    "config",
    "stats",
    "ready",
    "",
    "load",
    "versions/1/infer",
    "versions/9",
)
X = {"name": "X", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}
ODD: tuple[Any, ...] = (None, True, -1, 0, 1.5, 2**63, 2**64, 10**40, "", "X", "\ud800", [], {}, [[]], [None], {"a": 1})
DIMS = (0, 1, 1, 4, 4, -1, 2**31, 2**62, 2**63, 2**64, 1.5, "4", None)


@dataclass(frozen=True)
class HttpCall:
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    method: str = "POST"


def _infer(body: bytes, chance: random.Random, **headers: str) -> HttpCall:
    return HttpCall(f"/v2/models/{chance.choice(('linear', 'text', 'flat', 'double'))}/infer", body, headers)


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode(errors="surrogatepass")


def spliced(chance: random.Random) -> HttpCall:
    """Some of the text turned into something else."""
    text = _dumped({"inputs": [X], "outputs": [{"name": "Y"}]})
    others = [
        b"",
        b"[",
        b"}",
        b"-1",
        b"9" * 30,
        b'"',
        b"null",
        b"\xff",
        b"\\u0000",
        b"1e999",
        b"NaN",
        chance.randbytes(3),
    ]
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(others) + text[at + chance.randint(0, 3) :]
    return HttpCall(f"/v2/models/{chance.choice(('linear', 'double', 'flat'))}/{chance.choice(VERBS[:3])}", text)


def misfilled(chance: random.Random) -> HttpCall:
    """Members with values of another kind, or twice, or none."""
    tensor: dict[str, Any] = dict(X)
    request: dict[str, Any] = {"inputs": [tensor], "id": "a", "parameters": {}, "outputs": [{"name": "Y"}]}
    for _ in range(chance.randint(1, 3)):
        where = chance.choice(
            (tensor, request, request["parameters"] if isinstance(request["parameters"], dict) else {})
        )
        name = chance.choice((*where, "parameters", "priority", "timeout", "sequence_id", "binary_data_output"))
        where[name] = copy.deepcopy(chance.choice(ODD))
    if chance.random() < 0.3 and isinstance(request["inputs"], list):
        request["inputs"] = request["inputs"] * 2
    if chance.random() < 0.2 and isinstance(request["outputs"], list):
        request["outputs"] = request["outputs"] * 2
    return _infer(_dumped(request), chance)


def misshapen(chance: random.Random) -> HttpCall:
    dims = [chance.choice(DIMS) for _ in range(chance.choice((0, 1, 2, 2, 3, 70)))]
    return _infer(_dumped({"inputs": [X | {"shape": dims, "data": [1.0] * chance.randint(0, 9)}]}), chance)


def deep(chance: random.Random) -> HttpCall:
    depth = chance.choice((50, 101, 5_000, 100_000))
    nest = "[" * depth + "]" * (depth if chance.random() < 0.7 else 0)
    body = f'{{"inputs": [{{"name": "X", "datatype": "FP32", "shape": [1, 4], "data": {nest}}}]}}'
    return _infer((nest if chance.random() < 0.3 else body).encode(), chance)


def huge(chance: random.Random) -> HttpCall:
    text = chance.choice(("é", "a", "\0")) * chance.choice((10_000, 300_000))
    fields = chance.choice(({"id": text}, {text: 1}, {"parameters": {text: text}}, {"outputs": [{"name": text}]}))
    return _infer(_dumped({"inputs": [X | chance.choice(({}, {"name": text}, {"datatype": text}))], **fields}), chance)


def tailed(chance: random.Random) -> HttpCall:
    """Binary tails that are cut, or longer than said, after a header of another length."""
    size = chance.choice((0, 8, 15, 16, 17, 2**31, 2**63, -1, "16", 16, 16))
    tensor = {"name": "X", "datatype": chance.choice(("FP32", "BYTES", "BF16")), "shape": [1, 4]}
    head = _dumped({"inputs": [tensor | {"parameters": {"binary_data_size": size}}]})
    said = chance.choice((len(head), len(head), len(head) + 1, 0, -5, 10**25, "x", ""))
    body = head + chance.randbytes(chance.choice((0, 15, 16, 16, 17)))
    return _infer(body, chance, **{"Inference-Header-Content-Length": str(said)})


def packed(chance: random.Random) -> HttpCall:
    content = chance.choice((b"0" * 2**23, _dumped({"inputs": [X]}), b""))
    body = chance.choice((gzip.compress, zlib.compress, bytes))(content)
    body = body[: chance.choice((len(body), len(body) // 2))]
    return _infer(body, chance, **{"Content-Encoding": chance.choice(("gzip", "deflate", "br", "identity"))})


def oversized(chance: random.Random) -> HttpCall:
    return _infer(b" " * chance.choice((2**22 + 1, 2**23)), chance)


def misdirected(chance: random.Random) -> HttpCall:
    path = (
        f"/v2/models/{chance.choice(('linear', 'text', 'a%20b', '%2e%2e', '%00', 'a' * 5000))}/{chance.choice(VERBS)}"
    )
    path = chance.choice(
        (path, "/", "/v2/", "//v2", "/v2/models/linear/versions/" + "9" * 40 + "/infer", "/v2/logging?x")
    )
    return HttpCall(
        path, chance.choice((b"", b"{}", b"[")), {}, chance.choice(("GET", "POST", "PUT", "DELETE", "HEAD"))
    )


def ordered_about(chance: random.Random) -> HttpCall:
    """The repository, told to load what it cannot, and settings that are none."""
    name = chance.choice(
        ("file:1/model.onnx", "file:../../x", "file:" + "a" * 256, "file:", "file:/etc/x", "config", "x")
    )
    content = chance.choice((base64.b64encode(b"no model").decode(), "%%%", 7, None, '{"backend": "onnxruntime"}', "{"))
    config = chance.choice(({}, {"config": '{"backend": "onnxruntime"}'}))
    if chance.random() < 0.2:
        return HttpCall("/v2/logging", _dumped({chance.choice(("log_format", "log_info", "x")): chance.choice(ODD)}))
    verb = chance.choice(("models/broken/load", "models/nope/unload", "index", "models/broken/load"))
    return HttpCall(
        f"/v2/repository/{verb}", _dumped({"parameters": config | {name: content}, "ready": chance.choice(ODD)})
    )


HTTP: tuple[Callable[[random.Random], HttpCall], ...] = (
    spliced,
    misfilled,
    misshapen,
    deep,
    huge,
    tailed,
    packed,
    oversized,
    misdirected,
    ordered_about,
)


def no_http(chance: random.Random) -> bytes:
    """Bytes for a bare socket: no request, or the beginning of one."""
    head = b"POST /v2/models/linear/infer HTTP/1.1\r\nHost: x\r\n"
    return chance.choice(
        (
            chance.randbytes(50),
            head,
            head + b"Content-Length: -1\r\n\r\n{}",
            head + b"Content-Length: 1000\r\n\r\n{",
            head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
            head + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"\r\n" * 100,
        )
    )


def message(chance: random.Random) -> Any:
    """A ModelInferRequest."""
    entry = pb.ModelInferRequest.InferInputTensor(
        name=chance.choice(("X", "X", "X", "Y", "", "é")),
        datatype=chance.choice(("FP32", "FP32", "BYTES", "BF16", "", "x")),
        shape=[chance.choice((0, 1, 1, 4, 4, -1, 2**31, 2**63 - 1)) for _ in range(chance.choice((0, 1, 2, 2, 3, 70)))],
    )
    if chance.random() < 0.3:
        entry.contents.CopyFrom(pb.InferTensorContents(fp32_contents=[1] * chance.randint(0, 5)))
    raw = chance.choice((b"", bytes(16), bytes(15), chance.randbytes(40), bytes(2**20)))
    made = pb.ModelInferRequest(
        model_name=chance.choice(MODELS),
        model_version=chance.choice(("", "", "1", "-1", "1.5", "9" * 40)),
        id=chance.choice(("", "a", "é" * 5000)),
        inputs=[entry] * chance.choice((0, 1, 1, 1, 2)),
        raw_input_contents=[raw] * chance.choice((0, 1, 1, 1, 2)),
    )
    if chance.random() < 0.2:
        made.outputs.add(name=chance.choice(("Y", "Y", "Z", "")))
    if chance.random() < 0.2:
        name = chance.choice(("priority", "timeout", "sequence_id", "triton_enable_empty_final_response", "x"))
        made.parameters[name].int64_param = chance.randint(-1, 1)
    return made


def about_a_model(chance: random.Random) -> tuple[str, Any]:
    """A method and a request that name a model."""
    name, version = chance.choice(MODELS), chance.choice(("", "1", "x", "-1", "9" * 40))
    method = chance.choice(("ModelReady", "ModelMetadata", "ModelConfig", "ModelStatistics"))
    if chance.random() < 0.2:
        request = pb.RepositoryModelLoadRequest(model_name="broken")
        request.parameters[chance.choice(("config", "file:../x", "x"))].string_param = chance.choice(("", "{", "{}"))
        return "RepositoryModelLoad", request
    return method, getattr(pb, f"{method}Request")(name=name, version=version)
