"""What quantizing costs beside a plain copy, and what quantized graphs give beside the bandwidth of the memory.

    python benchmarks/quantize.py --rounds 3

    NEMOPORT_BENCH_MODELOPT=DIR[:DIR]    what to put on PYTHONPATH so that `import modelopt` works: its export of the
                                         same model is then run in turn with ours
    NEMOPORT_BENCH_GENAI=DIR             the same of onnxruntime_genai: it then decodes the same graphs

Commands are whole processes: starting and importing count. Methods that need statistics are given made-up ones, so a
calibration is not counted; ModelOpt calibrates on eight tokens, which is as near to none as it goes. Nothing is
asserted.
"""

from __future__ import annotations

import argparse
import json
import os
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
import synthetic
from numpy.typing import NDArray
from onnx import load_model

from nemoport import plugins
from nemoport.exporters import convert, source, statistics, stream
from nemoport.exporters.dequantized import QUANTIZERS
from nemoport.exporters.quantizers.int4_awq import EXPONENTS
from nemoport.exporters.statistics import Statistics
from nemoport.spec import ModelSpec, Plan, Profile, Recipe, tensors

SHAPE = synthetic.Shape(layers=14, hidden=1024, heads=16, kv_heads=8, ffn=4096, vocab=8192)
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
MODELOPT_PATH, GENAI_PATH = (os.environ.get(f"NEMOPORT_BENCH_{name}") for name in ("MODELOPT", "GENAI"))
MODELOPT = """
import sys, warnings
warnings.simplefilter("ignore")
import modelopt.torch.quantization as mtq, torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
mtq.quantize(model, getattr(mtq, sys.argv[3]), lambda m: m(torch.arange(8)[None]))
export_hf_checkpoint(model, export_dir=sys.argv[2])
"""
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
GENAI = """
import json, sys, time
import onnxruntime_genai as genai
prompt, steps = map(int, sys.argv[2:])
model = genai.Model(sys.argv[1])
params = genai.GeneratorParams(model)
params.set_search_options(max_length=prompt + steps + 1, min_length=prompt + steps + 1, do_sample=False)
generator = genai.Generator(model, params)
generator.append_tokens(list(range(1, prompt + 1)))
seconds = []
for _ in range(steps):
    start = time.perf_counter()
    generator.generate_next_token()
    seconds.append(time.perf_counter() - start)
print(json.dumps(seconds[1:]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    tables(parser.parse_args().rounds)


def tables(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="nemoport-bench-") as scratch:
        base = Path(scratch)
        synthetic.write(base / "trained", SHAPE, tp=1)
        path = base / "source"
        config = json.loads((base / "trained.json").read_text())
        stream.run(convert.plan(base / "trained", "hf", path, config=config, plan=Plan()))
        _export(path, base, rounds)
        _decode(path, base, rounds)


def _export(path: Path, base: Path, rounds: int) -> None:
    model = source.model(path)
    size, made = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e9, base / "made"
    stats = _statistics(model.spec, base / "statistics.npz")
    rows = [processes.Row("cp -r", ["cp", "-r", str(path), str(made)], made)]
    for method, module in plugins.load_all(QUANTIZERS).items():
        if hasattr(module, "UNCALIBRATED") or "modelopt" not in module.NEEDS:
            continue
        needed = ("--calib-stats", str(stats)) if module.NEEDS["modelopt"] else ()
        command = ["convert", str(path), "--to", "hf", "--quantize", method, "-o", str(made), "--json", *needed]
        rows.append(processes.Row(f"--quantize {method}", [sys.executable, "-m", "nemoport", *command], made))
    if MODELOPT_PATH:
        for config in ("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT4_AWQ_CFG"):
            command = [
                "env",
                f"PYTHONPATH={MODELOPT_PATH}",
                sys.executable,
                "-c",
                MODELOPT,
                str(path),
                str(made),
                config,
            ]
            rows.append(processes.Row(f"ModelOpt {config}", command, made))
    processes.measure(rows, rounds)
    copy = median(rows[0].seconds)
    print(f"quantizing {size:.2f} GB of bf16, Hugging Face to Hugging Face; {rounds} rounds\n")
    print("| command | s | s a GB | times cp -r | anonymous MiB | MiB a GB |\n|---|---|---|---|---|---|")
    for row in rows:
        seconds, peak = median(row.seconds), max(row.anonymous) / 2**20
        print(
            f"| `{row.name}` | {seconds:.2f} | {seconds / size:.2f} | {seconds / copy:.1f} | {peak:.0f} "
            f"| {peak / size:.0f} |"
        )
    print()


def _statistics(spec: ModelSpec, path: Path) -> Path:
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, tensor in tensors(spec).items():
        if len(tensor.shape) == 2 and name.startswith("layers."):
            linear = name.removesuffix(".weight")
            sizes = np.linspace(0.5, 2, tensor.shape[1]).astype(np.float32)
            arrays |= {f"{linear}/amax": sizes, f"{linear}/mean": sizes}
            arrays[f"{linear}/losses"] = np.linspace(1, 2, len(EXPONENTS)).astype(np.float32)
    path.write_bytes(statistics.to_bytes(Statistics(arrays)))
    return path


def _decode(path: Path, base: Path, rounds: int) -> None:
    found: dict[str, list[float]] = {}
    bytes_of: dict[str, int] = {}
    ways: dict[str, tuple[str, Callable[[], float]]] = {}
    for name, (method, profile) in GRAPHS.items():
        at = base / name.replace(", --", "-").replace(" ", "-")
        recipe = Recipe(method=method) if method else None
        plan = Plan(dtype="float32", recipe=recipe, profile=profile)
        stream.run(replace(convert.plan(path, "onnx", at, plan=plan), workers=2))
        bytes_of[name] = _read_per_token(at)
        ways[name] = (name, partial(_decoded, ALONE, at))
        if GENAI_PATH:
            _write_genai_config(at)
            ways[f"{name}, onnxruntime-genai"] = (name, partial(_decoded, GENAI, at, GENAI_PATH))
    bandwidth = []
    for _ in range(rounds):
        bandwidth.append(_bandwidth())
        for way, (_, run) in ways.items():
            found.setdefault(way, []).append(run())
    most = max(bandwidth)
    print(
        f"decoding after {PROMPT} tokens, one row, {STEPS} steps; memory reads at {most / 1e9:.1f} GB/s; "
        f"{rounds} rounds\n"
    )
    print("| graph | MB a token | bound, tokens/s | tokens/s | of the bound |\n|---|---|---|---|---|")
    for way, (name, _) in ways.items():
        bound, rate = most / bytes_of[name], 1 / median(found[way])
        print(f"| {way} | {bytes_of[name] / 1e6:.0f} | {bound:.0f} | {rate:.1f} | {rate / bound:.0%} |")
    print()


def _read_per_token(at: Path) -> int:
    """Bytes of the weights that every token needs whole: all but the embedding's rows and the rope's."""
    total = 0
    for weight in load_model(at / "model.onnx", load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in weight.external_data}
        if place and weight.name != "embed.weight" and not weight.name.startswith("rope."):
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


def _write_genai_config(at: Path) -> None:
    state = {"key": "past_key_values.%d.key", "value": "past_key_values.%d.value"}
    names = {f"past_{kind}_names": name for kind, name in state.items()}
    present = {f"present_{kind}_names": f"present.%d.{kind}" for kind in state}
    same = {each: each for each in ("input_ids", "attention_mask", "position_ids")}
    decoder = {
        "filename": "model.onnx",
        "session_options": {},
        "head_size": SHAPE.hidden // SHAPE.heads,
        "hidden_size": SHAPE.hidden,
        "num_attention_heads": SHAPE.heads,
        "num_key_value_heads": SHAPE.kv_heads,
        "num_hidden_layers": SHAPE.layers,
        "inputs": same | names,
        "outputs": {"logits": "logits"} | present,
    }
    ids = {"bos_token_id": 1, "eos_token_id": SHAPE.vocab - 1, "pad_token_id": SHAPE.vocab - 1}
    model = {"type": "llama", "vocab_size": SHAPE.vocab, "context_length": 4096, "decoder": decoder, **ids}
    (at / "genai_config.json").write_text(json.dumps({"model": model, "search": {}}))


def _decoded(program: str, at: Path, path: str | None = None) -> float:
    """Seconds a token, in a process of its own."""
    command = [sys.executable, "-c", program, str(at), str(PROMPT), str(STEPS)]
    environment = {**os.environ, "PYTHONPATH": path} if path else None
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"decoding {at.name}: {result.stderr}")
    return float(median(json.loads(result.stdout.splitlines()[-1])))


if __name__ == "__main__":
    main()
