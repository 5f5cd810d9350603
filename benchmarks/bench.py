"""`make bench`: what nemoport costs beside what cannot be avoided, in one run.

Commands are run as whole processes, in turn (A B C A B C ...), and the median of each is printed with its ratio to the
yardstick beside it. Memory is the anonymous memory of all processes of the command together, sampled while it runs.
Timings are never asserted: machines differ and are noisy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import decode
import generate
import quantize
import synthetic
from processes import Row, table

NEMOPORT = str(Path(sys.executable).with_name("nemoport"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="a checkpoint of 40 MB in place of 2 GB")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nemoport-bench-") as scratch:
        base = Path(scratch)
        shape = synthetic.SMALL if arguments.small else synthetic.TWO_GB
        total = synthetic.write(base / "source", shape, tp=4)
        print(f"checkpoint: torch_dist, stacked, TP 4, bf16, {total / 1e9:.2f} GB; {arguments.rounds} rounds\n")
        table("conversion", "cp -r", _conversions(base), arguments.rounds)
        table("start-up", "python -c pass", _start_up(), 3 * arguments.rounds)
        generate.table(arguments.rounds)
        model = quantize.written(base / "quantizing")
        quantize.table(model, model.parent, arguments.rounds)
        decode.table(model, model.parent, arguments.rounds)


def _conversions(base: Path) -> list[Row]:
    source, made = base / "source", base / "made"
    convert = f"{NEMOPORT} convert {source} --config {source.with_suffix('.json')} -o {made} --json".split()
    copy = f"cp -r {source} {made}"
    return [
        Row("cp -r", ["sh", "-c", copy], made),
        Row("cp -r, then sync", ["sh", "-c", f"{copy} && sync -f {made}"], made),
        Row("convert --to trtllm --tp 2", [*convert, "--to", "trtllm", "--tp", "2"], made),
        Row("convert --to hf", [*convert, "--to", "hf"], made),
        Row("convert --to onnx --dtype float16", [*convert, "--to", "onnx", "--dtype", "float16"], made),
        Row("convert --to onnx --dry-run", [*convert, "--to", "onnx", "--dry-run"]),
    ]


def _start_up() -> list[Row]:
    return [
        Row("python -c pass", [sys.executable, "-c", "pass"]),
        Row("nemoport --help", [NEMOPORT, "--help"]),
        Row("nemoport convert --help", [NEMOPORT, "convert", "--help"]),
    ]


if __name__ == "__main__":
    main()
