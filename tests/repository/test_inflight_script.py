"""The script that serves what was laid out: by its own directory, with the engine's ranks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from exporters.commands import sentence

from .engines import engine
from .laid_out import laid_out

RECORDS = """\
#!/bin/sh
{ pwd; printf '%s\\n' "$@"; } > "$RECORD"
"""


@pytest.mark.parametrize(
    "ranks, drafts, program", [(1, False, "tritonserver"), (3, False, "mpirun"), (2, True, "mpirun")]
)
def test_the_script_serves_from_its_own_directory(ranks: int, drafts: bool, program: str, tmp_path: Path) -> None:
    target = engine(tmp_path / "engine", ranks=ranks, mode="draft_tokens_external", max_draft_len=4)
    options = ("--draft", engine(tmp_path / "draft", ranks=ranks)) if drafts else ()
    repository = laid_out(target, tmp_path / "the repository", *options)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(repository / "serve.sh")], check=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("tritonserver", "mpirun"):
        (programs / name).write_text(RECORDS)
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
    subprocess.run([repository / "serve.sh", "--http-port", "1 2"], check=True, cwd="/", env=environment)
    place, *words = (tmp_path / "record").read_text().splitlines()
    assert place == str(repository)
    assert words[-2:] == ["--http-port", "1 2"] if ranks == 1 or drafts else ["--http-port", "1 2"] in _pairs(words)
    assert words.count(f"--model-repository={repository}") == (1 if drafts else ranks)
    assert words.count("--load-model=tensorrt_llm") == (0 if drafts else ranks - 1)
    assert ("mpirun" if "-n" in words else "tritonserver") == program


def _pairs(words: list[str]) -> list[list[str]]:
    return [list(pair) for pair in pairwise(words)]


def test_the_script_says_what_is_missing(tmp_path: Path) -> None:
    repository = laid_out(engine(tmp_path / "engine"), tmp_path / "repository")
    ended = subprocess.run([repository / "serve.sh"], capture_output=True, text=True, check=False)
    assert ended.returncode == 4
    assert re.match("tritonserver is not on PATH; .* TensorRT-LLM 1.2.1", sentence(ended.stderr))
