"""Hostile requests over HTTP and gRPC among good ones, from one seed, to a server that is a process of its own.

2,000 in `make test`, 100,000 in `make soak`: nothing crashes, nothing hangs, nothing that is wrong with a request is
called the server's fault, memory stays where it was, and every good request is answered right meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from onnx import TensorProto
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from nemoport.runner.serve import Addresses

from . import hostile
from .models import WEIGHT, identity, linear, write_model
from .python_models import write_python
from .served import anonymous, served
from .test_load import DOUBLE, DOUBLE_CONFIG

log = logging.getLogger(__name__)

COUNT = 2000 * int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "1"))
SEED = int(os.environ.get("NEMOPORT_FUZZ_SEED", "1"))
WORKERS = 4
LARGEST = 2**22
"""Bytes of a request; some of the hostile ones are larger."""
GROWTH = 24 * 2**20
"""Bytes by which the server may grow after the first quarter, however many requests there are: where the quarter is
short, threads are still started and buffers still filled."""
PATIENCE = 30
BLAMES_THE_REQUEST = ("OK", "INVALID_ARGUMENT", "NOT_FOUND")
NOTHING_TO_LOAD = "failed to poll from model repository"
"""Triton calls a load of what is not there INTERNAL, and so do we."""


def write_all(root: Path) -> None:
    write_model(root, "linear", linear(), "max_batch_size: 8 dynamic_batching {}")
    write_model(root, "text", identity(TensorProto.STRING, ("b", 2)))
    write_model(root, "flat", identity(TensorProto.FLOAT, ("b", "n")), "max_batch_size: 0")
    write_python(root, "double", DOUBLE, DOUBLE_CONFIG)


class Client:
    """One worker with its connections. `seen` counts what came back."""

    def __init__(self, addresses: Addresses, chance: random.Random, channel: grpc.Channel) -> None:
        self.chance, self.seen = chance, Counter[str]()
        self._at = addresses.http
        self._http = HTTPConnection(addresses.http, timeout=PATIENCE)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

    def close(self) -> None:
        self._http.close()

    def run(self, count: int) -> None:
        kinds = (self.good_http, self.good_grpc, self.http, self.http, self.http, self.http, self.grpc, self.grpc)
        rare = (self.bare, self.about, self.stream, self.cancelled)
        for _ in range(count):
            self.chance.choice(rare if self.chance.random() < 0.1 else kinds)()

    def http(self) -> None:
        kind = self.chance.choice(hostile.HTTP)
        call = kind(self.chance)
        status, body = self._ask(call)
        assert status < 500 or NOTHING_TO_LOAD in body.decode(), (
            kind.__name__,
            call.path[:200],
            call.body[:400],
            status,
            body[:400],
        )
        self.seen[f"http {status}"] += 1

    def grpc(self) -> None:
        request = hostile.message(self.chance)
        self._call("ModelInfer", request)

    def about(self) -> None:
        self._call(*hostile.about_a_model(self.chance))

    def stream(self) -> None:
        requests = [hostile.message(self.chance) for _ in range(3)]
        said = list(self._stub.ModelStreamInfer(iter(requests), timeout=PATIENCE))
        assert len(said) == len(requests), (requests, said)
        self.seen["stream"] += 1

    def cancelled(self) -> None:
        call = self._stub.ModelInfer.future(self._linear(np.ones((1, 4), np.float32)), timeout=PATIENCE)
        call.cancel()
        self.seen["cancelled"] += 1

    def bare(self) -> None:
        host, port = self._at.split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE) as client, suppress(ConnectionError):
            client.sendall(hostile.no_http(self.chance))
            client.shutdown(socket.SHUT_WR)
            answer = client.recv(100)
            assert not answer.startswith(b"HTTP/1.1 5"), answer
        self.seen["bare"] += 1

    def good_http(self) -> None:
        model = self.chance.choice(("linear", "double"))
        x = self._rows()
        tensor = {"name": "X", "datatype": "FP32", "shape": x.shape, "data": x.tolist()}
        call = hostile.HttpCall(f"/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}).encode())
        status, body = self._ask(call)
        assert status == 200, body
        found = np.array(json.loads(body)["outputs"][0]["data"]).reshape(len(x), -1)
        np.testing.assert_allclose(found, x @ WEIGHT if model == "linear" else x * 2, rtol=1e-5)
        self.seen["good"] += 1

    def good_grpc(self) -> None:
        x = self._rows()
        answer = self._stub.ModelInfer(self._linear(x), timeout=PATIENCE)
        found = np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(len(x), -1)
        np.testing.assert_allclose(found, x @ WEIGHT, rtol=1e-5)
        self.seen["good"] += 1

    def _rows(self) -> Any:
        return np.array([[self.chance.random() for _ in range(4)]] * self.chance.randint(1, 8), np.float32)

    def _linear(self, x: Any) -> Any:
        tensor = pb.ModelInferRequest.InferInputTensor(name="X", datatype="FP32", shape=x.shape)
        return pb.ModelInferRequest(model_name="linear", inputs=[tensor], raw_input_contents=[x.tobytes()])

    def _ask(self, call: hostile.HttpCall) -> tuple[int, bytes]:
        try:
            self._http.request(call.method, call.path, call.body, call.headers)
            answer = self._http.getresponse()
            return answer.status, answer.read()
        except (ConnectionError, HTTPException):  # the server may close on what it cannot read on
            self._http.close()
            self._http.request(call.method, call.path, call.body, call.headers)
            answer = self._http.getresponse()
            return answer.status, answer.read()

    def _call(self, method: str, request: Any) -> None:
        try:
            getattr(self._stub, method)(request, timeout=PATIENCE)
            code, told = "OK", ""
        except grpc.RpcError as error:
            code, told = error.code().name, error.details()
        assert code in BLAMES_THE_REQUEST or NOTHING_TO_LOAD in told, (method, request, code, told)
        self.seen[f"grpc {code}"] += 1


@contextmanager
def workers(addresses: Addresses, seed: int) -> Iterator[list[Client]]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(addresses.grpc, options) as channel:
        clients = [Client(addresses, random.Random(f"{SEED} {seed} {worker}"), channel) for worker in range(WORKERS)]
        yield clients
        for client in clients:
            client.close()


@pytest.mark.soak
def test_no_request_harms_the_server_or_another_request(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write_all(repository)
    flags = ("--model-control-mode=explicit", "--load-model=*", f"--http-max-input-size={LARGEST}")
    seen, memory = Counter[str](), []
    with served(repository, *flags) as (addresses, process), ThreadPoolExecutor(WORKERS) as pool:
        for quarter in range(4):
            with workers(addresses, quarter) as clients:
                list(pool.map(lambda client: client.run(COUNT // 4 // WORKERS), clients))
            seen.update(sum((client.seen for client in clients), Counter()))
            memory.append(anonymous(process))
    log.info("%s, %s MiB", dict(sorted(seen.items())), [size // 2**20 for size in memory])
    assert seen["good"] > COUNT // 8
    assert memory[-1] - memory[0] < GROWTH, memory
