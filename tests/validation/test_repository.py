"""A repository validated whole: every model judged by itself, and what is left for CI and for people."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import onnx
import pytest
from exporters.commands import command
from PIL import Image
from runner.models import SIMPLE_CONFIG, add_sub, write_model
from runner.python_models import write_python

from nemoport import validation
from nemoport.exporters import convert, stream
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.spec import Plan
from nemoport.validation import Request, Section, Summary
from nemoport.validation.repository import run

from .small import write

CONFIG = """
name: "%s"
backend: "python"
max_batch_size: 4
input [ { name: "TEXT" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "SHOUT" data_type: TYPE_STRING dims: [ 1 ] } ]
"""
SHOUT = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        text = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
        loud = np.vectorize(lambda each: each.upper(), otypes=[object])(text)
        return pb_utils.InferenceResponse([pb_utils.Tensor("SHOUT", loud)])
"""
COUNTS = """
    calls = 0

    def seen(self):
        self.calls += 1
        return str(self.calls).encode()
"""
FORGETS = SHOUT.replace("each.upper()", "each + self.seen()") + COUNTS
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1000,4000"),
)
GREEN, RED, INK = (27, 110, 60), (179, 38, 30), (31, 92, 153)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder in float16 that is live, one that is staged, a graph and a python model that nemoport did not make."""
    directory = tmp_path_factory.mktemp("repository")
    root = directory / "models"
    for name in ("live", "staged"):
        made = directory / name
        stream.run(convert.plan(write(directory / f"{name} source"), "onnx", made, plan=Plan(dtype="float16")))
        publish(made, root, name)
    assert validation.validate(Request(subject=root, model="live")).passed
    promote(root, "live", None)
    write_model(root, "simple", add_sub(), SIMPLE_CONFIG)
    write_python(root, "shout", SHOUT, CONFIG % "shout")
    return root


@pytest.fixture(scope="module")
def found(repository: Path) -> Summary:
    return run(Request(subject=repository))


def test_every_model_is_judged(found: Summary) -> None:
    assert found.passed, [check for section in found.sections for check in section.checks if not check.passed]
    parts = {each.model: (each.answers is not None, each.service is not None) for each in found.sections}
    assert parts == {"live": (True, True), "shout": (False, True), "simple": (False, True), "staged": (True, False)}


def test_what_is_live_is_measured(found: Summary) -> None:
    for section in found.sections:
        if service := section.service:
            assert service.load_seconds is not None
            assert service.first_seconds is not None
            assert set(service.percentiles) == {"p50", "p95", "p99"}
            assert min(service.latencies) <= service.percentiles["p50"] <= max(service.latencies)


def test_the_protocols_agree_and_flat_inputs_go_over_sse_too(found: Summary) -> None:
    asked = {each.model: [check.name for check in each.service.checks] for each in found.sections if each.service}
    assert "gRPC answers the same" in asked["live"]
    assert "SSE answers" not in asked["live"]
    assert "SSE answers" in asked["shout"]
    assert "SSE answers" in asked["simple"]


def test_float16_shows_what_rounding_does_by_layer(found: Summary) -> None:
    (live,) = (each.answers for each in found.sections if each.model == "live")
    assert live is not None
    assert list(live.layers) == ["layers.0", "layers.1", "head"]
    assert 0 < live.layers["head"] < 1e-2


def test_a_broken_model_fails_and_the_others_are_judged_still(repository: Path, tmp_path: Path) -> None:
    root = tmp_path / "models"
    shutil.copytree(repository / "simple", root / "simple")
    write_model(root, "broken", add_sub(), SIMPLE_CONFIG.replace("simple", "broken").replace("dims: 16", "dims: 17"))
    write_python(root, "forgets", FORGETS, CONFIG % "forgets")
    judged = {each.model: each for each in run(Request(subject=root)).sections}
    assert {name: each.passed for name, each in judged.items()} == {"broken": False, "forgets": False, "simple": True}
    assert [check.name for check in judged["broken"].checks if not check.passed] == ["it loads"]
    wrong = [check.name for check in judged["forgets"].checks if not check.passed]
    assert wrong == ["HTTP answers the same again", "gRPC answers the same"]


HUGGING_FACE = {
    "batch": "batch_size",
    "sequence": "sequence_length",
    "past": "past_sequence_length",
    "total": "past_sequence_length + sequence_length",
}


@pytest.mark.parametrize("names", [{}, HUGGING_FACE], ids=["ours", "Hugging Face's"])
@pytest.mark.parametrize("batches", ["", "max_batch_size: 1"])
def test_a_decoder_without_a_manifest_is_asked_what_its_axes_agree_on(
    repository: Path, tmp_path: Path, names: dict[str, str], batches: str
) -> None:
    version = tmp_path / "models/alone/1"
    shutil.copytree(repository / "live/1", version)
    (version / "manifest.json").unlink(missing_ok=True)
    graph = onnx.load(version / "model.onnx", load_external_data=False)
    for each in (*graph.graph.input, *graph.graph.output):
        for dim in each.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)
    onnx.save(graph, version / "model.onnx")
    if batches:
        (version.parent / "config.pbtxt").write_text(f'backend: "onnxruntime" {batches}')
    (judged,) = run(Request(subject=tmp_path / "models")).sections
    assert judged.passed, [check for check in judged.checks if not check.passed]


def test_an_axis_that_one_input_fixes_has_that_size_in_all(tmp_path: Path) -> None:
    narrowed = """
    input { name: "INPUT0" data_type: TYPE_INT32 dims: [ 5 ] }
    input { name: "INPUT1" data_type: TYPE_INT32 dims: [ -1 ] }
    output { name: "OUTPUT0" data_type: TYPE_INT32 dims: [ -1 ] }"""
    write_model(tmp_path, "narrowed", add_sub(("length",)), f'backend: "onnxruntime" {narrowed}')
    assert run(Request(subject=tmp_path)).passed


def test_a_warm_up_says_what_a_model_takes(repository: Path, tmp_path: Path) -> None:
    """A model that wants a number in a string refuses any other text."""
    root, config = tmp_path / "models", CONFIG % "counts"
    picky = SHOUT.replace("each.upper()", "str(int(each) + 1).encode()")
    write_python(root, "counts", picky, config)
    (judged,) = run(Request(subject=root)).sections
    assert not judged.passed
    assert "model_warmup" in next(check.needed for check in judged.checks if not check.passed)
    (root / "counts/warmup").mkdir()
    (root / "counts/warmup/seven").write_bytes(b"\x01\x00\x00\x007")
    given = '{ key: "TEXT" value { data_type: TYPE_STRING dims: [ 1 ] input_data_file: "seven" } }'
    (root / "counts/config.pbtxt").write_text(config + f'model_warmup [ {{ name: "w" batch_size: 1 inputs {given} }} ]')
    assert run(Request(subject=root)).passed


def test_the_command_leaves_three_documents(repository: Path, tmp_path: Path) -> None:
    told = command("validate", repository, "--report", tmp_path / "report", "--json")
    assert told.exit_code == 0
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["junit.xml", "report.html", "report.json"]
    assert json.loads(told.stdout)["models"][0]["model"] == "live"
    shown = command("validate", repository)
    assert shown.exit_code == 0
    assert "gRPC answers the same" in shown.stdout


def test_an_empty_directory_is_neither_artifact_nor_repository(tmp_path: Path) -> None:
    assert command("validate", tmp_path).exit_code == 2


def test_junit_counts_what_failed(found: Summary, tmp_path: Path) -> None:
    broken = _with_a_failure(found)
    validation.documents.write(broken, tmp_path)
    suites = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [each.get("name") for each in suites] == [section.model for section in broken.sections]
    for suite, section in zip(suites, broken.sections, strict=True):
        *cases, printed = suite
        assert {case.tag for case in cases} == {"testcase"}
        assert int(suite.get("tests", "")) == len(cases) == len(section.checks)
        assert printed.tag == "system-out"
        assert all(f"{check.name}: {check.found}" in (printed.text or "") for check in section.checks if check.passed)
        failures = [case for case in cases if case.find("failure") is not None]
        assert int(suite.get("failures", "")) == len(failures) == sum(not check.passed for check in section.checks)
    assert sum(len(case) for suite in suites for case in suite) == 1


def test_a_model_that_does_not_load_fails_in_a_table(tmp_path: Path) -> None:
    (write_model(tmp_path / "models", "bad", add_sub()) / "1/model.onnx").write_bytes(b"junk")
    told = command("validate", tmp_path / "models")
    assert told.exit_code == 1
    assert "not at all" in told.stdout
    assert "cannot load" in told.stdout


def test_every_document_says_that_a_model_of_a_gpu_ran_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    write_model(tmp_path / "models", "m", add_sub(), "instance_group { kind: KIND_GPU }")
    documents = tmp_path / "report"
    assert command("validate", tmp_path / "models", "--allow-cpu-fallback", "--report", documents).exit_code == 0
    for name in ("report.json", "junit.xml", "report.html"):
        assert "KIND_GPU, executed on the CPU by --allow-cpu-fallback" in (documents / name).read_text(), name


def test_the_page_needs_nothing_beside_it(found: Summary, tmp_path: Path) -> None:
    validation.documents.write(found, tmp_path)
    page = (tmp_path / "report.html").read_text()
    linked = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert linked
    assert all(link.startswith("#") for link in linked)
    assert "@import" not in page
    again = tmp_path / "again"
    validation.documents.write(found, again)
    assert (again / "report.html").read_text() == page


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize("failing", [False, True])
def test_a_browser_shows_verdicts_and_plots(found: Summary, failing: bool, tmp_path: Path) -> None:
    summary = _with_a_failure(found) if failing else found
    validation.documents.write(summary, tmp_path)
    page, picture = tmp_path / "report.html", tmp_path / "page.png"
    _browse(f"--screenshot={picture}", page)
    dom = _browse("--dump-dom", page)
    with Image.open(picture) as image:
        colours = {colour: count for count, colour in image.convert("RGB").getcolors(1 << 24)}
    assert colours.get(INK, 0) > 5000, "the plots are not drawn"
    assert colours.get(GREEN, 0) > 100
    assert (colours.get(RED, 0) > 100) is failing
    assert dom.count("<svg") == sum(_plots(section) for section in summary.sections)


def _browse(what: str, page: Path) -> str:
    profile = f"--user-data-dir={page.parent / 'profile'}"
    command = [str(CHROMIUM), *OPTIONS, profile, what, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _plots(section: Section) -> int:
    """Bounds and layers of what was compared, latencies of what was served."""
    return (1 + bool(section.answers.layers) if section.answers else 0) + (section.service is not None)


def _with_a_failure(found: Summary) -> Summary:
    """One check made to fail, with words that XML and HTML must escape."""
    first = found.sections[0]
    assert first.service is not None
    wrong = replace(first.service.checks[0], passed=False, found="<b>\x00 & more", needed="]]>")
    changed = Section(
        model=first.model,
        answers=first.answers,
        service=replace(first.service, checks=(wrong, *first.service.checks[1:])),
    )
    return replace(found, sections=(changed, *found.sections[1:]))
