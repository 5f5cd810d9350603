"""`build`: a file becomes a repository, once; what is wrong with the file is said with its place."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from exporters.commands import command, sentence

from nemoport import pipeline
from nemoport.pipeline import document

DEMO = Path(__file__).parents[1] / "examples" / "demo" / "checkpoint"
ROUNDS = int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "3"))
PIPELINE = f"""
repository: repository
defaults:
  source: {DEMO}
  validate: false
models:
  - name: fables
    to: onnx
    dtype: float32
    validate: true
    promote: true
  - name: ranks
    to: trtllm
    matrix: {{tp: [1, 2]}}
  - name: small
    to: hf
    quantize: int8
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE)
    return path


def built(file: Path, *options: Any) -> dict[str, tuple[str, str]]:
    """By model and verb, the status and what was said."""
    told = command("build", file, "--json", *options)
    found = json.loads(told.stdout)
    assert found["passed"] == (told.exit_code == 0)
    return {f"{step['model']} {step['verb']}".strip(): (step["status"], step["said"]) for step in found["steps"]}


def contents(directory: Path) -> dict[str, str]:
    """Digests of everything but what tells of this very run."""
    return {
        str(path.relative_to(directory)): blake3(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in ("origin.json", "history.jsonl") and "report" not in path.name
    }


def test_a_file_becomes_a_repository(file: Path) -> None:
    done = built(file)
    assert [verb for verb in done if done[verb][0] != "did"] == []
    assert list(done) == [
        *("fables convert", "fables publish", "fables validate", "fables promote"),
        *("ranks-tp1 convert", "ranks-tp2 convert", "small convert", "check"),
    ]
    assert (file.parent / "repository/fables/1/model.onnx").is_file()
    names = sorted(path.name.rpartition("-")[0] for path in (file.parent / ".nemoport-cache").iterdir())
    assert names == ["fables", "ranks-tp1", "ranks-tp2", "small"]


def test_a_second_time_does_no_work(file: Path) -> None:
    built(file)
    before = {path: path.stat().st_mtime_ns for path in file.parent.rglob("*") if path.is_file()}
    wanted = pipeline.read(file)
    planned = pipeline.plan(wanted)
    assert all(each.converted for each in planned)
    assert pipeline.need(wanted, planned).bytes == 0
    counted: list[int] = []
    outcome = pipeline.run(wanted, planned, jobs=2, progress=counted.append)
    assert {step.status for step in outcome.steps if step.verb != "check"} == {"found done"}
    assert not counted
    changed = [path for path, at in before.items() if path.stat().st_mtime_ns != at]
    assert [path for path in changed if ".lock" not in path.name and "lock" not in path.name] == []


def test_another_quantization_redoes_only_its_own(file: Path) -> None:
    built(file)
    file.write_text(PIPELINE.replace("int8", '{method: int8, exclude: ["*.o"]}'))
    done = built(file)
    assert [verb for verb, (status, _) in done.items() if status == "did"] == ["small convert", "check"]


def test_only_names_a_model_or_a_cell_of_a_matrix(file: Path) -> None:
    assert list(built(file, "--only", "ranks-tp2")) == ["ranks-tp2 convert"]
    assert list(built(file, "--only", "ranks")) == ["ranks-tp1 convert", "ranks-tp2 convert"]
    assert command("build", file, "--only", "nobody").exit_code == 2


def test_a_dry_run_writes_nothing(file: Path) -> None:
    shown = command("build", file, "--dry-run")
    assert shown.exit_code == 0
    assert "convert, publish, validate, promote" in shown.stdout
    assert [path.name for path in file.parent.iterdir()] == ["pipeline.yaml"]
    plan = json.loads(command("build", file, "--dry-run", "--json").stdout)
    assert plan["bytes"] == sum(each["bytes"] for each in plan["models"]) > 0


def test_one_models_failure_is_no_other_ones(file: Path) -> None:
    """What is planned is checked before anything is written; a red verdict comes later."""
    file.write_text(PIPELINE.replace("dtype: float32", "dtype: float32\n    max_batch_size: 8"))
    wanted = pipeline.read(file)
    planned = pipeline.plan(wanted)
    made = planned[1].job.destination
    made.mkdir(parents=True)
    (made / "something").write_text("else")
    outcome = pipeline.run(wanted, planned)
    failed = [(step.model, step.verb) for step in outcome.steps if step.status == "failed"]
    assert failed == [("ranks-tp1", "convert")]
    assert outcome.exit_code == 2
    assert {step.model for step in outcome.steps if step.status == "did"} >= {"fables", "ranks-tp2", "small"}
    assert "**failed**" in pipeline.markdown(outcome)


def test_a_killed_build_continues(file: Path, tmp_path: Path) -> None:
    file.write_text(PIPELINE.replace("validate: true\n    promote: true", "promote: false"))
    straight = tmp_path / "straight"
    straight.mkdir()
    shutil.copy(file, straight)
    built(straight / file.name)
    numbers = random.Random(7)
    for _ in range(ROUNDS):
        running = subprocess.Popen(
            [sys.executable, "-m", "nemoport", "build", str(file)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(numbers.uniform(0.3, 1.5))
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert all(status != "failed" for status, _ in built(file).values())
    cache = ".nemoport-cache"
    assert contents(file.parent / cache) == contents(straight / cache)
    assert contents(file.parent / "repository.staging") == contents(straight / "repository.staging")


def test_the_summary_is_markdown(file: Path, tmp_path: Path) -> None:
    told = command("build", file, "--only", "ranks", "--summary", tmp_path / "summary.md")
    assert told.exit_code == 0
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[0] == "### nemoport build pipeline.yaml: passed"
    assert all(line.count(" | ") == 3 for line in lines if line.startswith("| ranks"))
    assert "ranks-tp1: convert done" in told.stderr


WRONG = {
    "promot: true": ("9:5", "did you mean promote?"),
    "tp: 0": ("9:5", "0 is less than the minimum of 1"),
    "tp: two": ("9:5", "'two' is not of type 'integer'"),
    "dtype: fp16": ("9:5", "'fp16' is not one of"),
    "matrix: {gpu: [1]}": ("9:5", "'gpu'"),
    "quantize: {metod: fp8}": ("9:5", "quantize"),
    "name: x": ("9:5", "'name' is said twice"),
    "<<: 1": ("9:9", "is not YAML"),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_complaint_names_its_place(line: str, tmp_path: Path) -> None:
    place, words = WRONG[line]
    path = tmp_path / "wrong.yaml"
    head = f"repository: r\n\n# models\nmodels:\n  - name: fables\n    source: {DEMO}\n    to: onnx\n\n"
    path.write_text(f"{head}    {line}\n")
    told = command("build", path)
    assert told.exit_code == 2
    said = sentence(told.stderr)
    assert words in said
    assert f"wrong.yaml:{place}" in said


@pytest.mark.parametrize(
    "text, words",
    {
        "": "None is not of type 'object'",
        "models: []\nrepository: r": "should be non-empty",
        "repository: r\nmodels: [{name: a, to: hf}]": "has no 'source'",
        "repository: r\nmodels: [{name: a, to: hf, source: x}, {name: a}]": "two models are called a",
        "repository: r\nmodels: [{name: ../a, to: hf, source: x}]": "does not match",
        "repository: r\nmodels: [{name: a, to: hf, source: nowhere}]": "does not exist",
        "a: &a [*a]": "is not YAML",
        "\x00": "is not YAML",
    }.items(),
)
def test_what_makes_no_pipeline_is_refused_in_a_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    told = command("build", path)
    assert told.exit_code == 2
    assert words in sentence(told.stderr)


def test_the_example_is_a_pipeline() -> None:
    example = DEMO.parents[1] / "pipelines/pipeline.yaml"
    assert [each.wanted.name for each in pipeline.plan(pipeline.read(example))] == [
        *("fables", "fables-ranks-tp1", "fables-ranks-tp2", "fables-int8")
    ]


def test_every_word_of_the_schema_is_understood() -> None:
    """A word that a file may say and nobody reads would be ignored in silence."""
    room = Path(pipeline.__file__).parent
    code = (room / "recipe.py").read_text()
    words = {*document.schema()["properties"], *document.schema()["$defs"]["model"]["properties"]}
    quantized = document.schema()["$defs"]["model"]["properties"]["quantize"]["oneOf"][2]["properties"]
    assert [word for word in {*words, *quantized} if not re.search(rf'"{word}"', code)] == []
