"""Requests in a second beside the real tritonserver's python backend, with NVIDIA's own client, in one run.

    python benchmarks/serve.py [--rounds 3] [--seconds 2]

Both run the same onnxruntime session with the same options and the same dynamic batching; the python model joins the
requests that it is given at once. Servers are asked in turn (A B A B ...) and the median of the rounds is printed, with
the time of the processor that the server spent on one request: on a busy machine that repeats better than the clock.
Bare onnxruntime, called in a loop in its own process, is what cannot be beaten. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper
from perf_analyzer import Measured, install, measure

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from tritonserver import installation, tritonserver

MODEL_PY = """
import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = {threads}
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = [node.name for node in self.session.get_inputs()]

    def execute(self, requests):
        find = pb_utils.get_input_tensor_by_name
        given = [[find(each, name).as_numpy() for name in self.inputs] for each in requests]
        joined = [np.concatenate(arrays) if len(requests) > 1 else arrays[0] for arrays in zip(*given)]
        answer = self.session.run(None, dict(zip(self.inputs, joined)))[0]
        responses, at = [], 0
        for arrays in given:
            rows = len(arrays[0])
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("Y", answer[at : at + rows])]))
            at += rows
        return responses
"""
BATCHING = "max_batch_size: 32 dynamic_batching {} instance_group { count: 1 kind: KIND_CPU }"
THREADS = 'parameters {{ key: "intra_op_thread_count" value {{ string_value: "{}" }} }}'


@dataclass(frozen=True)
class Model:
    """`more` are perf_analyzer's options for it; `feed` gives the inputs of a batch."""

    name: str
    graph: Path
    tensors: str
    feed: Callable[[int], dict[str, Any]]
    threads: int = 1
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Served:
    name: str
    addresses: dict[str, str]
    processes: list[psutil.Process]

    def spent(self) -> float:
        """Seconds of the processor."""
        return sum(each.cpu_times().user + each.cpu_times().system for each in self.processes)

    def answered(self, model: str) -> int:
        with urllib.request.urlopen(f"http://{self.addresses['http']}/v2/models/{model}/stats") as answer:
            (row,) = json.load(answer)["model_stats"]
        return int(row["inference_count"])


@dataclass
class Row:
    measured: list[Measured] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    """Microseconds of the processor for a request."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--encoder", type=Path, help="an ONNX encoder, input_ids and attention_mask to one output")
    arguments = parser.parse_args()
    program = install(installation())
    with tempfile.TemporaryDirectory(prefix="nemoport-bench-") as scratch:
        base = Path(scratch)
        models = [mlp(base), *([encoder(arguments.encoder)] if arguments.encoder else [])]
        for model in models:
            write(model, base)
        with tritonserver(base / "theirs") as real, ours(base / "ours") as mine:
            theirs = Served("tritonserver", {"http": real.http.removeprefix("http://"), "grpc": real.grpc}, family())
            for model in models:
                compare(model, [mine, theirs], program, arguments.rounds, arguments.seconds)


def compare(model: Model, servers: list[Served], program: Path, rounds: int, seconds: float) -> None:
    print(f"\n| {model.name} | clients | server | requests/s | p50 us | p99 us | CPU us a request |")
    print("|---|---|---|---|---|---|---|")
    for protocol in ("http", "grpc"):
        for concurrency in (1, 8, 32):
            rows = {server.name: Row() for server in servers}
            for number in range(rounds + 1):
                for server in servers:
                    before = server.spent(), server.answered(model.name)
                    got = measure(
                        program, model.name, protocol, server.addresses[protocol], concurrency, seconds, model.more
                    )
                    if number and got:  # the first round warms up
                        rows[server.name].measured.append(got)
                        answered = server.answered(model.name) - before[1]
                        rows[server.name].spent.append((server.spent() - before[0]) / answered * 1e6)
            for name, row in rows.items():
                print(f"| {protocol} | {concurrency} | {name} | {_shown(row)} |", flush=True)
    for size in (1, 8, 32):
        print(f"| in process | batch {size} | onnxruntime | {bare(model, size):,.0f} items/s | | | |", flush=True)


def _shown(row: Row) -> str:
    if not row.measured:
        return "not measured | | |"
    middle = [median(getattr(each, name) for each in row.measured) for name in ("rate", "p50", "p99")]
    return " | ".join(f"{each:,.0f}" for each in (*middle, median(row.spent)))


def bare(model: Model, size: int) -> float:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = model.threads
    session = onnxruntime.InferenceSession(model.graph, options, providers=["CPUExecutionProvider"])
    feed, rates = model.feed(size), []
    for _ in range(5):
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < 0.5:
            session.run(None, feed)
            count += size
        rates.append(count / (time.perf_counter() - began))
    return median(rates)


def mlp(base: Path) -> Model:
    """256 to 512 to 16."""
    chance = np.random.default_rng(0)
    shapes = {"W1": (256, 512), "W2": (512, 16)}
    weights = [
        numpy_helper.from_array((chance.standard_normal(shape) / 16).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    nodes = [
        helper.make_node("MatMul", ["X", "W1"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "W2"], ["Y"]),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", size])] for name, size in (("X", 256), ("Y", 16))
    ]
    graph = helper.make_graph(nodes, "mlp", *ends, weights)
    path = base / "mlp.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    tensors = "input { name: 'X' data_type: TYPE_FP32 dims: 256 } output { name: 'Y' data_type: TYPE_FP32 dims: 16 }"
    return Model("mlp", path, tensors, lambda size: {"X": np.zeros((size, 256), np.float32)})


def encoder(path: Path, tokens: int = 32) -> Model:
    """As `convert --to onnx` writes one; its only output is called Y here."""
    graph = onnx.load(path)
    names = [node.name for node in graph.graph.input]
    (output,) = graph.graph.output
    dims = [dim.dim_value or tokens for dim in output.type.tensor_type.shape.dim][1:]
    graph.graph.node.append(helper.make_node("Identity", [output.name], ["Y"]))
    output.name = "Y"
    onnx.save(graph, path.with_name("bench.onnx"))
    inputs = ", ".join(f"{{ name: '{name}' data_type: TYPE_INT64 dims: {tokens} }}" for name in names)
    tensors = f"input [ {inputs} ] output {{ name: 'Y' data_type: TYPE_FP32 dims: {dims} }}"
    zeros = ("--input-data", "zero")
    return Model(
        "encoder",
        path.with_name("bench.onnx"),
        tensors,
        lambda size: {name: np.ones((size, tokens), np.int64) for name in names},
        threads=psutil.cpu_count(logical=False) or 1,
        more=zeros,
    )


def write(model: Model, base: Path) -> None:
    said = {
        "ours": f'backend: "onnxruntime" {BATCHING} {model.tensors} {THREADS.format(model.threads)}',
        "theirs": f'backend: "python" {BATCHING} {model.tensors}',
    }
    for whose, config in said.items():
        version = base / whose / model.name / "1"
        version.mkdir(parents=True)
        (version / "model.onnx").symlink_to(model.graph)
        (version.parent / "config.pbtxt").write_text(config)
    (base / "theirs" / model.name / "1" / "model.py").write_text(MODEL_PY.format(threads=model.threads))


@contextmanager
def ours(repository: Path) -> Iterator[Served]:
    ports = dict(zip(("http", "grpc", "metrics"), _free_ports(3), strict=True))
    flags = [f"--{door}-port={port}" for door, port in ports.items()] + [
        f"--{door}-address=127.0.0.1" for door in ports
    ]
    command = [sys.executable, "-m", "nemoport", "serve", str(repository), *flags]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                try:
                    socket.create_connection(("127.0.0.1", ports["grpc"])).close()
                    break
                except OSError:
                    time.sleep(0.1)
            addresses = {door: f"127.0.0.1:{port}" for door, port in ports.items()}
            yield Served("nemoport", addresses, [psutil.Process(process.pid)])
        finally:
            process.terminate()


def family() -> list[psutil.Process]:
    """tritonserver with its stubs."""
    return [each for each in psutil.Process().children(recursive=True) if "triton" in each.name()]


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    main()
