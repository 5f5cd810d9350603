"""Tokens per second of the demo model at 1, 8 and 32 streams: asked over HTTP, in the engine, and the model alone.

    python benchmarks/generate.py --rounds 5

The three are measured in turn, round by round, in one run; the median of each is printed. The clients are a process of
their own. "The model alone" is the same graph, stepped at a constant batch with nothing around it: no requests, no
sampling, no text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from statistics import median

from nemoport.exporters import convert, stream
from nemoport.runner.generation.texts import Generator, Piece, TextRequest
from nemoport.runner.model import load_version
from nemoport.runner.refusal import Refusal
from nemoport.runner.serve import serving
from nemoport.runner.server import Server
from nemoport.spec import Plan

CHECKPOINT = Path(__file__).parents[1] / "examples/demo/checkpoint"
STREAMS = (1, 8, 32)
TOKENS = 120
PROMPT = "The clever fox "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    table(parser.parse_args().rounds)


def table(rounds: int) -> None:
    """Print the medians."""
    with tempfile.TemporaryDirectory(prefix="nemoport-bench-") as scratch:
        model = published(Path(scratch))
        version = load_version(model, "1")
        generator = version.generator
        assert generator is not None
        server = Server()
        server.adopt(version)
        with serving(server) as address, ProcessPoolExecutor(1, get_context("spawn")) as clients:
            ways: dict[str, Callable[[int], float]] = {
                "over HTTP, streamed": lambda count: clients.submit(over_http, address, model.name, count).result(),
                "in the engine": lambda count: in_engine(generator, count),
                "the model alone": lambda count: alone(generator, count),
            }
            found = measured(ways, rounds)
        server.close()
    print(f"| tokens per second, {TOKENS} a stream | " + " | ".join(f"{count} streams" for count in STREAMS) + " |")
    print("|---" * (len(STREAMS) + 1) + "|")
    for name in ways:
        print(f"| {name} | " + " | ".join(f"{median(found[name, count]):.0f}" for count in STREAMS) + " |")
    print()


def measured(ways: dict[str, Callable[[int], float]], rounds: int) -> dict[tuple[str, int], list[float]]:
    found: dict[tuple[str, int], list[float]] = {}
    for number in range(rounds + 1):
        for count in STREAMS:
            for name, way in ways.items():
                rate = way(count)
                if number:  # the first round warms up
                    found.setdefault((name, count), []).append(rate)
    return found


def published(scratch: Path) -> Path:
    """The demo as a model of one version."""
    made, model = scratch / "made", scratch / "fables"
    stream.run(convert.plan(CHECKPOINT, "onnx", made, plan=Plan(dtype="float32")))
    shutil.copytree(made, model / "1")
    return model


def over_http(address: str, model: str, count: int) -> float:
    async def one() -> None:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        body = json.dumps({"text_input": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}).encode()
        head = f"POST /v2/models/{model}/generate_stream HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        answer = await reader.read()
        assert answer.count(b"data: {") > TOKENS, answer[-400:]
        writer.close()

    async def together() -> float:
        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(count)))
        return time.perf_counter() - began

    return count * TOKENS / asyncio.run(together())


def in_engine(generator: Generator, count: int) -> float:
    heard: SimpleQueue[Piece | Refusal] = SimpleQueue()
    request = TextRequest(prompt=generator.tokenizer.encode(PROMPT), max_tokens=TOKENS, ignore_eos=True)
    began = time.perf_counter()
    for _ in range(count):
        generator.submit(request, heard.put)
    left = count
    while left:
        piece = heard.get()
        assert isinstance(piece, Piece), piece
        left -= piece.reason is not None
    return count * TOKENS / (time.perf_counter() - began)


def alone(generator: Generator, count: int) -> float:
    executor = generator.engine.executor
    prompt = generator.tokenizer.encode(PROMPT)
    tokens: Sequence[int] = [65] * count
    began = time.perf_counter()
    state = executor.joined([executor.prefill(prompt, None)[1] for _ in range(count)])
    for _ in range(TOKENS - 1):
        _, state = executor.step(tokens, state)
    return count * TOKENS / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
