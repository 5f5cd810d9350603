"""A repository as a client meets it: the runner in a process of its own, each model loaded, tried over every protocol,
timed, and weighed."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from google.protobuf import json_format
from tritonclient import grpc as tritonclient
from tritonclient.utils import InferenceServerException

from nemoport.artifact import Signature
from nemoport.errors import CheckFailed, MachineError
from nemoport.runner.client import Client
from nemoport.runner.datatypes import BY_NUMPY
from nemoport.runner.model import LoadOptions
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.serve import Addresses, serving_all
from nemoport.runner.server import Server
from nemoport.validation.report import Check, Service
from nemoport.validation.samples import Array, Sample, sample

REQUESTS = 30
"""Timed, one after another, after the first."""
ANY_SIZE = 1 << 40
STARTS_WITHIN = 120.0


@dataclass(frozen=True)
class Door:
    """A running server."""

    repository: Path
    addresses: Addresses
    process: int

    def memory(self) -> int | None:
        """Resident bytes; None where the system does not tell."""
        try:
            pages = int(Path(f"/proc/{self.process}/statm").read_text().split()[1])
        except OSError:
            return None
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def served(repository: Path, options: LoadOptions) -> Iterator[Door]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(repository, options, theirs), name="runner")
    process.start()
    theirs.close()
    try:
        if not ours.poll(STARTS_WITHIN):
            raise MachineError(f"the runner did not start within {STARTS_WITHIN:.0f} s; is this machine overloaded?")
        addresses: Addresses = ours.recv()
        assert process.pid is not None
        yield Door(repository, addresses, process.pid)
    finally:
        ours.close()
        process.join(timeout=30)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(repository: Path, options: LoadOptions, pipe: Connection) -> None:
    server = Server([repository], options, explicit=True)
    with serving_all(server, http_max_input_size=ANY_SIZE) as addresses:
        pipe.send(addresses)
        try:
            pipe.recv()
        except EOFError:  # whoever asked has what they wanted
            server.close()


def tried(door: Door, model: str, signature: Signature | None) -> Service:
    """Load one model, send it a sample over HTTP, gRPC and SSE and a request that is wrong, and time it."""
    before, began = door.memory(), time.perf_counter()
    with Client(door.addresses.http) as client:
        try:
            client.post(f"/v2/repository/models/{model}/load", {})
        except CheckFailed as refused:
            return Service(checks=(Check(name="it loads", passed=False, found=str(refused), needed="a ready model"),))
        loaded, after = time.perf_counter() - began, door.memory()
        config = json_format.ParseDict(client.get(f"/v2/models/{model}/config"), ModelConfig())
        asked = sample(config, signature, door.repository / model)
        said = [f"{loaded:.2f} s", *_remarks(client, model)]
        checks = [Check(name="it loads", passed=True, found="; ".join(said), needed="a ready model")]
        first: float | None = None
        latencies: tuple[float, ...] = ()
        try:
            if config.model_transaction_policy.decoupled:
                checks.append(_streams(client, model, asked))
            else:
                began = time.perf_counter()
                answer = client.infer(model, asked)
                first = time.perf_counter() - began
                checks += _agree(door, client, model, config, asked, answer)
                latencies = tuple(_timed(client, model, asked) for _ in range(REQUESTS))
            checks.append(_refuses(client, model))
        except CheckFailed as refused:
            needed = "an answer; if the model wants other inputs, give its config a model_warmup with such"
            checks.append(Check(name="it answers", passed=False, found=str(refused), needed=needed))
    return Service(
        checks=tuple(checks),
        load_seconds=loaded,
        memory=None if before is None or after is None else after - before,
        first_seconds=first,
        latencies=latencies,
    )


def _remarks(client: Client, model: str) -> list[str]:
    """What the server says of versions that are ready otherwise than their config asks: on the CPU, say."""
    rows = client.post("/v2/repository/index", {"ready": True})
    return sorted({row["reason"] for row in rows if row["name"] == model and row.get("reason")})


def _agree(
    door: Door, client: Client, model: str, config: ModelConfig, asked: Sample, answer: Sample
) -> Iterator[Check]:
    wrong = [each.name for each in config.output if each.name not in answer]
    yield Check(
        name="HTTP answers", passed=not wrong, found=_shapes(answer), needed="every output that the config lists"
    )
    yield _same("HTTP answers the same again", client.infer(model, asked), answer)
    yield _same("gRPC answers the same", _over_grpc(door.addresses.grpc, model, asked), answer)
    if all(_flat(array, config.max_batch_size) for array in asked.values()):
        yield _streams(client, model, asked)


def _streams(client: Client, model: str, asked: Sample) -> Check:
    """Server-sent events, of the first item."""
    body = {name: _as_json(array) for name, array in asked.items()}
    events = client.events(f"/v2/models/{model}/generate_stream", body)
    errors = [event["error"] for event in events if "error" in event]
    found = str(errors[0]) if errors else f"{len(events)} events"
    return Check(name="SSE answers", passed=bool(events) and not errors, found=found, needed="events without an error")


def _refuses(client: Client, model: str) -> Check:
    name, needed = "a wrong request is refused", "400"
    try:
        client.infer(model, {"no such input": np.zeros(1, np.float32)})
    except CheckFailed as refused:
        passed = "answers 400" in str(refused)
        return Check(name=name, passed=passed, found=str(refused)[:120], needed=needed)
    return Check(name=name, passed=False, found="an answer", needed=needed)


def _over_grpc(address: str, model: str, asked: Sample) -> Sample:
    inputs = []
    for name, array in asked.items():
        inputs.append(tritonclient.InferInput(name, list(array.shape), BY_NUMPY[array.dtype].name))
        inputs[-1].set_data_from_numpy(array)
    try:
        with tritonclient.InferenceServerClient(address) as client:
            result = client.infer(model, inputs)
    except InferenceServerException as refused:
        raise CheckFailed(f"the server refuses over gRPC what it answers over HTTP: {refused.message()}") from refused
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def _timed(client: Client, model: str, asked: Sample) -> float:
    began = time.perf_counter()
    client.infer(model, asked)
    return time.perf_counter() - began


def _same(name: str, found: Sample, wanted: Sample) -> Check:
    """Bit for bit: the same model was asked the same."""
    differ = [each for each in wanted if each not in found or not _equal(found[each], wanted[each])]
    return Check(
        name=name,
        passed=not differ,
        found=f"{', '.join(differ)} differ" if differ else "every bit",
        needed="every bit",
    )


def _equal(a: Array, b: Array) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and (bool(np.array_equal(a, b)) if a.dtype == object else a.tobytes() == b.tobytes())


def _flat(array: Array, batches: int) -> bool:
    """Whether `generate` can say it: one list, of one item."""
    return array.ndim <= (2 if batches else 1)


def _as_json(array: Array) -> object:
    first = array.reshape(-1) if array.ndim < 2 else array[0].reshape(-1)
    values = [each.decode() if isinstance(each, bytes) else each.item() for each in first]
    return values[0] if len(values) == 1 else values


def _shapes(arrays: Sample) -> str:
    shown = [f"{name} {list(array.shape)}" for name, array in arrays.items()]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")
