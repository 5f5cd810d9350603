"""A compilation may be killed at any moment: what looks finished is, the same command again ends where an undisturbed
one ends, and two at once do not meet."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from exporters.commands import artifact_of, command, contents, process, sentence
from exporters.conftest import Once
from exporters.fixtures import LLAMA
from repository.killed import count_changes, kill_before

from nemoport.compilers import compile as compiling

from .stand_ins import Machine, machine

KILLS = int(os.environ.get("NEMOPORT_SOAK_KILLS", "10")) // 3


@pytest.fixture(scope="module")
def checkpoint(once: Once) -> Path:
    return once(LLAMA["nemo2"], "trtllm", tp=2)


def compile_(made: Machine, checkpoint: Path, place: Path) -> None:
    os.environ.update(made.environment)
    sys.path.insert(0, made.environment["PYTHONPATH"].split(os.pathsep)[0])
    given = {"timing_cache": place / "cache", "max_batch_size": 2}
    compiling.run(compiling.plan(checkpoint, "trtllm", place / "engines", given))


@pytest.mark.soak
def test_a_killed_compilation_is_finished_by_the_same_command(checkpoint: Path, tmp_path: Path) -> None:
    here, place = machine(tmp_path / "a machine"), tmp_path / "place"
    place.mkdir()
    changes = range(1, count_changes(compile_, here, checkpoint, place) + 1)
    whole = contents(place)
    for moment in sorted(random.Random(0).sample(changes, min(KILLS, len(changes)))):
        shutil.rmtree(place)
        place.mkdir()
        kill_before(moment, compile_, here, checkpoint, place)
        if (place / "engines").exists():
            artifact_of(place / "engines")
        count_changes(compile_, here, checkpoint, place)
        assert contents(place, "cache") == {name: found for name, found in whole.items() if name != "cache"}, moment


@pytest.fixture
def waiting(tmp_path: Path) -> tuple[Machine, Path]:
    """A machine whose trtllm-build waits for a file before it is through, and the file."""
    gate = tmp_path / "gate"
    made = machine(tmp_path / "a machine")
    return Machine(made.log, {**made.environment, "STAND_IN_WAITS_FOR": str(gate)}), gate


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """A shell that starts the tests in its background has them ignore SIGINT, and all that they start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def started(made: Machine, checkpoint: Path, out: Path, gate: Path) -> Iterator[subprocess.Popen[str]]:
    """A compilation that is in the middle of trtllm-build."""
    words = ("compile", checkpoint, "--to", "trtllm", "-o", out)
    with process(*words, env={**os.environ, **made.environment}, process_group=0) as running:
        while not gate.with_name(f"{gate.name}.waiting").exists():
            assert running.poll() is None, running.communicate()
            time.sleep(0.01)
        yield running
        gate.touch()
        running.communicate()


def again(made: Machine, checkpoint: Path, out: Path, patch: pytest.MonkeyPatch) -> tuple[int, str]:
    with patch.context() as inside:
        made.enter(inside)
        ended = command("compile", checkpoint, "--to", "trtllm", "-o", out)
    return ended.exit_code, ended.stderr


def test_two_at_once_do_not_meet(
    checkpoint: Path, waiting: tuple[Machine, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, gate = waiting
    out = tmp_path / "engines"
    with started(made, checkpoint, out, gate) as first:
        code, said = again(made, checkpoint, out, monkeypatch)
        assert code == 2
        assert "another nemoport is building" in sentence(said)
    assert first.returncode == 0
    assert artifact_of(out).kind == "trtllm_engine"
    assert again(made, checkpoint, out, monkeypatch)[0] == 0
    assert len(made.log.read_text().splitlines()) == 1


def test_a_build_that_outlives_its_command_is_waited_for_and_taken_over(
    checkpoint: Path, waiting: tuple[Machine, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, gate = waiting
    out = tmp_path / "engines"
    with started(made, checkpoint, out, gate) as first:
        first.kill()
        first.wait()
        assert again(made, checkpoint, out, monkeypatch)[0] == 2
    while not (tmp_path / "engines.job/product").exists():
        time.sleep(0.01)
    while (found := again(made, checkpoint, out, monkeypatch))[0] == 2:
        time.sleep(0.01)
    assert found[0] == 0, found[1]
    assert artifact_of(out).kind == "trtllm_engine"
    assert len(made.log.read_text().splitlines()) == 1


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_build_whose_every_process_is_ended_leaves_nothing_that_looks_finished(
    sent: signal.Signals,
    checkpoint: Path,
    waiting: tuple[Machine, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, gate = waiting
    out = tmp_path / "engines"
    with started(made, checkpoint, out, gate) as first:
        os.killpg(first.pid, sent)
        assert first.wait() != 0
        assert not out.exists()
        assert not (tmp_path / "engines.job/product").exists()
    while (found := again(made, checkpoint, out, monkeypatch))[0] == 2:  # the script goes a moment later
        time.sleep(0.01)
    assert found[0] == 0, found[1]
    assert artifact_of(out).kind == "trtllm_engine"
