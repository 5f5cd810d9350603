"""Encoders at 8 bits as ONNX: every family, weights alone and inputs too; validated, and no mutant passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from exporters.dynamic import products
from numpy.typing import NDArray
from validation.mutants import Change, Opened, exchange_tensors, mutate, shift_rows

from nemoport import reference
from nemoport.errors import UnsupportedInput
from nemoport.exporters import convert, source, stream
from nemoport.exporters.dequantized import all_dequantized
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.groups import groups
from nemoport.spec import ModelSpec, Plan, Recipe, tensors
from nemoport.validation import Report, Request, validate, weights
from nemoport.validation.prompts import Prompt
from nemoport.validation.texts import texts

from .encoders import CASES, save
from .test_mutants import MARGIN, bypassed

Array = NDArray[Any]
METHODS = ("int8", "int8_dynamic")
FAMILIES = {case.family: name for name, case in reversed(CASES.items())}
BETWEEN = (0.002, 0.2)
"""Of the answers' norm: less, and nothing was rounded; more, and it was rounded wrongly."""
UNTOLD = {"neighbours", "order"}
"""Random encoders answer every text nearly alike, and which of two is the nearer is then chance."""


def quantize(path: Path, method: str, out: Path) -> Path:
    stream.run(convert.plan(path, "onnx", out, plan=Plan(dtype="float32", recipe=Recipe(method=method))))
    return out


def given(text: Prompt, asked: set[str]) -> dict[str, Array]:
    said = {"input_ids": text.tokens, "attention_mask": text.mask, "token_type_ids": text.token_types}
    return {name: array for name, array in said.items() if array is not None and name in asked}


def session(path: Path) -> onnxruntime.InferenceSession:
    """One that rounds no input of a MatMulNBits."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(path, options)


def answers(path: Path, text: Prompt) -> Array:
    running = session(path)
    answer: Array = running.run(None, given(text, {each.name for each in running.get_inputs()}))[0]
    return answer


def spec_and_text(path: Path) -> tuple[ModelSpec, Prompt]:
    spec = source.model(path).spec
    return spec, texts(spec, 5)[1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", FAMILIES.values(), ids=FAMILIES)
def test_every_family_is_quantized_to_8_bits(case: str, method: str, tmp_path: Path) -> None:
    saved = save(CASES[case], tmp_path / "model")
    path = quantize(saved.path, method, tmp_path / "out") / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    spec, text = spec_and_text(saved.path)
    held = {share.name: share.tensor for share in weights.of_graph(path, spec)}
    linears = {f"{linear}.weight" for group in groups(tensors(spec)) for linear in group.linears}
    assert {name for name, tensor in held.items() if isinstance(tensor, Encoded)} == linears
    found, wanted = answers(path, text), saved.answers(text)
    assert BETWEEN[0] < np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < BETWEEN[1]
    if method == "int8":
        plain = all_dequantized(held)
        exact = reference.encode(spec, plain, text.tokens, mask=text.mask, token_types=text.token_types)
        np.testing.assert_allclose(found, exact, rtol=0, atol=3e-5 * np.abs(exact).max())
    else:
        asked = {each.name for each in session(path).get_inputs()}
        made = list(products(path, given(text, asked)))
        assert {f"{product.linear}.weight" for product in made} == linears
        for product in made:
            np.testing.assert_allclose(product.y, product.wanted, rtol=0, atol=1e-5 * np.abs(product.wanted).max())
    failed = {
        check.name.partition(" ")[0] for check in validate(Request(subject=tmp_path / "out")).checks if not check.passed
    }
    assert failed <= UNTOLD


def test_an_answer_does_not_depend_on_its_neighbours(tmp_path: Path) -> None:
    """A token far out of range widens the steps of no other text: its embedding is a thousand times as large."""
    saved = save(CASES["llama of transformers 5"], tmp_path / "model")
    path = quantize(saved.path, "int8_dynamic", tmp_path / "out")

    def enlarge(opened: Opened) -> None:
        opened.pieces("embed.weight")[0][7] *= 1000

    far = mutate(path, tmp_path / "far", enlarge) / "model.onnx"
    ids = np.random.default_rng(2).integers(8, 100, (3, 9))
    ids[1, 4] = 7
    text = Prompt("text", ids, np.ones_like(ids), np.tile(np.arange(9), (3, 1)))
    together = answers(far, text)
    for row in (0, 2):
        alone = answers(far, text.taken(slice(row, row + 1), slice(None)))
        np.testing.assert_allclose(together[row], alone[0], rtol=0, atol=1e-5 * np.abs(alone).max())


def test_other_targets_and_bits_are_refused(tmp_path: Path) -> None:
    saved = save(CASES["bert"], tmp_path / "model")
    for to, method, said in (("hf", "int8", "use --to onnx with int8"), ("onnx", "int4", "4 bits turn too far")):
        with pytest.raises(UnsupportedInput, match=said):
            convert.plan(saved.path, to, tmp_path / "out", plan=Plan(dtype="float32", recipe=Recipe(method=method)))


def fields(name: str, change: Callable[[Array], Array]) -> Change:
    """Of every quantized linear."""

    def apply(opened: Opened) -> None:
        found = [stored.array for stored in opened.stored if stored.name.endswith(f".{name}") and stored.name != name]
        assert found
        for array in found:
            array[...] = change(array)

    return apply


def halves(opened: Opened) -> None:
    """Of every packed weight, the first half of the bytes and the second."""
    for stored in opened.stored:
        if stored.array.dtype == np.int8:
            numbers = stored.array.reshape(-1)
            numbers[...] = np.roll(numbers, len(numbers) // 2)


SHARED: dict[str, Change] = {
    "a reciprocal scale": fields("scale", lambda scale: 1 / scale),
    "shuffled scales": fields("scale", lambda scale: np.roll(scale, 1)),
    "swapped halves": halves,
    "linears exchanged": exchange_tensors("layers.1.attn.v.weight", "layers.1.attn.o.weight"),
}
MUTANTS: dict[str, dict[str, Change]] = {
    "int8": SHARED,
    "int8_dynamic": SHARED
    | {
        "forgotten sums": fields("sum", np.zeros_like),
        "the least number forgotten": bypassed("Add", r".*\.integers\.unscaled"),
        "steps forgotten": bypassed("Mul", r".*\.integers\.stepped"),
        "shuffled rows of the last layer": shift_rows("layers.2.ffn.down.weight"),
    },
}
EVERY = [(method, name) for method, changes in MUTANTS.items() for name in changes]
ONLY_IN_THE_GRAPH = ("the least number forgotten", "steps forgotten")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("quantized")
    saved = save(CASES["bert"], root / "model")

    def made(method: str) -> Path:
        return out if (out := root / method).exists() else quantize(saved.path, method, out)

    return made


@pytest.mark.parametrize("method, mutant", EVERY)
def test_no_mutant_of_a_quantized_encoder_survives(
    method: str, mutant: str, clean: Callable[[str], Path], tmp_path: Path
) -> None:
    """By its fields, by what they are made into, and by what it costs."""
    report = validate(Request(subject=mutate(clean(method), tmp_path / "mutant", MUTANTS[method][mutant])))
    failed = {check.name for check in report.checks if not check.passed}
    assert "files match the manifest" not in failed
    assert ("weights of the recipe" in failed) == (mutant not in ONLY_IN_THE_GRAPH)
    assert used(report, "embeddings of the recipe") > MARGIN
    assert used(report, "direction") > 1


def used(report: Report, what: str) -> float:
    return max(check.used or 0 for check in report.checks if check.name.startswith(what))
