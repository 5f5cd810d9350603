"""What quantizing costs, for each GB of bf16, beside a plain copy and beside ModelOpt's export of the same model.

    python benchmarks/quantize.py --rounds 3

Commands are whole processes. What starting one costs is a row of its own and taken off where it says so: it does not
grow with the model. Methods that need statistics are given made-up ones, so that no calibration is counted; ModelOpt
calibrates on eight tokens, which is as near to none as it goes, and runs once, for it takes minutes. Nothing is
asserted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import processes
import rivals
import synthetic
from numpy.typing import NDArray

from nemoport import plugins
from nemoport.exporters import convert, source, statistics, stream
from nemoport.exporters.dequantized import QUANTIZERS
from nemoport.exporters.quantizers.int4_awq import EXPONENTS
from nemoport.exporters.statistics import Statistics
from nemoport.spec import ModelSpec, Plan, tensors

SHAPE = synthetic.Shape(layers=14, hidden=1024, heads=16, kv_heads=8, ffn=4096, vocab=8192)
MODELOPT = ("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG", "INT4_AWQ_CFG")
START, MODELOPT_START = "--dry-run", "ModelOpt, imported"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="nemoport-bench-") as scratch:
        table(written(Path(scratch)), Path(scratch), rounds)


def written(base: Path) -> Path:
    """A model of half a GB as a Hugging Face directory."""
    synthetic.write(base / "trained", SHAPE, tp=1)
    config = json.loads((base / "trained.json").read_text())
    stream.run(convert.plan(base / "trained", "hf", base / "source", config=config, plan=Plan()))
    return base / "source"


def table(path: Path, base: Path, rounds: int) -> None:
    """Print the medians, whole and for each GB."""
    size, made = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e9, base / "made"
    ours, theirs = _ours(path, base, made), _theirs(path, made)
    copies = [
        processes.Row("cp -r", ["cp", "-r", str(path), str(made)], made),
        processes.Row("cp -r, then sync", ["sh", "-c", f"cp -r {path} {made} && sync -f {made}"], made),
    ]
    rows, before = [*copies, *ours, *theirs], processes.load()
    processes.measure(rows, rounds)
    starts = {row.name: row for row in (*ours, *theirs) if row.made is None}
    print(
        f"quantizing {size:.2f} GB of bf16, Hugging Face to Hugging Face; {rounds} rounds; load {before} before, ",
        end="",
    )
    print(f"{processes.load()} after\n")
    if not rivals.here():
        print(rivals.absence())
    print("| command | processor s | wall s | processor s a GB, start taken off | times cp -r | MiB | MiB a GB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        start = starts[START] if row in ours else starts[MODELOPT_START] if row in theirs else None
        more = row.processor - (start.processor if start else 0)
        figures = f"{more / size:.2f} | {more / copies[0].processor:.1f}" if row.made else "– | –"
        print(
            f"| `{row.name}` | {row.processor:.2f} | {row.wall:.2f} | {figures} | {row.anonymous:.0f} "
            f"| {row.anonymous / size:.0f} |"
        )
    print()


def _ours(path: Path, base: Path, made: Path) -> list[processes.Row]:
    convert = [sys.executable, "-m", "nemoport", "convert", str(path), "--to", "hf", "-o", str(made), "--json"]
    rows = [processes.Row(START, [*convert, "--dry-run"]), processes.Row("plain", convert, made)]
    stats = _statistics(source.model(path).spec, base / "statistics.npz")
    for method, module in plugins.load_all(QUANTIZERS).items():
        if "modelopt" in module.NEEDS:
            needed = ["--calib-stats", str(stats)] if module.NEEDS["modelopt"] else []
            rows.append(processes.Row(f"--quantize {method}", [*convert, "--quantize", method, *needed], made))
    return rows


def _theirs(path: Path, made: Path) -> list[processes.Row]:
    if not rivals.here():
        return []
    python = ["env", "-u", "PYTHONPATH", str(rivals.PYTHON), "-c"]
    export = [*python, rivals.MODELOPT, str(path), str(made)]
    exports = [processes.Row(f"ModelOpt {config}", [*export, config], made, most=1) for config in MODELOPT]
    return [processes.Row(MODELOPT_START, [*python, rivals.MODELOPT_START]), *exports]


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


if __name__ == "__main__":
    main()
