"""NVIDIA's perf_analyzer, out of a wheel of tritonclient that holds it, fetched once beside the tests' server."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

WHEEL = "tritonclient==2.41.1"
_LIBRARIES = {"libb64.so.0d": "libb64-*.so.0d", "libcudart.so.12": "libcudart-*.so.12*"}
"""What it links to and machines lack, by the names that the server's wheel has for them."""


@dataclass(frozen=True)
class Measured:
    """Microseconds, and inferences in a second."""

    rate: float
    p50: float
    p99: float


def install(home: Path) -> Path:
    """The program, beside the server that lies in `home`."""
    place = home.with_name("perf_analyzer-" + WHEEL.partition("==")[2])
    program = place / "perf_analyzer"
    if not program.is_file():
        place.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place) as scratch:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*command, "--platform", "manylinux1_x86_64", "-d", scratch, WHEEL], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = (each for each in archive.namelist() if each.endswith("bin/perf_analyzer"))
                unpacked = Path(archive.extract(name, scratch))
            unpacked.chmod(0o755)
            unpacked.replace(program)
    for name, pattern in _LIBRARIES.items():
        (library,) = (home / "nvidia_pytriton.libs").glob(pattern)
        link = place / name
        if not link.exists():
            link.symlink_to(library)
    return program


def measure(
    program: Path, model: str, protocol: str, address: str, concurrency: int, seconds: float, more: tuple[str, ...]
) -> Measured | None:
    """None where it could not be measured: every request failed, or the machine was too busy for anything steady."""
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "table.csv"
        command = [str(program), "-m", model, "-u", address, "-i", protocol, "-f", str(table), "--sync"]
        command += ["--concurrency-range", str(concurrency), "--max-threads", "32", *more]
        command += ["-p", str(int(seconds * 1000)), "-r", "3", "-s", "999"]  # three windows, whatever they say
        environment = os.environ | {"LD_LIBRARY_PATH": str(program.parent)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode or not table.is_file():
            print(done.stdout[-600:] + done.stderr[-600:], file=sys.stderr)
            return None
        (row,) = csv.DictReader(table.open())
        return Measured(float(row["Inferences/Second"]), float(row["p50 latency"]), float(row["p99 latency"]))
