"""Thirty-two clients at once, while models are loaded and unloaded beneath them: nothing is lost, nothing is wrong."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from nemoport.runner.serve import Addresses

from .models import WEIGHT, linear, write_model
from .python_models import write_python
from .served import anonymous, served

log = logging.getLogger(__name__)

SECONDS = 2.4 * int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "1"))
CLIENTS = 32
ABSENT = ("is not found", "has no available versions", "is being unloaded")
"""What is said of a model that is not there just now."""

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


class Client:
    """Asks until the end, and counts."""

    def __init__(self, addresses: Addresses, seed: int, end: float) -> None:
        self.seen, self._end, self._chance = Counter[str](), end, random.Random(seed)
        self._library: Any = tritonclient.grpc if seed % 2 else tritonclient.http
        self._address = addresses.grpc if seed % 2 else addresses.http

    def run(self) -> None:
        with self._library.InferenceServerClient(self._address) as client:
            while time.monotonic() < self._end:
                x = np.array([[self._chance.random() for _ in range(4)]] * self._chance.randint(1, 4), np.float32)
                self._check(client, "linear", x, x @ WEIGHT)
                self._check(client, "double", x, x * 2)
                try:
                    self._check(client, "guest", x, x @ WEIGHT * 3)
                except InferenceServerException as error:
                    if not any(words in str(error) for words in ABSENT):
                        raise
                    self.seen["guest absent"] += 1

    def _check(self, client: Any, model: str, x: Any, expected: Any) -> None:
        tensor = self._library.InferInput("X", x.shape, "FP32")
        tensor.set_data_from_numpy(x)
        np.testing.assert_allclose(client.infer(model, [tensor]).as_numpy("Y"), expected, rtol=1e-5)
        self.seen[model] += 1


def come_and_go(address: str, repository: Path, done: threading.Event) -> int:
    """Reload what all use, load and unload what some use; how often."""
    rounds = 0
    with tritonclient.http.InferenceServerClient(address) as client:
        while not done.is_set():
            for name in ("linear", "double"):
                (repository / name / "config.pbtxt").touch()
                client.load_model(name)
            client.load_model("guest")
            time.sleep(0.02)
            client.unload_model("guest")
            rounds += 1
    return rounds


@pytest.mark.soak
def test_nothing_is_lost_while_models_come_and_go(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write_model(repository, "linear", linear(), "max_batch_size: 8 dynamic_batching {}")
    write_model(repository, "guest", linear(3), "max_batch_size: 8 dynamic_batching {}")
    write_python(repository, "double", DOUBLE, DOUBLE_CONFIG)
    done, memory, seen = threading.Event(), [], Counter[str]()
    flags = ("--model-control-mode=explicit", "--load-model=*")
    with served(repository, *flags) as (addresses, process), ThreadPoolExecutor(CLIENTS + 1) as pool:
        end = time.monotonic() + SECONDS
        clients = [Client(addresses, seed, end) for seed in range(CLIENTS)]
        beneath = pool.submit(come_and_go, addresses.http, repository, done)
        asking = [pool.submit(client.run) for client in clients]
        try:
            while time.monotonic() < end:
                memory.append(anonymous(process) // 2**20)
                time.sleep(SECONDS / 8)
            for each in asking:
                each.result(60)
        finally:
            done.set()
        rounds = beneath.result(60)
    for client in clients:
        seen.update(client.seen)
    log.info("%d clients, %.0f s, %d reloads: %s, %s MiB", CLIENTS, SECONDS, rounds, dict(seen), memory)
    assert min(seen[name] for name in ("linear", "double", "guest")) > 0
    assert rounds > 0
