"""Many clients at once, while models come and go and others send nonsense: nothing is lost, nothing is wrong."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from nemoport.runner.serve import Addresses, serving_all
from nemoport.runner.server import Server, start

from .models import WEIGHT, linear, write_model
from .python_models import write_python
from .test_http import ask

ROUNDS = int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "4"))
CLIENTS = 12

PATHS = ("linear/infer", "double/infer", "double/generate", "double/generate_stream", "x/infer")

DOUBLE = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.alive = True

    def execute(self, requests):
        assert self.alive
        outputs = [pb_utils.get_input_tensor_by_name(request, "X").as_numpy() * 2 for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("Y", output)]) for output in outputs]

    def finalize(self):
        self.alive = False
"""
DOUBLE_CONFIG = """backend: "python" max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 200 }
input { name: "X" data_type: TYPE_FP32 dims: -1 } output { name: "Y" data_type: TYPE_FP32 dims: -1 }
instance_group { count: 2 kind: KIND_CPU }"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    write_model(tmp_path, "linear", linear(), "max_batch_size: 8 dynamic_batching {}")
    write_python(tmp_path, "double", DOUBLE, DOUBLE_CONFIG)
    made = start([tmp_path], explicit=True, load_model=["*"])
    yield made
    made.close()


def check(client: Any, library: Any, chance: random.Random) -> None:
    x = np.array([[chance.random() for _ in range(4)]] * chance.randint(1, 4), np.float32)
    for model, expected in (("linear", x @ WEIGHT), ("double", x * 2)):
        tensor = library.InferInput("X", x.shape, "FP32")
        tensor.set_data_from_numpy(x)
        np.testing.assert_allclose(client.infer(model, [tensor]).as_numpy("Y"), expected, rtol=1e-5)


def in_crowd(addresses: Addresses, beneath: Callable[[random.Random], None]) -> None:
    """`beneath` is called again and again, until every client is done."""
    done = threading.Event()

    def client(seed: int) -> None:
        chance, kind = random.Random(seed), "grpc" if seed % 2 else "http"
        library: Any = tritonclient.grpc if seed % 2 else tritonclient.http
        with library.InferenceServerClient(getattr(addresses, kind)) as made:
            for _ in range(5 * ROUNDS):
                check(made, library, chance)

    def under() -> None:
        chance = random.Random(99)
        while not done.is_set():
            beneath(chance)

    with ThreadPoolExecutor(CLIENTS + 1) as pool:
        below = pool.submit(under)
        try:
            for each in [pool.submit(client, seed) for seed in range(CLIENTS)]:
                each.result(300)
        finally:
            done.set()
        below.result(60)


@pytest.mark.soak
def test_nothing_is_lost_while_models_are_reloaded(server: Server) -> None:
    (repository,) = server.repositories

    def reload(chance: random.Random) -> None:
        for name in ("linear", "double"):
            (repository / name / "config.pbtxt").touch()
            server.load(name)

    with serving_all(server) as addresses:
        in_crowd(addresses, reload)


def nonsense(chance: random.Random) -> bytes:
    """A request with some of it turned into something else."""
    text = json.dumps({"inputs": [{"name": "X", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}).encode()
    others = [b"", b"[", b"}", b"-1", b"9" * 30, b'"', b"null", b"\xff", b"\\u0000", chance.randbytes(3)]
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(text))
        text = text[:at] + chance.choice(others) + text[at + chance.randint(0, 3) :]
    return text


@pytest.mark.soak
def test_good_requests_are_answered_right_among_nonsense(server: Server) -> None:
    with serving_all(server) as addresses:

        def disturb(chance: random.Random) -> None:
            path = chance.choice(
                ["linear/infer", "double/infer", "double/generate", "double/generate_stream", "x/infer"]
            )
            headers = {"Inference-Header-Content-Length": str(chance.randint(-1, 99))} if chance.random() < 0.3 else {}
            reply = ask(addresses.http, f"/v2/models/{path}", nonsense(chance), headers)
            assert reply.status in (200, 400, 404), (reply.status, reply.body)

        in_crowd(addresses, disturb)
