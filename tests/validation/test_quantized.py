"""What nemoport quantized is judged by its fields, each computed anew, and apart from that by what it says: every
method passes on a trained model, and what a real bug would write fails both."""

from __future__ import annotations

import json
import re
import runpy
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nemoport import calibration, plugins, reference
from nemoport.errors import UsageError
from nemoport.exporters import convert, source, statistics, stream
from nemoport.exporters.dequantized import QUANTIZERS
from nemoport.exporters.methods import DIALECTS, rows
from nemoport.spec import Plan, Recipe
from nemoport.validation import Report, Request, documents, validate
from nemoport.validation.fidelity import GATES, gate
from nemoport.validation.measures import distance
from nemoport.validation.report import Fidelity, Section, Summary

from .mutants import Change, Opened, mutate
from .wide import widened

DEMO = Path(__file__).parents[2] / "examples" / "demo"
METHODS = {(row.method, DIALECTS[row.dialect][0]) for row in rows() if row.loads}
GROUPED = ("int4", "int4_awq")
"""Their groups of 128 do not divide the demo, so the wider one is quantized."""
EVERYTHING = ("amax", "mean", "losses", "keys", "values")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """The demo, a wider one, the statistics of each, and text that neither was calibrated on."""
    place = tmp_path_factory.mktemp("sources")
    stream.run(convert.plan(DEMO / "checkpoint", "hf", place / "plain", plan=Plan()))
    found = {"demo": DEMO / "checkpoint", "wide": widened(place / "plain", place / "wide")}
    told = "\n".join(runpy.run_path(str(DEMO / "text.py"))["tell_fables"](60))
    ids = np.frombuffer(told.encode(), np.uint8)[: 32 * 128].reshape(32, 128).astype(np.int64)
    np.savez(place / "seen.npz", tokens=ids[:24])
    np.savez(place / "text.npz", tokens=ids[24:])
    for name in ("demo", "wide"):
        limits = calibration.Limits()
        seen = calibration.from_tokens(place / "seen.npz", found[name], None, limits)
        needs = EVERYTHING if name == "wide" else tuple(each for each in EVERYTHING if each != "losses")
        statistics_ = seen.statistics(source.model(found[name]), needs)
        (place / f"{name}.npz").write_bytes(statistics.to_bytes(statistics_))
        found[f"{name} statistics"] = place / f"{name}.npz"
    return found | {"text": place / "text.npz"}


@pytest.fixture(scope="module")
def made(sources: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Each artifact once."""
    place, done = tmp_path_factory.mktemp("made"), dict[tuple[str, str], Path]()

    def make(method: str, to: str) -> Path:
        if (method, to) not in done:
            done[method, to] = place / f"{method}-{to}"
            quantize(sources, method, to, done[method, to])
        return done[method, to]

    return make


def quantize(
    sources: Mapping[str, Path], method: str, to: str, out: Path, dialect: str | None = None, **recipe: Any
) -> None:
    name = "wide" if method in GROUPED else "demo"
    dtype = "float32" if to == "onnx" else "bfloat16" if name == "wide" else None  # no CPU has bfloat16 graphs
    plan = Plan(dtype=dtype, dialect=dialect, recipe=Recipe(method=method, **recipe))
    seen = calibration.from_statistics(sources[f"{name} statistics"])
    stream.run(convert.plan(sources[name], to, out, plan=plan, calibration=seen))


def judged(subject: Path, sources: Mapping[str, Path], method: str) -> Report:
    against = sources["wide" if method in GROUPED else "demo"]
    return validate(Request(subject=subject, against=against, text=sources["text"]))


def test_the_wider_demo_is_the_same_function(sources: Mapping[str, Path]) -> None:
    tokens = np.load(sources["text"])["tokens"][:2, :40]
    models = (source.model(sources[name]) for name in ("demo", "wide"))
    narrow, wide = (reference.logits(model.spec, model.tensors, tokens) for model in models)
    assert distance(wide, narrow).relative < 1e-5


@pytest.mark.parametrize("method, to", sorted(METHODS))
def test_every_method_passes_on_a_trained_model(
    method: str, to: str, made: Callable[[str, str], Path], sources: Mapping[str, Path]
) -> None:
    report = judged(made(method, to), sources, method)
    assert report.passed, report.checks
    assert report.quantization
    assert isinstance(report.quantization.floor, Fidelity)
    assert report.quantization.floor.kl_mean < 1e-3
    linears = report.quantization.linears
    assert len(linears) == 4 * 7
    assert list(report.quantization.worst) == sorted(linears, key=lambda name: -linears[name].relative)[:10]
    assert 1e-3 < max(each.relative for each in linears.values()) < 0.2
    assert len(report.layers) == 5
    assert any("lm_head" in name for name in report.quantization.excluded)


@pytest.mark.parametrize("method", [row.method for row in rows() if row.dialect == "compressed-tensors" and row.loads])
def test_another_dialect_is_judged_by_its_own_rounding(
    method: str, sources: Mapping[str, Path], tmp_path: Path
) -> None:
    quantize(sources, method, "hf", tmp_path / "out", dialect="compressed-tensors")
    report = judged(tmp_path / "out", sources, method)
    assert report.passed, report.checks


def test_every_quantizer_has_a_gate() -> None:
    for name, module in plugins.load_all(QUANTIZERS).items():
        assert gate(module.encoding(None)) == GATES[4 if "4" in name else 8]


def test_ranks_are_judged_together(sources: Mapping[str, Path], tmp_path: Path) -> None:
    seen = calibration.from_statistics(sources["demo statistics"])
    plan = Plan(tp=2, pp=2, recipe=Recipe(method="int8_sq", kv_cache="fp8"))
    stream.run(convert.plan(sources["demo"], "trtllm", tmp_path / "out", plan=plan, calibration=seen))
    report = judged(tmp_path / "out", sources, "int8_sq")
    assert report.passed, report.checks
    half = each(r".*\.kv_cache_scaling_factor", lambda array: array / 2)
    report = judged(mutate(tmp_path / "out", tmp_path / "mutant", half), sources, "int8_sq")
    assert [check.name for check in report.checks if not check.passed] == ["weights of the recipe"]


def test_what_was_excluded_or_is_kept_in_the_cache_is_judged_too(sources: Mapping[str, Path], tmp_path: Path) -> None:
    quantize(sources, "int4_awq", "hf", tmp_path / "out", exclude=("layers.1.attn.o",), kv_cache="fp8")
    report = judged(tmp_path / "out", sources, "int4_awq")
    assert report.passed, report.checks
    assert report.quantization
    assert "layers.1.attn.o" not in report.quantization.linears
    assert "model.layers.1.self_attn.o_proj" in report.quantization.excluded


SCALES = r".*\.(weight_scale|weights_scaling_factor|per_channel_scale|scale)"
SECOND = r".*\.(weight_scale_2|weights_scaling_factor_2)"
SUMS = r".*\.sum"
PRE_SCALES = r".*\.(pre_quant_scale|prequant_scaling_factor)"
Array = NDArray[Any]


def each(pattern: str, change: Callable[[Array], Array]) -> Change:
    """In every layer, as a bug in a program would."""

    def apply(opened: Opened) -> None:
        found = [stored.array for stored in opened.stored if re.fullmatch(pattern, stored.name)]
        assert found
        for array in found:
            array[...] = change(array)

    return apply


def of_the_next_layer(opened: Opened) -> None:
    before = {(stored.file, stored.name): stored.array.copy() for stored in opened.stored}
    layers = len(opened.manifest.spec.blocks)

    def next_one(match: re.Match[str]) -> str:
        return f"layers.{(int(match[1]) + 1) % layers}."

    for stored in opened.stored:
        if re.fullmatch(SCALES, stored.name):
            stored.array[...] = before[stored.file, re.sub(r"layers\.(\d+)\.", next_one, stored.name)]


def reciprocal(array: Array) -> Array:
    return (1 / array.astype(np.float32)).astype(array.dtype)


def turned(array: Array) -> Array:
    """[out, groups] written as [groups, out]."""
    return np.ascontiguousarray(array.T).reshape(array.shape)


def nibbles(array: Array) -> Array:
    packed = array.view(np.uint8)
    return (packed >> 4 | packed << 4).view(array.dtype)


LINEARS = r".*(proj|qkv|dense|fc|gate)\.weight"
SHUFFLED, SWAPPED = each(SCALES, turned), each(LINEARS, nibbles)
FORGOTTEN = each(PRE_SCALES, np.ones_like)
MUTANTS = {
    **{f"a reciprocal scale: {m}, {to}": (m, to, each(SCALES, reciprocal)) for m, to in sorted(METHODS)[::3]},
    "a reciprocal global scale: nvfp4, hf": ("nvfp4", "hf", each(SECOND, reciprocal)),
    **{f"shuffled groups: {m}, {to}": (m, to, SHUFFLED) for m, to in [("nvfp4", "trtllm"), ("int4", "hf")]},
    **{f"swapped nibbles: {m}, {to}": (m, to, SWAPPED) for m, to in [("nvfp4_weights", "hf"), ("int4", "trtllm")]},
    **{
        f"a forgotten pre-scale: {m}, {to}": (m, to, FORGOTTEN)
        for m, to in [("int8_sq", "trtllm"), ("int4_awq", "hf"), ("int4_awq", "trtllm")]
    },
    **{
        f"a scale of another layer: {m}, {to}": (m, to, of_the_next_layer)
        for m, to in [("fp8", "hf"), ("fp8", "trtllm"), ("int8", "hf"), ("int4_awq", "hf"), ("int8_dynamic", "onnx")]
    },
    "forgotten sums: int8_dynamic, onnx": ("int8_dynamic", "onnx", each(SUMS, np.zeros_like)),
}
MARGIN = 10
"""How far beyond a gate on text each of them lands at least."""


@pytest.mark.parametrize("method, to, change", MUTANTS.values(), ids=MUTANTS)
def test_no_mutant_survives_its_fields_nor_what_it_says(
    method: str,
    to: str,
    change: Change,
    made: Callable[[str, str], Path],
    sources: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    report = judged(mutate(made(method, to), tmp_path / "mutant", change), sources, method)
    failed = {check.name for check in report.checks if not check.passed}
    assert "files match the manifest" not in failed
    assert "weights of the recipe" in failed
    assert any(name.startswith("logits of the recipe") for name in failed)
    assert max(check.used or 0 for check in report.checks if check.name.startswith("divergence")) > MARGIN


def test_one_scale_that_hardly_matters_is_told_by_the_fields(
    made: Callable[[str, str], Path], sources: Mapping[str, Path], tmp_path: Path
) -> None:
    """The limit of text: of one linear of 28, a scale off by a hundredth is lost in the rounding that is allowed."""
    slightly = each(r".*layers\.1\.mlp\.down_proj\.weight_scale", lambda array: array * np.float32(1.01))
    report = judged(mutate(made("fp8", "hf"), tmp_path / "mutant", slightly), sources, "fp8")
    failed = {check.name.partition(":")[0] for check in report.checks if not check.passed}
    assert failed == {"weights of the recipe", "logits of the recipe"}


def test_a_scale_for_the_inputs_is_told_by_the_fields(
    made: Callable[[str, str], Path], sources: Mapping[str, Path], tmp_path: Path
) -> None:
    report = judged(
        mutate(made("fp8", "hf"), tmp_path / "mutant", each(r".*\.input_scale", reciprocal)), sources, "fp8"
    )
    assert [check.name for check in report.checks if not check.passed] == ["weights of the recipe"]


def test_a_good_rounding_of_another_model_fails(
    made: Callable[[str, str], Path], sources: Mapping[str, Path], tmp_path: Path
) -> None:
    """Its fields and its answers are faultless in themselves."""
    other = tmp_path / "other"
    shutil.copytree(sources["wide"], other)
    content = bytearray((other / "model.safetensors").read_bytes())
    header = int.from_bytes(content[:8], "little")
    rows = json.loads(content[8 : 8 + header])
    start, stop = rows["model.layers.0.mlp.down_proj.weight"]["data_offsets"]
    numbers = np.frombuffer(content, np.float32, (stop - start) // 4, 8 + header + start)
    numbers *= np.float32(0.5)
    (other / "model.safetensors").write_bytes(content)
    report = validate(Request(subject=made("int4", "hf"), against=other, text=sources["text"]))
    failed = {check.name.partition(" ")[0] for check in report.checks if not check.passed}
    assert {"weights", "logits", "divergence"} <= failed


def test_without_a_text_the_source_itself_is_asked(
    made: Callable[[str, str], Path], sources: Mapping[str, Path]
) -> None:
    """Its own words are likelier to it than to the artifact, by the divergence between them."""
    report = validate(Request(subject=made("nvfp4", "hf"), against=sources["demo"]))
    assert report.passed, report.checks
    found = report.quantization
    assert found
    assert isinstance(found.found, Fidelity)
    assert found.text == "sampled from the source"
    assert abs(np.log(found.found.ratio) - found.found.kl_mean) < 0.02
    assert validate(Request(subject=made("nvfp4", "hf"), against=sources["demo"])).quantization == found


def test_what_a_calibration_left_of_its_text_judges(sources: Mapping[str, Path], tmp_path: Path) -> None:
    """As long as the file is there, and the same."""
    rows = np.load(sources["text"])["tokens"]
    path = tmp_path / "text.npz"
    np.savez(path, tokens=rows)
    seen = calibration.from_tokens(path, sources["demo"], None, calibration.Limits(samples=5, length=100))
    plan = Plan(recipe=Recipe(method="fp8"))
    stream.run(convert.plan(sources["demo"], "hf", tmp_path / "out", plan=plan, calibration=seen))
    texts = {}
    for change in ("none", "another text", "gone"):
        if change == "another text":
            np.savez(path, tokens=np.roll(rows, 1))
        if change == "gone":
            path.unlink()
        report = validate(Request(subject=tmp_path / "out"))
        assert report.passed, report.checks
        assert report.quantization
        assert isinstance(report.quantization.found, Fidelity)
        texts[change] = (report.quantization.text, report.quantization.found.positions)
    assert texts["none"] == ("held out from text.npz", (len(rows) - 5) * 99)
    assert texts["another text"] == texts["gone"]
    assert texts["gone"][0] == "sampled from the source"


def test_the_report_is_stored_and_shown(
    made: Callable[[str, str], Path], sources: Mapping[str, Path], tmp_path: Path
) -> None:
    artifact = made("int4_awq", "hf")
    report = judged(artifact, sources, "int4_awq")
    stored = json.loads((artifact / "report.json").read_text())
    assert stored["passed"]
    found = stored["quantization"]
    assert found["calibration"] == statistics.read(sources["wide statistics"])[1]
    assert len(found["worst"]) == 10
    documents.write(Summary(subject="it", sections=(Section(model="it", answers=report),)), tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    for words in (*found["worst"], found["calibration"], "source in bfloat16", "layer by layer"):
        assert words in page


@pytest.mark.parametrize(
    "tokens, said",
    [([[5]], "single token"), ([[5, 259]], "vocabulary"), (None, "no file")],
)
def test_a_text_that_cannot_be_read_is_refused(
    tokens: list[list[int]] | None,
    said: str,
    made: Callable[[str, str], Path],
    sources: Mapping[str, Path],
    tmp_path: Path,
) -> None:
    path = tmp_path / "text.npz"
    if tokens:
        np.savez(path, tokens=np.array(tokens))
    with pytest.raises(UsageError, match=f"--text.*{said}"):
        validate(Request(subject=made("fp8", "hf"), against=sources["demo"], text=path))
