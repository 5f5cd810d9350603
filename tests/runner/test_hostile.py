"""Whatever is in a body, the answer is a result or a refusal that blames the request."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from nemoport.runner.http.app import infer as infer_async
from nemoport.runner.http.exchange import Answer, Call
from nemoport.runner.model import load_version
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.server import Server

from .models import identity, write_model

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
DIM = st.integers(-2, 5) | st.sampled_from([2**31, 2**62, 2**63, 2**64])
PARAMETERS = st.fixed_dictionaries(
    {}, optional={"binary_data_size": st.integers(-1, 40) | JSON, "binary_data": st.booleans() | JSON, "x": JSON}
)


def mostly(likely: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(likely, likely, likely, JSON)


INPUT = st.fixed_dictionaries(
    {},
    optional={
        "name": mostly(st.just("X")),
        "datatype": mostly(st.sampled_from(["FP32", "BYTES", "BOOL", "BF16"])),
        "shape": mostly(st.lists(DIM, max_size=3)),
        "data": mostly(st.lists(st.integers() | st.floats(), max_size=4)),
        "parameters": mostly(PARAMETERS),
    },
)
REQUEST = st.fixed_dictionaries(
    {"inputs": mostly(st.lists(mostly(INPUT), max_size=2))},
    optional={
        "id": mostly(st.text(max_size=3)),
        "parameters": mostly(st.fixed_dictionaries({}, optional={"binary_data_output": mostly(st.booleans())})),
        "outputs": mostly(st.lists(mostly(st.fixed_dictionaries({"name": st.just("Y"), "parameters": PARAMETERS})))),
    },
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    root: Path = tmp_path_factory.mktemp("repository")
    made = Server()
    made.adopt(load_version(write_model(root, "floats", identity(TensorProto.FLOAT, ("b", "n"))), "1"))
    made.adopt(load_version(write_model(root, "texts", identity(TensorProto.STRING, (2, "n"))), "1"))
    return made


def infer(server: Server, call: Call) -> Answer:
    with ThreadPoolExecutor(1) as threads:
        return asyncio.run(infer_async(server, call, threads))


@pytest.mark.parametrize("model", ["floats", "texts"])
@settings(max_examples=150, deadline=None)
@given(fields=REQUEST, tail=st.binary(max_size=40), wrong_by=st.sampled_from([0, 0, 0, 0, 1, -1, 100]))
def test_any_body_is_answered_or_refused(
    server: Server, model: str, fields: dict[str, Any], tail: bytes, wrong_by: int
) -> None:
    head = json.dumps(fields).encode()
    headers = {b"inference-header-content-length": b"%d" % (len(head) + wrong_by)}
    try:
        assert infer(server, Call(headers, head + tail, 2**20, model)).status == 200
    except Refusal as refusal:
        assert refusal.code is Code.INVALID_ARG  # noqa: PT017  one of two ends is right


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=60), length=st.none() | st.binary(max_size=4))
def test_any_bytes_are_answered_or_refused(server: Server, body: bytes, length: bytes | None) -> None:
    headers = {} if length is None else {b"inference-header-content-length": length}
    for model in ("floats", "texts"):
        try:
            infer(server, Call(headers, body, 2**20, model))
        except Refusal as refusal:
            assert refusal.code is Code.INVALID_ARG  # noqa: PT017  one of two ends is right
