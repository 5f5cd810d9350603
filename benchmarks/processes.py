"""Whole processes, run in turn: their seconds, and their anonymous memory."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil


@dataclass
class Row:
    name: str
    command: list[str]
    made: Path | None = None
    """What the command writes; removed after each run."""
    seconds: list[float] = field(default_factory=list)
    anonymous: list[int] = field(default_factory=list)


def measure(rows: list[Row], rounds: int) -> None:
    """A B C A B C ..., once more than is counted: the first round warms caches."""
    for number in range(rounds + 1):
        for row in rows:
            seconds, anonymous = _run(row.command)
            if row.made:
                shutil.rmtree(row.made)
            if number:
                row.seconds.append(seconds)
                row.anonymous.append(anonymous)


def table(title: str, yardstick: str, rows: list[Row], rounds: int) -> None:
    """Print the medians beside the yardstick's."""
    measure(rows, rounds)
    least = next(median(row.seconds) for row in rows if row.name == yardstick)
    print(f"| {title} | median s | min s | times {yardstick} | anonymous MiB |\n|---|---|---|---|---|")
    for row in rows:
        middle, best = median(row.seconds), min(row.seconds)
        peak = max(row.anonymous) / 2**20
        print(f"| `{row.name}` | {middle:.3f} | {best:.3f} | {middle / least:.2f} | {peak:.0f} |")
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
