"""What only a machine with a GPU can show: `make test-gpu`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from exporters.commands import artifact_of, command
from exporters.conftest import Once
from exporters.fixtures import LLAMA

from .stand_ins import machine

pytestmark = pytest.mark.gpu


def test_the_sm_that_is_written_down_is_the_devices(
    once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trtllm-build is stood in for, nvidia-smi is not."""
    import torch

    made = machine(tmp_path / "a machine")
    made.enter(monkeypatch)
    Path(made.environment["PATH"].split(os.pathsep)[0], "nvidia-smi").unlink()
    ended = command("compile", once(LLAMA["nemo2"], "trtllm", tp=2), "--to", "trtllm", "-o", tmp_path / "engines")
    assert ended.exit_code == 0, ended.stderr
    major, minor = torch.cuda.get_device_capability(0)
    assert artifact_of(tmp_path / "engines").built_with["sm"] == 10 * major + minor


def test_trtllm_build_builds_what_is_then_laid_out(once: Once, tmp_path: Path) -> None:
    if shutil.which("trtllm-build") is None:
        pytest.skip("no trtllm-build here")
    asked = ("--max-batch-size", 2, "--max-seq-len", 64, "--timing-cache", tmp_path / "cache")
    ended = command("compile", once(LLAMA["nemo2"], "trtllm"), "--to", "trtllm", "-o", tmp_path / "engines", *asked)
    assert ended.exit_code == 0, ended.stderr
    assert artifact_of(tmp_path / "engines").kind == "trtllm_engine"
    assert (tmp_path / "cache").stat().st_size > 0
    ended = command("layout", "inflight_batcher_llm", tmp_path / "engines", "-o", tmp_path / "repository")
    assert ended.exit_code == 0, ended.stderr
