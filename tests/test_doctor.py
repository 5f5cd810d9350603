"""What a machine can do follows from what it has, and every verb and target is told of."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from nemoport import doctor, plugins
from nemoport.cli import main
from nemoport.compilers.compile import BUILDERS
from nemoport.exporters.convert import TARGETS

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
EVERYTHING = doctor.Machine(
    python="3.11.7",
    packages=dict.fromkeys(doctor.PACKAGES, "1.2") | {"onnxruntime": "1.31.1"},
    providers=(),
    gpus=1,
    sms=(90,),
    disk_free=0,
)


def test_every_verb_and_every_target_is_told_of() -> None:
    told = [ability.what for ability in doctor.ABILITIES]
    assert len(set(told)) == len(told)
    assert {what.split()[0] for what in told} >= set(main.commands)
    for target in plugins.names(TARGETS):
        assert f"convert --to {target}" in told
    for builder in plugins.names(BUILDERS):
        assert f"compile --to {builder}" in told


def test_a_machine_with_everything_can_do_everything() -> None:
    assert all(verdict.ok for verdict in doctor.judge(EVERYTHING))


@pytest.mark.parametrize("package", doctor.PACKAGES)
def test_a_package_that_is_missing_is_named_with_what_adds_it(package: str) -> None:
    lacking = replace(EVERYTHING, packages={**EVERYTHING.packages, package: None})
    without = [verdict for verdict in doctor.judge(lacking) if not verdict.ok]
    assert [verdict.what for verdict in without] == [each.what for each in doctor.ABILITIES if package in each.needs]
    for verdict in without:
        assert (verdict.missing, verdict.way_out) == ((package,), (doctor.PACKAGES[package].added_by,))


def test_the_extras_that_it_names_exist() -> None:
    known = set(tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"])
    named = {each.added_by.split("[")[1].split("]")[0] for each in doctor.PACKAGES.values() if "[" in each.added_by}
    assert named <= known


def test_without_a_gpu_the_engines_are_not_ok() -> None:
    without = [verdict for verdict in doctor.judge(replace(EVERYTHING, gpus=0)) if not verdict.ok]
    assert {verdict.what for verdict in without} == {each.what for each in doctor.ABILITIES if each.gpu}
    assert {verdict.missing for verdict in without} == {("a GPU",)}


def test_it_says_what_is_here_and_imports_none_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
    assert found["machine"]["packages"]["tritonclient"] == metadata.version("tritonclient")
    assert "CPUExecutionProvider" in found["machine"]["providers"]
    assert found["machine"]["gpus"] == 0
    assert {row["what"] for row in found["abilities"]} == {each.what for each in doctor.ABILITIES}
    program = (
        "import sys; from nemoport.cli import main; main(['doctor'], standalone_mode=False); "
        f"print(sorted(set({[*doctor.PACKAGES]!r}) & set(sys.modules)), file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert ended.stderr.strip() == "[]"
    assert "convert --to hf" in ended.stdout


def test_a_release_that_is_too_new_or_too_old_is_no_release_at_all() -> None:
    other = {"onnxruntime": "1.22.0", "tensorrt_llm": "1.3.0"}
    machine = replace(EVERYTHING, packages={**EVERYTHING.packages, **other})
    found = {verdict.what: verdict for verdict in doctor.judge(machine) if not verdict.ok}
    assert found.keys() == {"serve onnx", "serve text from onnx", "compile --to trtllm"}
    assert "this machine has TensorRT-LLM 1.3.0" in found["compile --to trtllm"].way_out[0]
    assert "tritonserver:26.07-trtllm-python-py3" in found["compile --to trtllm"].way_out[0]
    assert found["serve onnx"].missing == ("another release",)
