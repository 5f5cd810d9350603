"""`check` and a real tritonserver say the same of every case, except where a difference is meant."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from tritonserver import tritonserver

from nemoport.check import Report, Request, check
from nemoport.check.subject import Target
from nemoport.compatibility import triton
from nemoport.errors import NemoportError
from nemoport.runner.refusal import Refusal
from nemoport.runner.server import start

from .cases import CASES, write

NO_COMPARISON = "the stand-in for the ONNX backend does not compare config and graph; the backend itself refuses"
NOT_READ = "the stand-in for the ONNX backend reads no accelerators and parameters; the backend itself refuses"
STRICTER: Mapping[str, str] = {
    "tensorrt": "the target has no GPU, and the stand-in needs none",
    "tensorrtllm": "the target has no GPU, and the stand-in needs none",
    "spans-two": "the stand-in starts no ranks",
    "no-file": "the stand-in opens no file",
    "placeholder-in-string": "any string is a string to Triton, and the path that it names is not there",
    "newer-opset": "ONNX Runtime 1.19 of Triton 24.10 refuses it, and the stand-in has a newer one",
    "latin": "24.10 skips what is no UTF-8 in a comment; other readers of the file do not",
    "one-missing": "Triton leaves the version out silently",
    "label-outside": "24.10 reads it; later releases refuse a path out of the model's directory",
    "two-of-a-name": "Triton keeps one of the two silently",
    "type-as-number": "Triton takes a type that it cannot name, and no client can send it",
    "makes-its-input": "Triton takes it, and which of the two values a step gets is not said",
    "other-input": NO_COMPARISON,
    "missing-input": NO_COMPARISON,
    "other-output": NO_COMPARISON,
    "other-type": NO_COMPARISON,
    "batch-repeated": NO_COMPARISON,
    "other-dims": NO_COMPARISON,
    "variable-over-fixed": NO_COMPARISON,
    "narrowed-output": NO_COMPARISON,
    "fixed-batch": NO_COMPARISON,
    "optional-input": NO_COMPARISON,
    "not-a-scalar": NO_COMPARISON,
    "accelerator-unknown": NOT_READ,
    "accelerator-twice": NOT_READ,
    "execution-mode-2": NOT_READ,
    "arena-perhaps": NOT_READ,
    "threads-many": NOT_READ,
}
"""Triton loads these, `check` calls them errors."""
MILDER: Mapping[str, str] = {
    "unknown-backend": "which backends a server has besides Triton's own is not known here: a warning",
}


def report(repository: Path) -> Report:
    return check(Request(directory=repository, target=Target(0), runtime=triton("24.10")))


def refused_by_check(repository: Path) -> set[str]:
    return {each.model for each in report(repository).findings if each.severity == "error"}


def test_a_real_tritonserver_loads_what_check_passes_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write(tmp_path)
    # without completion the stand-ins are asked once, not twice, and they would complete nothing
    flags = ["--disable-auto-complete-config", "--model-load-thread-count=2"]
    with tritonserver(tmp_path, exit_on_error=False, seconds=300, flags=flags) as server:
        index = server.index()
    loaded = {name for name in CASES if {state for (model, _), state in index.items() if model == name} == {"READY"}}
    refused = refused_by_check(tmp_path)
    wanted = (set(CASES) - loaded - MILDER.keys()) | STRICTER.keys()
    assert sorted(refused - wanted) == []
    assert sorted(wanted - refused) == []
    assert STRICTER.keys() <= loaded
    assert not MILDER.keys() & loaded
    assert len(loaded) > 60
    assert len(CASES) - len(loaded) > 80


def test_our_runner_refuses_what_the_stand_in_does_not_look_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write(tmp_path)
    of_graph = {name for name, reason in STRICTER.items() if reason in (NO_COMPARISON, NOT_READ)}
    taken = {"add", "narrowed", "one-output", "could-batch", "accelerators", "cuda-again", "execution-mode"}
    server = start([tmp_path], explicit=True)
    loaded = set()
    for name in sorted(of_graph | taken):
        with contextlib.suppress(Refusal, NemoportError):
            server.load(name)
            loaded.add(name)
    server.close()
    assert loaded == taken
