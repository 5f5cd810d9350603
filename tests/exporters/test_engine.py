"""The engine: all or nothing, once, within its memory, whatever happens to the process or the disk."""

from __future__ import annotations

import fcntl
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemoport.cli.options import Size
from nemoport.exporters import stream

from .commands import anonymous, artifact_of, command, contents, converted, planned, process, sentence
from .conftest import Once
from .fixtures import HUGGINGFACE, LLAMA
from .made import save_filled, save_sparse, sized

ROUNDS = int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "4"))


def test_a_finished_conversion_is_not_done_again(tmp_path: Path) -> None:
    arguments = ("convert", HUGGINGFACE, "--to", "trtllm", "--tp", 2, "-o", tmp_path / "out")
    assert command(*arguments).exit_code == 0
    before = _stamps(tmp_path)
    assert command(*arguments).exit_code == 0
    assert _stamps(tmp_path) == before


@pytest.mark.parametrize(
    "other", [("--to", "trtllm", "--tp", 4), ("--to", "hf", "--dtype", "float32"), ("--to", "onnx")]
)
def test_another_result_in_the_place_is_not_overwritten(other: tuple[object, ...], tmp_path: Path) -> None:
    assert command("convert", HUGGINGFACE, "--to", "hf", "-o", tmp_path / "out").exit_code == 0
    _check_refused(tmp_path, *other)


def test_a_source_that_changed_is_another_conversion(tmp_path: Path) -> None:
    source = Path(shutil.copytree(HUGGINGFACE, tmp_path / "source"))
    arguments = ("convert", source, "--to", "hf", "-o", tmp_path / "out")
    assert command(*arguments).exit_code == 0
    os.utime(source / "model.safetensors", ns=(1, 1))
    before = contents(tmp_path / "out")
    assert command(*arguments).exit_code == 2
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("kind", ["empty directory", "directory", "file", "dangling link"])
def test_whatever_lies_at_the_destination_stays(kind: str, tmp_path: Path) -> None:
    place = tmp_path / "out"
    match kind:
        case "empty directory":
            place.mkdir()
        case "directory":
            place.mkdir()
            (place / "precious").write_text("data")
        case "file":
            place.write_text("data")
        case "dangling link":
            place.symlink_to(tmp_path / "nowhere")
    _check_refused(tmp_path, "--to", "hf")
    assert place.is_symlink() == (kind == "dangling link")


def test_missing_parents_are_made(tmp_path: Path) -> None:
    assert command("convert", HUGGINGFACE, "--to", "hf", "-o", tmp_path / "a/b/out").exit_code == 0
    artifact_of(tmp_path / "a/b/out")


def test_a_destination_inside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    source = Path(shutil.copytree(HUGGINGFACE, tmp_path / "source"))
    result = command("convert", source, "--to", "hf", "-o", source / "out")
    assert result.exit_code == 2
    sentence(result.stderr)
    assert not (source / "out").exists()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100 MB of random numbers."""
    return save_filled(tmp_path_factory.mktemp("large") / "model", layers=6, hidden=1024, ffn=2816, vocab=8000, heads=8)


@pytest.fixture(scope="module")
def clean(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of an undisturbed run."""
    out = tmp_path_factory.mktemp("clean") / "out"
    running = _start(large, out)
    _, stderr = running.communicate()
    assert running.returncode == 0, stderr
    return contents(out)


@pytest.mark.soak
def test_a_killed_conversion_leaves_nothing_that_looks_finished_and_goes_on(
    large: Path, clean: dict[str, bytes], tmp_path: Path
) -> None:
    """Killed when a random number of slots is in the journal, from before the first to after the last."""
    numbers, out = random.Random(20), tmp_path / "out"
    slots = len((planned(large, "trtllm", tmp_path / "never", tp=2)).output.files[0].slots) * 2
    killed = 0
    for number in range(ROUNDS):
        running = _start(large, out)
        _wait_for_slots(tmp_path / ".out.partial" / ".journal", numbers.randint(0, slots) if number else 1, running)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        killed += running.returncode == -signal.SIGKILL
        assert {path.name for path in tmp_path.iterdir()} <= {".out.partial", "out"}
        if out.exists():
            artifact_of(out)
            assert contents(out, ".journal") == clean
            shutil.rmtree(out)
    running = _start(large, out)
    _, stderr = running.communicate()
    assert running.returncode == 0, stderr
    assert contents(out) == clean
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert killed


def _wait_for_slots(journal: Path, count: int, running: subprocess.Popen[str]) -> None:
    """Until that many lines follow the first in the journal, or the run is over."""
    while running.poll() is None:
        if journal.exists() and len(journal.read_bytes().splitlines()) > count:
            return
        time.sleep(0.001)


def test_a_run_goes_on_with_what_the_killed_one_had_done(large: Path, tmp_path: Path) -> None:
    """Half the slots are in the journal; they are looked at, and not written again."""
    expected = contents(converted(large, "trtllm", tmp_path / "whole", tp=2))
    job = planned(large, "trtllm", tmp_path / "out", tp=2)

    class Killed(BaseException):
        pass

    done = 0

    def stop(count: int) -> None:
        nonlocal done
        done += count
        if done > job.bytes / 2:
            raise Killed

    with pytest.raises(Killed):
        stream.run(job, stop)
    partial = tmp_path / ".out.partial"
    slots = (partial / ".journal").read_text().splitlines()
    assert len(slots) > 10
    file, name, _ = json.loads(slots[1])
    (written,) = (each for each in job.output.files if each.path == file)
    (offset,) = (offset for slot, offset in zip(written.slots, written.offsets, strict=True) if slot.name == name)
    with (partial / file).open("r+b") as half:  # damage one finished slot: it must be noticed
        half.seek(offset)
        half.write(b"damaged")
    stream.run(job)
    assert contents(tmp_path / "out") == expected


def test_what_another_job_left_behind_is_not_used(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"something else")
    (partial / "left.bin").write_bytes(b"something else")
    (partial / ".journal").write_text('["another fingerprint"]\n["model.safetensors", "lm_head.weight", "00"]\n')
    out = converted(HUGGINGFACE, "hf", tmp_path / "out")
    assert contents(out) == contents(converted(HUGGINGFACE, "hf", tmp_path / "clean"))


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    """The limit on a file's size stands in for the disk: writing fails in the same way."""
    (tmp_path / "out").mkdir()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    running = process("convert", HUGGINGFACE, "--to", "hf", "-o", tmp_path / "out/hf", preexec_fn=limit)
    _, stderr = running.communicate()
    assert running.returncode == 4
    assert "no room" in sentence(stderr)
    assert not list((tmp_path / "out").iterdir())


def test_a_model_larger_than_the_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = save_sparse(tmp_path / "model", sized(layers=90, hidden=16384, ffn=53248, vocab=128256, heads=128))
    if shutil.disk_usage(tmp_path).free > (source / "model.safetensors").stat().st_size:
        pytest.skip("this disk has room for 600 GB")
    result = command("convert", source, "--to", "trtllm", "--tp", 8, "-o", tmp_path / "out")
    assert result.exit_code == 4
    assert "free" in sentence(result.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = command("convert", HUGGINGFACE, "--to", "hf", "-o", tmp_path / "file/out")
    assert result.exit_code in (2, 4)
    sentence(result.stderr)


def test_a_place_that_another_process_writes_to_is_left_to_it(tmp_path: Path) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half done")
    directory = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
    with (partial / ".journal").open("wb") as journal:
        for handle in (journal.fileno(), directory):
            fcntl.flock(handle, fcntl.LOCK_EX)
        result = command("convert", HUGGINGFACE, "--to", "hf", "-o", tmp_path / "out")
    os.close(directory)
    assert result.exit_code == 2
    assert "another nemoport is writing" in sentence(result.stderr)
    assert (partial / "model.safetensors").read_bytes() == b"half done"


def test_of_many_conversions_to_one_place_one_wins_and_the_others_say_so(
    large: Path, clean: dict[str, bytes], tmp_path: Path
) -> None:
    running = [_start(large, tmp_path / "out") for _ in range(3)]
    ended = [(each.communicate()[1], each.returncode) for each in running]
    assert 0 in {code for _, code in ended}
    for stderr, code in ended:
        assert code in (0, 2), stderr
        if code:
            sentence(stderr)
    assert contents(tmp_path / "out") == clean
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


INTRUDER = """
import os, subprocess, sys, time
def watch(event, found):
    if event == "os.rename" and str(found[0]).endswith(".out.partial"):
        other = subprocess.Popen([sys.executable, "-m", "nemoport", *sys.argv[1:]])
        partial = str(found[0])
        before = set(os.listdir(partial))
        while other.poll() is None and before <= set(os.listdir(partial)) <= before | {".journal"}:
            time.sleep(0.001)
sys.addaudithook(watch)
from nemoport.cli import main
main(sys.argv[1:])
"""


def test_nobody_comes_in_while_the_work_is_being_finished(tmp_path: Path) -> None:
    """The same command starts anew just before the rename of the first, and has until then to do harm."""
    arguments = ["convert", str(HUGGINGFACE), "--to", "hf", "-o", str(tmp_path / "out")]
    ended = subprocess.run([sys.executable, "-c", INTRUDER, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    artifact_of(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


@pytest.mark.parametrize("arguments", [("--to", "trtllm", "--tp", 2), ("--to", "hf", "--dtype", "float16")])
def test_memory_is_bounded_by_the_cap_and_not_by_the_model(arguments: tuple[object, ...], tmp_path: Path) -> None:
    cap = 256 * 2**20
    source = save_sparse(tmp_path / "model", sized(layers=3, hidden=1536, ffn=8192, vocab=32000))
    assert (source / "model.safetensors").stat().st_size > 1.5 * cap
    running = process("convert", source, *arguments, "--max-memory", "256MiB", "-o", tmp_path / "out")
    peak = 0
    while running.poll() is None:
        peak = max(peak, anonymous(running.pid))
        time.sleep(0.005)
    _, stderr = running.communicate()
    assert running.returncode == 0, stderr
    assert 10 * 2**20 < peak < cap, f"{peak / 2**20:.0f} MiB"
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    "size, expected", [("512MiB", 2**29), ("2GB", 2 * 10**9), ("1073741824", 2**30), ("1.5gib", 3 * 2**29)]
)
def test_sizes_are_read_as_written(size: str, expected: int) -> None:
    assert Size().convert(size, None, None) == expected


def test_a_cap_too_small_to_work_in_is_refused(tmp_path: Path) -> None:
    result = command("convert", HUGGINGFACE, "--to", "hf", "--max-memory", "1MiB", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "at least" in sentence(result.stderr)
    assert not list(tmp_path.iterdir())


def test_the_cap_does_not_change_the_bytes(once: Once, tmp_path: Path) -> None:
    fixture = LLAMA["nemo2"]
    for size in ("200MiB", "4GiB"):
        result = command("convert", fixture.path, "--to", "hf", "--max-memory", size, "-o", tmp_path / size)
        assert result.exit_code == 0, result.stderr
        assert contents(tmp_path / size) == contents(once(fixture, "hf"))


def _start(source: Path, out: Path) -> subprocess.Popen[str]:
    return process("convert", source, "--to", "trtllm", "--tp", 2, "-o", out)


def _check_refused(directory: Path, *arguments: object) -> None:
    before = _stamps(directory)
    result = command("convert", HUGGINGFACE, *arguments, "-o", directory / "out")
    assert result.exit_code == 2
    assert "remove it, or choose another" in sentence(result.stderr)
    assert _stamps(directory) == before


def _stamps(directory: Path) -> dict[str, tuple[int, int, int]]:
    found = {}
    for path in directory.rglob("*"):
        status = path.lstat()
        found[str(path)] = (status.st_ino, status.st_mtime_ns, status.st_size)
    return found
