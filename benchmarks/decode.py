"""Tokens a second of quantized graphs, beside what the bandwidth of the memory allows, and beside onnxruntime-genai:
with nemoport's graphs, and with those that its own builder makes of the same model.

    python benchmarks/decode.py --rounds 3

One row, after a prompt, on one thread: its processor time says, beside whatever else is at work on a machine, what the
clock and threads that wait for each other do not. The bound is the bytes of weights that a token reads, by the bytes
that one thread read of memory in a second of processor time, in the same run. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import processes
import quantize
import rivals
from onnx import load_model

from nemoport.exporters import convert, stream
from nemoport.spec import Plan, Profile, Recipe

PROMPT, STEPS = 32, 64
BLOCK = 768 << 20
"""Bytes that are read to see how fast memory is: more than any cache holds."""
GRAPHS: dict[str, tuple[str | None, Profile]] = {
    "float32": (None, "portable"),
    "int8": ("int8", "portable"),
    "int8, --profile ort": ("int8", "ort"),
    "int4": ("int4", "portable"),
    "int4, --profile ort": ("int4", "ort"),
}
BUILT = ("int8", "int4")
"""The precisions that genai's builder is asked for."""
ALONE = """
import json, sys, time
import numpy as np, onnxruntime
prompt, steps = map(int, sys.argv[2:])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", options, providers=["CPUExecutionProvider"])
names, value = [each.name for each in session.get_outputs()], onnxruntime.OrtValue.ortvalue_from_numpy
states = {
    each.name: value(np.zeros([{"batch": 1, "past": 0}.get(axis, axis) for axis in each.shape], np.float32))
    for each in session.get_inputs() if each.name.startswith("past_key_values.")
}
seconds, past, new = [], 0, np.arange(1, prompt + 1)[None]
for _ in range(steps + 1):
    total = past + new.shape[1]
    given = {
        "input_ids": value(new),
        "attention_mask": value(np.ones((1, total), np.int64)),
        "position_ids": value(np.arange(past, total)[None]),
    }
    start = time.perf_counter(), time.process_time()
    logits, *present = session.run_with_ort_values(names, {**given, **states})
    seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    states = {name.replace("present", "past_key_values"): each for name, each in zip(names[1:], present)}
    past, new = total, logits.numpy()[:, -1:].argmax(-1)
print(json.dumps(seconds[1:]))
"""
"""The session in a loop; states stay onnxruntime's."""
READ = """
import json, sys, time
import numpy as np
matrix, vector, seconds = np.ones((int(sys.argv[1]) // 4 // 4096, 4096), np.float32), np.ones(4096, np.float32), []
for _ in range(8):
    start = time.perf_counter(), time.process_time()
    matrix @ vector
    seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
print(json.dumps([min(seconds, key=lambda pair: pair[1])]))
"""
"""A product of a matrix and a vector, which does little but read."""
LOOKED_UP = {"Gather", "GatherBlockQuantized"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="nemoport-bench-") as scratch:
        table(quantize.written(Path(scratch)), Path(scratch), rounds)


def table(path: Path, base: Path, rounds: int) -> None:
    """Print the median of each graph's medians."""
    ways: dict[str, tuple[int, Callable[[], Seconds]]] = {}
    for name, (method, profile) in GRAPHS.items():
        at = base / name.replace(", --", "-").replace(" ", "-")
        plan = Plan(dtype="float32", recipe=Recipe(method=method) if method else None, profile=profile)
        stream.run(replace(convert.plan(path, "onnx", at, plan=plan), workers=2))
        ways[name] = (_read_per_token(at), partial(_decoded, [sys.executable, "-c", ALONE], at))
        if rivals.here():
            _write_genai_config(at)
            ways[f"{name}, decoded by onnxruntime-genai"] = (_read_per_token(at), partial(_decoded, _GENAI, at))
    for precision in BUILT if rivals.here() else ():
        at = _built(path, base, precision)
        run = partial(_decoded, _GENAI, at)
        ways[f"{precision}, built and decoded by onnxruntime-genai"] = (_read_per_token(at), run)
    found: dict[str, list[Seconds]] = {name: [] for name in ways}
    reads, before = [], processes.load()
    for _ in range(rounds):
        for name, (_, decode) in ways.items():
            reads.append(BLOCK / _seconds([sys.executable, "-c", READ, str(BLOCK)], {**os.environ, **_ONE}).processor)
            found[name].append(decode())
    most = max(reads)
    print(
        f"decoding after {PROMPT} tokens, one row, {STEPS} steps, one thread, which reads {most / 1e9:.1f} GB "
        f"of memory a second; {rounds} rounds; load {before} before, {processes.load()} after\n"
    )
    if not rivals.here():
        print(rivals.absence())
    print("| graph | MB a token | bound, tokens/s | tokens a processor second | of the bound | tokens/s, best round |")
    print("|---|---|---|---|---|---|")
    for name, (size, _) in ways.items():
        bound, rate = most / size, 1 / median(each.processor for each in found[name])
        best = 1 / min(each.wall for each in found[name])
        print(f"| {name} | {size / 1e6:.0f} | {bound:.0f} | {rate:.1f} | {rate / bound:.0%} | {best:.1f} |")
    print()


def _read_per_token(at: Path) -> int:
    """Bytes of the weights that every token needs whole: all but those of which rows are looked up, the embedding's and
    the rope's."""
    graph = load_model(at / "model.onnx", load_external_data=False).graph
    rows = {node.input[0] for node in graph.node if node.op_type in LOOKED_UP}
    rows |= {each for node in graph.node for each in node.input if each in ("cos_cache", "sin_cache")}
    total = 0
    for weight in graph.initializer:
        place = {entry.key: entry.value for entry in weight.external_data}
        if place and weight.name not in rows:
            total += int(place["length"])
    return total


def _built(path: Path, base: Path, precision: str) -> Path:
    """What genai's builder makes of the model, which it takes only with a tokenizer."""
    named = base / "with-tokenizer"
    if not named.exists():
        shutil.copytree(path, named, copy_function=os.link)
        words = {f"t{index}": index for index in range(quantize.SHAPE.vocab)}
        model = {"type": "WordLevel", "vocab": words, "unk_token": "t0"}
        (named / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
        said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": f"t{quantize.SHAPE.vocab - 1}"}
        (named / "tokenizer_config.json").write_text(json.dumps(said))
    at = base / f"built-{precision}"
    options: list[str | Path] = ["-i", named, "-o", at, "-p", precision, "-e", "cpu", "-c", base / "cache"]
    _output([rivals.PYTHON, "-m", rivals.BUILDER, *options], _clean())
    written = json.loads((at / "genai_config.json").read_text())
    written["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 1
    (at / "genai_config.json").write_text(json.dumps(written))
    return at


def _write_genai_config(at: Path) -> None:
    shape = quantize.SHAPE
    state = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    names = {f"past_{kind}_names": name for kind, name in state.items()}
    present = {f"present_{kind}_names": f"present.%d.{kind}" for kind in state}
    same = {each: each for each in ("input_ids", "attention_mask", "position_ids")}
    decoder = {
        "filename": "model.onnx",
        "session_options": {"intra_op_num_threads": 1},
        "head_size": shape.hidden // shape.heads,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers,
        "inputs": same | names,
        "outputs": {"logits": "logits"} | present,
    }
    ids = {"bos_token_id": 1, "eos_token_id": shape.vocab - 1, "pad_token_id": shape.vocab - 1}
    model = {"type": "llama", "vocab_size": shape.vocab, "context_length": 4096, "decoder": decoder, **ids}
    (at / "genai_config.json").write_text(json.dumps({"model": model, "search": {}}))


_GENAI: list[str | Path] = [rivals.PYTHON, "-c", rivals.DECODE]
_ONE = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Seconds:
    wall: float
    processor: float


def _decoded(program: list[str | Path], at: Path) -> Seconds:
    """Of a token, in a process of its own."""
    return _seconds([*program, at, str(PROMPT), str(STEPS)], _clean() if program is _GENAI else None)


def _seconds(command: list[str | Path], environment: dict[str, str] | None) -> Seconds:
    """The medians of the pairs that a program prints."""
    wall, processor = zip(*json.loads(_output(command, environment).splitlines()[-1]), strict=True)
    return Seconds(median(wall), median(processor))


def _clean() -> dict[str, str]:
    """The environment of a rival, which must not find this tree."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def _output(command: list[str | Path], environment: dict[str, str] | None) -> str:
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(map(str, command[-4:]))}: {result.stderr}")
    return result.stdout


if __name__ == "__main__":
    main()
