"""Whole processes, run in turn: the processor time they take, the clock's, and their anonymous memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import psutil

REST = 4.0
"""Seconds before each command. A virtual machine hands freed pages back to its host within about three, and getting
them again costs ten times what a page at hand does: without a rest, who writes soon after a removal is favoured."""


@dataclass(frozen=True)
class Cost:
    processor: float
    """Seconds, of the process and its children, in user mode and in the kernel."""
    wall: float
    anonymous: int
    """The peak of bytes, over the process and its children."""


@dataclass
class Row:
    name: str
    command: list[str]
    made: Path | None = None
    """What the command writes; removed after each run."""
    most: int | None = None
    """How often it is run, where it takes minutes; otherwise in every round."""
    costs: list[Cost] = field(default_factory=list)

    @property
    def processor(self) -> float:
        return median(cost.processor for cost in self.costs)

    @property
    def wall(self) -> float:
        return median(cost.wall for cost in self.costs)

    @property
    def anonymous(self) -> float:
        """MiB."""
        return max(cost.anonymous for cost in self.costs) / 2**20


def measure(rows: list[Row], rounds: int) -> None:
    """A B C A B C ..., once more than is counted: the first round warms caches."""
    for number in range(rounds + 1):
        for row in rows:
            if row.most is not None and not 0 < number <= row.most:
                continue
            time.sleep(REST if row.made else 0)
            cost = _run(row.command)
            if row.made:
                shutil.rmtree(row.made)
            if number:
                row.costs.append(cost)


def load() -> str:
    return " ".join(f"{each:.1f}" for each in os.getloadavg())


def table(title: str, yardstick: str, rows: list[Row], rounds: int) -> None:
    """Print the medians beside the yardstick's."""
    measure(rows, rounds)
    least = next(row for row in rows if row.name == yardstick)
    print(f"| {title} | processor s | times {yardstick} | wall s | times {yardstick} | anonymous MiB |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| `{row.name}` | {row.processor:.3f} | {row.processor / least.processor:.2f} | {row.wall:.3f} "
            f"| {row.wall / least.wall:.2f} | {row.anonymous:.0f} |"
        )
    print()


def _run(command: list[str]) -> Cost:
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        peak, ended = [0], threading.Event()
        sampler = threading.Thread(target=_sample, args=(process.pid, ended, peak))
        sampler.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        ended.set()
        sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)}: {errors.read().decode()}")
    return Cost(usage.ru_utime + usage.ru_stime, wall, peak[0])


def _sample(pid: int, ended: threading.Event, peak: list[int]) -> None:
    while not ended.wait(0.02):
        try:
            parent = psutil.Process(pid)
            family = [parent, *parent.children(recursive=True)]
            # rss less what is shared or mapped from files; /proc/PID/smaps_rollup would stop the process to count
            seen = [each.memory_info() for each in family]
            peak[0] = max(peak[0], sum(each.rss - each.shared for each in seen))
        except psutil.Error:
            continue
