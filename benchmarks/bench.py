"""`make bench`: what nemoport costs beside what cannot be avoided, in one run.

Commands are run as whole processes, in turn (A B C A B C ...), and the median of each is printed with its ratio to the
yardstick beside it. Memory is the anonymous memory of all processes of the command together, sampled while it runs.
Timings are never asserted: machines differ and are noisy.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import generate
import psutil
import synthetic

NEMOPORT = str(Path(sys.executable).with_name("nemoport"))


@dataclass
class Row:
    name: str
    command: list[str]
    made: Path | None = None
    """What the command writes; removed after each run."""
    seconds: list[float] = field(default_factory=list)
    anonymous: list[int] = field(default_factory=list)


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
        _table("conversion", "cp -r", _conversions(base), arguments.rounds)
        _table("start-up", "python -c pass", _start_up(), 3 * arguments.rounds)
    generate.table(arguments.rounds)


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


def _table(title: str, yardstick: str, rows: list[Row], rounds: int) -> None:
    for number in range(rounds + 1):
        for row in rows:
            seconds, anonymous = _run(row.command)
            if row.made:
                shutil.rmtree(row.made)
            if number:  # the first round warms caches
                row.seconds.append(seconds)
                row.anonymous.append(anonymous)
    measure = next(median(row.seconds) for row in rows if row.name == yardstick)
    print(f"| {title} | median s | min s | times {yardstick} | anonymous MiB |\n|---|---|---|---|---|")
    for row in rows:
        middle, least = median(row.seconds), min(row.seconds)
        peak = max(row.anonymous) / 2**20
        print(f"| `{row.name}` | {middle:.3f} | {least:.3f} | {middle / measure:.2f} | {peak:.0f} |")
    print()


def _run(command: list[str]) -> tuple[float, int]:
    """Seconds, and the peak of anonymous bytes over the process and its children."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = [0]
    sampler = threading.Thread(target=_sample, args=(process.pid, process.poll, peak))
    sampler.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - start
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: {errors.decode()}")
    return seconds, peak[0]


def _sample(pid: int, poll: Callable[[], int | None], peak: list[int]) -> None:
    while poll() is None:
        try:
            parent = psutil.Process(pid)
            family = [parent, *parent.children(recursive=True)]
            # rss less what is shared or mapped from files; /proc/PID/smaps_rollup would stop the process to count
            peak[0] = max(peak[0], sum(each.memory_info().rss - each.memory_info().shared for each in family))
        except psutil.Error:
            return
        time.sleep(0.02)


if __name__ == "__main__":
    main()
