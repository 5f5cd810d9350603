"""Directories that are there whole or not at all: what a killed process leaves is gone when the next one is done."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from exporters.commands import command, sentence

from nemoport.errors import UsageError
from nemoport.repository.unfinished import unfinished

from .engines import engine
from .killed import count_changes, kill_before

SOURCE = Path(__file__).parent.parent / "data/megatron/nemo2/llama_tp1pp1"
MOMENTS = 5
"""At which each layout is killed, from its first change of the disk to its last."""


def an_engine(root: Path) -> Path:
    return engine(root / "read")


def an_artifact(root: Path) -> Path:
    ended = command("convert", SOURCE, "--to", "hf", "-o", root / "read")
    assert ended.exit_code == 0, ended.stderr
    return root / "read"


LAYOUTS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...]]] = {
    "inflight_batcher_llm": (an_engine, ()),
    "nim": (an_artifact, ("--nim", "2.x")),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def everything(root: Path) -> dict[str, bytes | None]:
    """Every path and its bytes; directories are None."""
    paths = sorted(root.rglob("*"))
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in paths}


def lay_out(root: Path, layout: str, destination: str) -> None:
    _, more = LAYOUTS[layout]
    ended = command("layout", layout, root / "read", "-o", root / destination / "out", *more)
    assert ended.exit_code == 0, ended.stderr


@every_layout
def test_what_a_killed_layout_left_is_gone_after_the_next(layout: str, tmp_path: Path) -> None:
    make, _ = LAYOUTS[layout]
    make(tmp_path)
    lay_out(tmp_path, layout, "undisturbed")
    changes = count_changes(lay_out, tmp_path, layout, "counted")
    undisturbed, left = everything(tmp_path / "undisturbed"), False
    for moment in range(MOMENTS):
        place = f"killed {moment}"
        kill_before(2 + moment * (changes - 2) // (MOMENTS - 1), lay_out, tmp_path, layout, place)
        left |= any(name.startswith(".") for name in everything(tmp_path / place))
        lay_out(tmp_path, layout, place)
        assert everything(tmp_path / place) == undisturbed
    assert left


@every_layout
def test_a_layout_is_not_written_into_what_it_reads(layout: str, tmp_path: Path) -> None:
    made, before = LAYOUTS[layout][0](tmp_path), everything(tmp_path)
    for place in (made / "x", made / "x/y", tmp_path / "elsewhere/../read/x"):
        ended = command("layout", layout, made, "-o", place, *LAYOUTS[layout][1])
        assert (ended.exit_code, "lies inside the" in sentence(ended.stderr)) == (2, True)
    assert everything(tmp_path) == before


def test_a_draft_engine_is_not_written_into_either(tmp_path: Path) -> None:
    made = engine(tmp_path / "target", mode="draft_tokens_external", max_draft_len=8)
    draft = engine(tmp_path / "draft", tokenizer=False)
    ended = command("layout", "inflight_batcher_llm", made, "-o", draft / "x", "--draft", draft)
    assert "lies inside the engine" in sentence(ended.stderr)


def test_what_another_process_is_writing_is_left_to_it(tmp_path: Path) -> None:
    theirs = tmp_path / ".out.unfinished"
    theirs.mkdir()
    (theirs / "begun").write_text("")
    handle = os.open(theirs, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(UsageError, match=r"another nemoport is writing .*out"), unfinished(tmp_path / "out"):
        pass
    assert (theirs / "begun").exists()
    os.close(handle)
    with unfinished(tmp_path / "out") as scratch:
        assert not list(scratch.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
