"""The verb, on models of every awkward size, on artifacts that do not hold, and on questions that make no sense."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemoport.artifact import identity, read_manifest, write_manifest
from nemoport.errors import MachineError, UsageError
from nemoport.exporters import convert, source, stream
from nemoport.repository import config
from nemoport.repository.publish import publish
from nemoport.repository.versions import model_directory
from nemoport.spec import Plan
from nemoport.validation import Report, Request, validate

from .mutants import add_to_one, in_config, in_graph, mutate
from .small import MISTRAL, QWEN2, write

SIZES: Mapping[str, dict[str, Any]] = {
    "few tokens, few positions": {"vocab_size": 11, "max_position_embeddings": 8},
    "one position": {"max_position_embeddings": 1},
    "one KV head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "bias": QWEN2,
    "window": MISTRAL,
}
PLANS = {
    "hf": ("hf", Plan()),
    "hf bfloat16": ("hf", Plan(dtype="bfloat16")),
    "trtllm tp 2": ("trtllm", Plan(tp=2)),
    "trtllm tp 4 pp 2 bfloat16": ("trtllm", Plan(tp=4, pp=2, dtype="bfloat16")),
    "vllm": ("vllm", Plan(dtype="bfloat16")),
    "llmapi": ("llmapi", Plan()),
    "onnx": ("onnx", Plan()),
    "onnx float16": ("onnx", Plan(dtype="float16")),
}


def make(checkpoint: Path, directory: Path, kind: str = "onnx", plan: Plan | None = None) -> Path:
    stream.run(convert.plan(checkpoint, kind, directory, plan=plan or Plan()), lambda count: None)
    return directory


def failed(report: Report) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


@pytest.mark.parametrize(
    "size, plan", [(size, plan) for size in SIZES for plan in PLANS if size != "window" or "trtllm" not in plan]
)
def test_every_clean_artifact_of_every_size_passes(tmp_path: Path, size: str, plan: str) -> None:
    made = make(write(tmp_path / "source", **SIZES[size]), tmp_path / "made", *PLANS[plan])
    report = validate(Request(subject=made))
    assert not failed(report), report.checks


@pytest.mark.parametrize("plan", ["hf bfloat16", "trtllm tp 4 pp 2 bfloat16"])
def test_rounded_weights_are_held_as_tightly_as_exact_ones(tmp_path: Path, plan: str) -> None:
    """What is measured is the export and not the rounding."""
    made = make(write(tmp_path / "source"), tmp_path / "made", *PLANS[plan])
    key = "rms_norm_eps" if "hf" in plan else "norm_epsilon"
    report = validate(Request(subject=mutate(made, tmp_path / "mutant", in_config(key, 10))))
    assert "logits of the source: one short row" in failed(report)
    assert not report.noise_floor


def test_a_window_is_told_to_the_ranks_and_the_report_says_so(tmp_path: Path) -> None:
    """Rank files know no window: those of a model without one are those of the same model with one."""
    made = make(write(tmp_path / "source"), tmp_path / "made", "trtllm", Plan(tp=2))
    windowed = write(tmp_path / "windowed", **MISTRAL)
    assert "logits of the source: two long rows" in failed(validate(Request(subject=made, against=windowed)))
    write_manifest(made, replace(read_manifest(made), spec=source.model(windowed).spec))
    report = validate(Request(subject=made, against=windowed))
    assert report.passed, report.checks
    assert "max_attention_window 8 " in report.notes[0]


def test_a_window_that_no_prompt_reaches_is_noted(tmp_path: Path) -> None:
    window = {**MISTRAL, "sliding_window": 4096, "max_position_embeddings": 8192}
    report = validate(Request(subject=make(write(tmp_path / "source", **window), tmp_path / "made", "hf")))
    assert report.passed
    assert "4096 is longer than every prompt" in report.notes[0]


def test_a_window_of_another_width_fails(tmp_path: Path) -> None:
    made = make(write(tmp_path / "source", **MISTRAL), tmp_path / "made", "hf")
    report = validate(Request(subject=mutate(made, tmp_path / "mutant", in_config("sliding_window", 2))))
    assert "logits of the source: two long rows" in failed(report)


def test_numbers_that_float16_cannot_hold_fail_instead_of_opening_the_gate(tmp_path: Path) -> None:
    made = make(write(tmp_path / "source", scale=300), tmp_path / "made", "onnx", Plan(dtype="float16"))
    report = validate(Request(subject=made))
    assert failed(report)
    json.dumps(report.as_json(), allow_nan=False)


def test_a_graph_that_answers_no_number_fails(tmp_path: Path) -> None:
    made = make(write(tmp_path / "source"), tmp_path / "made")
    change = in_graph("norm", "epsilon", lambda eps: float("nan"))
    assert not validate(Request(subject=mutate(made, tmp_path / "mutant", change))).passed


def test_the_verdict_is_stored_beside_the_manifest_and_names_its_bytes(tmp_path: Path) -> None:
    made = make(write(tmp_path / "source"), tmp_path / "made", "hf")
    report = validate(Request(subject=made))
    stored = json.loads((made / "report.json").read_bytes())
    assert stored == json.loads(json.dumps(report.as_json()))
    assert (stored["passed"], stored["artifact"]) == (True, identity(made))


def test_a_file_that_was_changed_is_not_even_run(tmp_path: Path) -> None:
    made = make(write(tmp_path / "source"), tmp_path / "made", "hf")
    weights = np.memmap(made / "model.safetensors", mode="r+")
    weights[-1] ^= 1
    weights.flush()
    report = validate(Request(subject=made))
    assert failed(report) == ["files match the manifest"]
    assert report.executed_by == "nothing"


def test_a_config_that_does_not_load_is_a_red_verdict(tmp_path: Path) -> None:
    made = make(write(tmp_path / "source"), tmp_path / "made", "trtllm", Plan(tp=2))
    report = validate(Request(subject=mutate(made, tmp_path / "mutant", in_config("hidden_size", 2))))
    assert failed(report) == ["it loads"]


@pytest.mark.parametrize("other", [{"vocab_size": 60}, {"vocab_size": 40}, {"num_hidden_layers": 3}])
def test_another_model_is_not_the_source(tmp_path: Path, other: dict[str, Any]) -> None:
    made = make(write(tmp_path / "source"), tmp_path / "made")
    report = validate(Request(subject=made, against=write(tmp_path / "other", **other)))
    assert failed(report) == ["model of the source"]


def test_a_source_of_other_weights_fails_and_one_of_fewer_positions_does_not(tmp_path: Path) -> None:
    made = make(write(tmp_path / "source"), tmp_path / "made")
    shorter = write(tmp_path / "shorter", max_position_embeddings=20)
    assert validate(Request(subject=made, against=shorter)).passed
    other = write(tmp_path / "other", scale=1.01)
    assert "weights of the source" in failed(validate(Request(subject=made, against=other)))


def test_questions_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "source")
    made = make(checkpoint, tmp_path / "made")
    with pytest.raises(UsageError, match="nothing does not exist"):
        validate(Request(subject=tmp_path / "nothing", model="m"))
    with pytest.raises(UsageError, match="is no artifact; for a repository, name the model"):
        validate(Request(subject=checkpoint))
    with pytest.raises(UsageError, match="does not exist"):
        validate(Request(subject=made, against=tmp_path / "nowhere"))
    checkpoint.rename(tmp_path / "moved")
    with pytest.raises(UsageError, match="which is gone; use --against CKPT"):
        validate(Request(subject=made))
    assert validate(Request(subject=made, against=tmp_path / "moved")).passed
    (made / "origin.json").unlink()
    with pytest.raises(UsageError, match="does not know where it came from"):
        validate(Request(subject=made))


def test_bfloat16_on_a_cpu_is_for_another_machine(tmp_path: Path) -> None:
    made = make(write(tmp_path / "source"), tmp_path / "made", "onnx", Plan(dtype="bfloat16"))
    with pytest.raises(MachineError, match=r"computes in bfloat16.*no kernels on the CPU"):
        validate(Request(subject=made))
    assert not (made / "report.json").exists()


@pytest.mark.parametrize("largest", [0, 1, 2])
def test_a_published_version_is_asked_in_batches_that_its_config_takes(tmp_path: Path, largest: int) -> None:
    made = make(write(tmp_path / "source"), tmp_path / "made")
    repository = tmp_path / "models"
    published = publish(made, repository, "m", max_batch_size=largest)
    report = validate(Request(subject=repository, model="m"))
    assert not failed(report), report.checks
    assert json.loads((published.evidence / "report.json").read_bytes())["passed"] is True
    assert report.artifact == identity(published.evidence)


def test_a_published_version_is_validated_with_its_config(tmp_path: Path) -> None:
    """A config that its owner broke is a red verdict, whatever the weights are."""
    made = make(write(tmp_path / "source"), tmp_path / "made")
    repository = tmp_path / "models"
    publish(made, repository, "m")
    path = model_directory(repository, "m") / config.FILE
    path.write_text(path.read_text().replace("TYPE_INT64", "TYPE_INT32", 1))
    assert failed(validate(Request(subject=repository, model="m"))) == ["it loads"]


def test_a_published_version_that_was_changed_fails(tmp_path: Path) -> None:
    made = make(write(tmp_path / "source"), tmp_path / "made")
    bad = mutate(made, tmp_path / "bad", add_to_one("layers.0.attn.q.weight", 0, 1.0))
    repository = tmp_path / "models"
    publish(bad, repository, "m")
    assert "weights of the source" in failed(validate(Request(subject=repository, model="m", version="staging-1")))
    with pytest.raises(UsageError, match="has no version 7"):
        validate(Request(subject=repository, model="m", version="7"))
