"""Memory is bounded by what is in flight, whatever the format: 1 GB here, 16 GB in `make soak`, of holes.

The command runs as it is, but for the last step: blocks are not written, so that what is written is a hole as well.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from nemoport.spec import ModelSpec, parameter_count

from .commands import anonymous, process
from .made import config, sized
from .sparse import FORMATS, huggingface, nemo1

SOAK = "NEMOPORT_SOAK_ROUNDS" in os.environ
CAP = 512 * 2**20
SHORT = ("torch_dist", "megatron_legacy", "nemo1", "zarr_compressed")
WITHOUT_WRITING = """
import sys
from nemoport.cli import main
from nemoport.exporters import stream
stream._write_all = lambda *_: None
main(sys.argv[1:])
"""


@pytest.mark.soak
@pytest.mark.parametrize("name", FORMATS)
def test_any_format_streams_within_the_cap(name: str, tmp_path: Path) -> None:
    if not SOAK and name not in SHORT:
        pytest.skip("`make soak` streams every format")
    spec = _of_bytes(16e9 if SOAK else 1e9)
    path = FORMATS[name](tmp_path / "model", spec)
    assert _used(tmp_path) < 64 * 2**20, "this disk has no holes"
    _check_streams(path, spec, tmp_path, name)


@pytest.mark.soak
def test_a_gzipped_tar_streams_within_the_cap(tmp_path: Path) -> None:
    """Its numbers are there, as a thousandth of their size."""
    spec = _of_bytes(16e9 if SOAK else 0.7e9)
    path = nemo1(tmp_path / "model", spec)
    packed = tmp_path / "packed.nemo"
    with path.open("rb") as plain, gzip.open(packed, "wb", compresslevel=1) as out:
        shutil.copyfileobj(plain, out, 2**20)
    _check_streams(packed, spec, tmp_path, "nemo1, gzip")


@pytest.mark.soak
def test_writing_takes_no_more_memory(tmp_path: Path) -> None:
    spec = _of_bytes(4e9 if SOAK else 0.7e9)
    path = huggingface(tmp_path / "model", spec)
    out = tmp_path / "out"
    peak = _peak(process("convert", path, "--to", "trtllm", "--tp", 2, "-o", out))
    assert peak < CAP, f"{peak / 2**20:.0f} MiB"
    shutil.rmtree(out)


@pytest.mark.soak
def test_an_archive_is_sealed_within_the_cap(tmp_path: Path) -> None:
    """A model that sees both ways, whose tensors are read again for their checksums."""
    spec = _of_bytes(16e9 if SOAK else 0.6e9)
    path = FORMATS["megatron_lm"](tmp_path / "model", spec)
    given, out = tmp_path / "config.json", tmp_path / "out"
    given.write_text(json.dumps({"attn_mask_type": "padding"}))
    arguments = ["convert", path, "--to", "torchscript", "--config", given, "-o", out]
    peak = _peak(_without_writing(arguments))
    assert (out / "model.pt").stat().st_size > 0.8 * _bytes(spec)
    assert 10 * 2**20 < peak < CAP, f"{peak / 2**20:.0f} MiB"
    shutil.rmtree(out)


@pytest.mark.soak
@pytest.mark.parametrize("method", ["int4", "fp8_dynamic"] if SOAK else ["fp8_dynamic"])
def test_quantizing_streams_within_the_cap(method: str, tmp_path: Path) -> None:
    spec = _of_bytes(16e9 if SOAK else 1e9)
    path = huggingface(tmp_path / "model", spec)
    _poke(path)
    given, out = tmp_path / "config.json", tmp_path / "out"
    given.write_text(json.dumps(config(spec, "huggingface")))
    said = ("--quantize", method, "--dialect", "compressed-tensors", "--config", given, "-o", out)
    arguments = ["convert", path, "--to", "hf", *said]
    peak = _peak(_without_writing(arguments))
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    assert 0.2 * _bytes(spec) < written < 0.7 * _bytes(spec)
    assert 10 * 2**20 < peak < CAP, f"{peak / 2**20:.0f} MiB"
    shutil.rmtree(out)


def _poke(path: Path) -> None:
    """One number in every tensor: nothing scales a weight of zeros."""
    for file in path.glob("*.safetensors"):
        with file.open("r+b") as stored:
            size = int.from_bytes(stored.read(8), "little")
            for name, entry in json.loads(stored.read(size)).items():
                if name != "__metadata__":
                    stored.seek(8 + size + entry["data_offsets"][0])
                    stored.write(b"\x80\x3f")


def _check_streams(path: Path, spec: ModelSpec, directory: Path, name: str) -> None:
    given = directory / "config.json"
    given.write_text(
        json.dumps(config(spec, "huggingface" if name in ("huggingface", "nemo_automodel") else "megatron"))
    )
    out = directory / "out"
    arguments = ["convert", path, "--to", "trtllm", "--tp", "2", "--config", given, "-o", out]
    began = time.monotonic()
    peak = _peak(_without_writing(arguments))
    written = sum(file.stat().st_size for file in out.glob("rank*.safetensors"))
    figures = f"{name}: {written / 1e9:.1f} GB, {peak / 2**20:.0f} MiB, {time.monotonic() - began:.0f} s"
    if found := os.environ.get("NEMOPORT_FIGURES"):
        with Path(found).open("a") as file:
            file.write(figures + "\n")
    assert written > 0.9 * _bytes(spec), figures
    assert 10 * 2**20 < peak < CAP, figures
    shutil.rmtree(out)


def _without_writing(arguments: Sequence[object]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WITHOUT_WRITING, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _peak(running: subprocess.Popen[str]) -> int:
    """Bytes of memory of its own that the command has at most."""
    peak = 0
    while running.poll() is None:
        peak = max(peak, anonymous(running.pid))
        time.sleep(0.005)
    _, stderr = running.communicate()
    assert running.returncode == 0, stderr
    return peak


def _of_bytes(size: float) -> ModelSpec:
    """A llama of about that many, in bfloat16; an eighth of it is embedding and head."""
    hidden = 4096 if size > 8e9 else 2048
    ffn, vocab = 7 * hidden // 2, int(size / 32 / hidden) // 64 * 64
    layer = 2 * (hidden * hidden * 5 // 2 + 3 * hidden * ffn)
    return sized(layers=max(2, int(size * 7 / 8 / layer) // 2 * 2), hidden=hidden, ffn=ffn, vocab=vocab)


def _bytes(spec: ModelSpec) -> int:
    return 2 * parameter_count(spec)


def _used(directory: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())
