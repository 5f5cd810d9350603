"""A real tritonserver and this one are asked the same things, and say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tritonserver import tritonserver

from nemoport.runner.serve import serving
from nemoport.runner.server import start

from .models import SIMPLE_CONFIG, add_sub, linear, write_model
from .python_models import ECHO, X_CONFIG, write_python
from .test_http import ask, two

LINEAR_CONFIG = """platform: "onnxruntime_onnx" max_batch_size: 4 version_policy { all {} } dynamic_batching {}
input { name: "X" data_type: TYPE_FP32 dims: 4 } output { name: "Y" data_type: TYPE_FP32 dims: 3 }"""
FLAT_CONFIG = """backend: "onnxruntime"
input { name: "X" data_type: TYPE_FP32 dims: [-1, 4] } output { name: "Y" data_type: TYPE_FP32 dims: [-1, 3] }"""

FIRST, SECOND = two()
X = {"name": "X", "datatype": "FP32", "shape": [1, 4], "data": [0.1, 1, 3e-5, -7]}


def infer(*inputs: Any, model: str = "simple", **fields: Any) -> tuple[str, bytes]:
    return f"/v2/models/{model}/infer", json.dumps({"inputs": inputs, **fields}).encode()


CALLS: list[tuple[str, bytes | None]] = [
    ("/v2/health/live", None),
    ("/v2/health/live", b""),
    ("/v2/health/ready", None),
    ("/v2/", None),
    ("/v2/models/linear", None),
    ("/v2/models/flat", None),
    ("/v2/models/linear/versions/1", None),
    ("/v2/models/linear/versions/2", None),
    ("/v2/models/linear/config", None),
    ("/v2/models/simple/config", None),
    ("/v2/models/flat/config", None),
    ("/v2/models/nope", None),
    ("/v2/models/nope/config", None),
    ("/v2/models/nope/ready", None),
    ("/v2/models/nope/infer", b"{}"),
    ("/v2/models/linear/ready", None),
    ("/v2/models/linear/versions/2/ready", None),
    ("/v2/models/linear/versions/2/infer", b"{}"),
    ("/v2/repository/index", b""),
    ("/v2/repository/index", b'{"ready": true}'),
    ("/v2/repository/models/nope/load", b""),
    ("/v2/repository/models/nope/unload", b""),
    infer(FIRST, SECOND),
    infer(FIRST, SECOND, id="a", outputs=[{"name": "OUTPUT1"}], parameters={"binary_data_output": True, "x": 1}),
    infer(X, model="linear"),
    infer(X | {"data": [[0.1, 1], [3e-5, -7]]}, model="flat"),
    infer(X | {"shape": [0, 4], "data": []}, model="flat"),
    infer(FIRST),
    infer(FIRST, SECOND | {"name": "X"}),
    infer(FIRST, SECOND | {"datatype": "FP32"}),
    infer(FIRST, SECOND | {"datatype": "FP7"}),
    infer(FIRST, SECOND | {"datatype": "FP16"}),
    infer(FIRST, SECOND | {"shape": [1, 8], "data": [1] * 8}),
    infer(X | {"shape": [5, 4], "data": [0.0] * 20}, model="linear"),
    infer(X | {"shape": [4]}, model="linear"),
    infer(FIRST, SECOND, outputs=[{"name": "NOPE"}]),
    infer(FIRST, FIRST),
    infer(FIRST, {"name": "INPUT1", "datatype": "INT32", "shape": [1, 16]}),
    infer(FIRST, SECOND | {"parameters": {"binary_data_size": 4}}),
    infer({"name": "X", "datatype": "FP32", "shape": [1, 4], "parameters": {"binary_data_size": 64}}, model="linear"),
]


def said(address: str, path: str, body: bytes | None) -> tuple[int, Any]:
    reply = ask(address, path, body)
    content = json.loads(reply.body) if reply.body else None
    if isinstance(content, dict):
        content.pop("runtime", None)  # the stand-in for the backend names its Python file here
        if "outputs" in content:
            content["outputs"].sort(key=lambda tensor: tensor["name"])
    return reply.status, content


def test_every_call_has_the_same_answer(tmp_path: Path) -> None:
    write_model(tmp_path, "simple", add_sub(), SIMPLE_CONFIG)
    write_model(tmp_path, "linear", linear(), LINEAR_CONFIG, versions=["1", "3"])
    write_model(tmp_path, "flat", linear(), FLAT_CONFIG)
    with tritonserver(tmp_path, load=["*"], exit_on_error=False) as real:
        theirs = [said(real.http.removeprefix("http://"), *call) for call in CALLS]
    with serving(start([tmp_path], explicit=True, load_model=["*"])) as address:
        ours = [said(address, *call) for call in CALLS]
    differing = [(call, our, their) for call, our, their in zip(CALLS, ours, theirs, strict=True) if our != their]
    assert not differing


PATHS = (
    "/v2/models/simple%2Fready",
    "/v2/models/simple%2fready",
    "/v2/models/simple%2Fversions%2F1",
    "/v2%2Fmodels/simple",
    "/v2/models/s%69mple",
    "/v2/models/s%69mple/ready",
    "/v2/models/a%20b",
    "/v2/models/a+b",
    "/v2/models/a%b",
    "/v2/models/%zz/config",
    "/v2/models/%C3%BC",
    "/v2/models/simple%00",
    "/v2/models/simple%3Fx",
    "/v2/models/simple?x=%2Fready",
    "/v2/models/simple/%72eady",
    "/v2/models/simple/versions/%31",
    "/v2/models//ready",
    "/v2/models/simple/",
    "/v2/health/../health/live",
    "/v2/health/%6cive",
    "/%76%32",
)


def test_paths_are_taken_as_they_are_written(tmp_path: Path) -> None:
    write_model(tmp_path, "simple", add_sub(), SIMPLE_CONFIG)
    for odd in ("a%20b", "ü"):
        write_model(tmp_path, odd, linear(), FLAT_CONFIG)
    with tritonserver(tmp_path, load=["*"], exit_on_error=False) as real:
        theirs = {path: said(real.http.removeprefix("http://"), path, None) for path in PATHS}
    with serving(start([tmp_path], explicit=True, load_model=["*"])) as address:
        ours = {path: said(address, path, None) for path in PATHS}
    assert ours == theirs


RUNTIMES = ("nope.py", "nope.so", "libtriton_onnxruntime.so", "model.py", "libtriton_python.so", "")


def test_a_runtime_that_is_not_the_backend_s_own_is_refused_in_the_same_words(tmp_path: Path) -> None:
    names = [f"runtime-{at}" for at in range(len(RUNTIMES))]
    for name, runtime in zip(names, RUNTIMES, strict=True):
        write_python(tmp_path, name, ECHO, f'{X_CONFIG} runtime: "{runtime}"')
    with tritonserver(tmp_path, load=[], exit_on_error=False) as real:
        theirs = [loading(real.http.removeprefix("http://"), name) for name in names]
    with serving(start([tmp_path], explicit=True)) as address:
        ours = [loading(address, name) for name in names]
    assert [status for status, _ in theirs] == [400] * 4 + [200] * 2
    assert ours == theirs


def loading(address: str, model: str) -> tuple[int, str]:
    """Without the directories, which are others."""
    reply = ask(address, f"/v2/repository/models/{model}/load", b"")
    return reply.status, reply.error.partition("searched:")[0] if reply.status != 200 else ""


CONFIGS = {
    "fine": SIMPLE_CONFIG,
    "renamed": SIMPLE_CONFIG.replace('"simple"', '"other"'),
    "platform": SIMPLE_CONFIG.replace('backend: "onnxruntime"', 'platform: "onnxruntime"'),
    "negative": SIMPLE_CONFIG.replace("max_batch_size: 8", "max_batch_size: -1"),
    "misspelt": SIMPLE_CONFIG.replace("max_batch_size", "max_batchsize"),
    "zero": SIMPLE_CONFIG.replace("dims: [ 16 ]", "dims: [ 0 ]"),
    "dimless": SIMPLE_CONFIG.replace("dims: [ 16 ]", "dims: []"),
    "elsewhere": SIMPLE_CONFIG + "version_policy { specific { versions: 2 } }",
    "latest-of-none": SIMPLE_CONFIG + "version_policy { latest {} }",
    "one-of-two": SIMPLE_CONFIG + "version_policy { specific { versions: [1, 2] } }",
    "preferred": SIMPLE_CONFIG + "dynamic_batching { preferred_batch_size: 9 }",
    "gpu": SIMPLE_CONFIG + "instance_group { kind: KIND_GPU }",
    "cpu-with-gpu": SIMPLE_CONFIG + "instance_group { kind: KIND_CPU gpus: 0 }",
    "auto": SIMPLE_CONFIG + "instance_group { kind: KIND_AUTO count: 3 }",
}


def test_the_same_configs_are_refused_in_words_that_begin_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, config in CONFIGS.items():
        write_model(tmp_path, name, add_sub(), config.replace('"simple"', f'"{name}"'))
    paths = [f"/v2/repository/models/{name}/load" for name in CONFIGS]
    with tritonserver(tmp_path, load=[], exit_on_error=False) as real:
        theirs = [ask(real.http.removeprefix("http://"), path, b"") for path in paths]
    with serving(start([tmp_path], explicit=True)) as address:
        ours = [ask(address, path, b"") for path in paths]
    assert [reply.status for reply in ours] == [reply.status for reply in theirs]
    for our, their in zip(ours, theirs, strict=True):
        if their.status != 200:
            assert our.error.startswith(their.error.rstrip(";\n"))
