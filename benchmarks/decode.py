"""Tokens a second of quantized graphs, beside what the bandwidth of the memory allows, and beside onnxruntime-genai:
with nemoport's graphs, and with those that its own builder makes of the same model.

    python benchmarks/decode.py --rounds 3

One row, after a prompt. The bound is the bytes of weights that a token reads, by the bytes a second that memory gave in
the same run. Nothing is asserted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
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
session = onnxruntime.InferenceSession(sys.argv[1] + "/model.onnx", providers=["CPUExecutionProvider"])
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
    start = time.perf_counter()
    logits, *present = session.run_with_ort_values(names, {**given, **states})
    seconds.append(time.perf_counter() - start)
    states = {name.replace("present", "past_key_values"): each for name, each in zip(names[1:], present)}
    past, new = total, logits.numpy()[:, -1:].argmax(-1)
print(json.dumps(seconds[1:]))
"""
"""The session in a loop; states stay onnxruntime's."""
LOOKED_UP = {"Gather", "GatherBlockQuantized"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="nemoport-bench-") as scratch:
        table(quantize.written(Path(scratch)), Path(scratch), rounds)


def table(path: Path, base: Path, rounds: int) -> None:
    """Print the median of each graph's medians."""
    ways: dict[str, tuple[int, Callable[[], float]]] = {}
    for name, (method, profile) in GRAPHS.items():
        at = base / name.replace(", --", "-").replace(" ", "-")
        plan = Plan(dtype="float32", recipe=Recipe(method=method) if method else None, profile=profile)
        stream.run(replace(convert.plan(path, "onnx", at, plan=plan), workers=2))
        ways[name] = (_read_per_token(at), partial(_seconds, [sys.executable, "-c", ALONE], at))
        if rivals.here():
            _write_genai_config(at)
            ways[f"{name}, decoded by onnxruntime-genai"] = (_read_per_token(at), partial(_seconds, _GENAI, at))
    for precision in BUILT if rivals.here() else ():
        at = _built(path, base, precision)
        ways[f"{precision}, built and decoded by onnxruntime-genai"] = (
            _read_per_token(at),
            partial(_seconds, _GENAI, at),
        )
    found: dict[str, list[float]] = {name: [] for name in ways}
    bandwidth, before = [], processes.load()
    for _ in range(rounds):
        bandwidth.append(_bandwidth())
        for name, (_, run) in ways.items():
            found[name].append(run())
    most = max(bandwidth)
    print(
        f"decoding after {PROMPT} tokens, one row, {STEPS} steps; memory reads at {most / 1e9:.1f} GB/s; "
        f"{rounds} rounds; load {before} before, {processes.load()} after\n"
    )
    if not rivals.here():
        print(rivals.absence())
    print("| graph | MB a token | bound, tokens/s | tokens/s | best | of the bound |\n|---|---|---|---|---|---|")
    for name, (size, _) in ways.items():
        bound, rate = most / size, 1 / median(found[name])
        print(
            f"| {name} | {size / 1e6:.0f} | {bound:.0f} | {rate:.1f} | {1 / min(found[name]):.1f} "
            f"| {rate / bound:.0%} |"
        )
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


def _bandwidth() -> float:
    """Bytes a second, of a product of a matrix and a vector, which does little but read, on all cores."""
    matrix, vector = np.ones((BLOCK // 4 // 4096, 4096), np.float32), np.ones(4096, np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ vector
        seconds.append(time.perf_counter() - start)
    return BLOCK / min(seconds)


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
    return at


def _write_genai_config(at: Path) -> None:
    shape = quantize.SHAPE
    state = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    names = {f"past_{kind}_names": name for kind, name in state.items()}
    present = {f"present_{kind}_names": f"present.%d.{kind}" for kind in state}
    same = {each: each for each in ("input_ids", "attention_mask", "position_ids")}
    decoder = {
        "filename": "model.onnx",
        "session_options": {},
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


def _seconds(program: list[str | Path], at: Path) -> float:
    """Of a token, in a process of its own."""
    output = _output([*program, at, str(PROMPT), str(STEPS)], _clean() if program is _GENAI else None)
    return float(median(json.loads(output.splitlines()[-1])))


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
