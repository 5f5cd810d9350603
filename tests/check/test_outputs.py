"""What the command prints, and its exit codes; artifacts; and what nemoport itself publishes, which has no finding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from repository.made import make_artifact, publish_proven, write_verdict
from sarif_pydantic import Sarif

from nemoport import artifact, plugins
from nemoport.check import Request, check
from nemoport.check.subject import Target
from nemoport.check.table import TABLE
from nemoport.cli import main
from nemoport.compatibility import triton
from nemoport.errors import UnsupportedInput
from nemoport.exporters.methods import ENGINES
from nemoport.repository.kinds import KINDS
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish

from .cases import PLAN, write

SOURCE = Path(__file__).parent.parent / "data/megatron/megatron_lm/torch_dist_tp2"
TARGETS = sorted(plugins.load_all("nemoport.exporters.targets").keys() - {"tokenizer"})
"""All that write weights; `tests/test_text_ensemble.py` has the other."""
SAID = {"torchscript": {"attn_mask_type": "padding"}}
"""Of the source, for targets of encoders: it sees both ways."""


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="nemoport")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("target", TARGETS)
def test_what_nemoport_writes_and_publishes_has_no_finding(target: str, tmp_path: Path) -> None:
    """But for the tokenizer that the source has not, where an engine needs one."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SAID.get(target, {})))
    narrow = ["--dtype", "float32"] if target == "onnx" else []  # no Triton has an ONNX Runtime for bfloat16 yet
    run("convert", SOURCE, "--config", config, "--to", target, *narrow, "-o", tmp_path / "made")
    assert check(Request(directory=tmp_path / "made")).passed
    repository = tmp_path / "repository"
    try:
        published = publish(tmp_path / "made", repository, "m")
    except UnsupportedInput:
        assert target not in KINDS
        return
    write_verdict(published.evidence)
    promote(repository, "m")
    publish(make_artifact(tmp_path / "other"), repository, "n")
    for gpus in (None, 0, 1):
        report = check(Request(directory=repository, target=Target(gpus), runtime=triton("26.07")))
        assert [each.code for each in report.findings] == (["NP215"] if target in ENGINES else [])


def test_the_exit_code_is_1_for_errors_only(tmp_path: Path) -> None:
    write(tmp_path)
    assert run("check", tmp_path, "--model", "plan").exit_code == 0
    assert run("check", tmp_path, "--model", "v2-too").exit_code == 0
    assert run("check", tmp_path, "--model", "renamed").exit_code == 1
    assert run("check", tmp_path / "renamed").exit_code == 1
    assert run("check", tmp_path, "--model", "nope").exit_code == 2
    assert run("check", tmp_path / "nope").exit_code == 2
    assert run("check", tmp_path, "--target", "tpu").exit_code == 2
    assert run("check", tmp_path, "--triton-release", "2.51").exit_code == 2


def test_hardware_and_release_are_judged_when_they_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    for name, flags in (
        ("gpu", ["--target", "cpu"]),
        ("newer-field", ["--triton-release", "24.10"]),
        ("auto-with-gpus", ["--target", "cpu"]),
        ("tensorrt", ["--target", "cpu"]),
    ):
        assert run("check", tmp_path, "--model", name).exit_code == 0
        assert run("check", tmp_path, "--model", name, *flags).exit_code == 1
    assert run("check", tmp_path, "--model", "gpu", "--target", "gpu:1").exit_code == 0
    assert run("check", tmp_path, "--model", "newer-field", "--triton-release", "24.11").exit_code == 0


def test_accelerators_for_gpus_are_judged_where_a_gpu_may_execute(tmp_path: Path) -> None:
    write(tmp_path)
    for name, flags, code in (
        ("accelerator-of-gpus", [], 1),
        ("accelerator-of-gpus", ["--target", "gpu:1"], 1),
        ("accelerator-of-gpus", ["--target", "cpu"], 0),
        ("accelerator-of-no-use", ["--target", "gpu:1"], 0),
        ("accelerators", ["--target", "gpu:1"], 0),
    ):
        assert run("check", tmp_path, "--model", name, *flags).exit_code == code, name


def test_repo_check_is_the_same(tmp_path: Path) -> None:
    write(tmp_path, "plan", "renamed")
    assert run("repo", "check", tmp_path).stdout == run("check", tmp_path).stdout


def test_a_line_names_the_place_the_code_and_the_fix(tmp_path: Path) -> None:
    write(tmp_path)
    first = run("check", tmp_path, "--model", "unknown-type").stdout.splitlines()[0]
    assert first.startswith(f"{tmp_path}/unknown-type/config.pbtxt:3:30: error NP105: ")
    assert first.endswith("; fix: write TYPE_FP32")


def test_json_is_one_object(tmp_path: Path) -> None:
    write(tmp_path)
    found = json.loads(run("check", tmp_path, "--model", "unknown-type", "--json", "--fix").stdout)
    assert found["errors"] == 0
    assert [each["file"] for each in found["repaired"]] == ["unknown-type/config.pbtxt"]
    row = json.loads(run("check", tmp_path, "--model", "renamed", "--json").stdout)["findings"][0]
    assert set(row) == {"code", "severity", "model", "file", "line", "column", "found", "needed", "fix", "repair"}


def test_sarif_is_2_1_0(tmp_path: Path) -> None:
    write(tmp_path)
    answer = run("check", tmp_path, "--target", "cpu", "--format", "sarif")
    assert answer.exit_code == 1
    log = Sarif.model_validate_json(answer.stdout, strict=False)
    assert extra(log) == ["columnKind"]  # section 3.14.17; the package does not know it
    (found,) = log.runs
    rules = [rule.id for rule in found.tool.driver.rules or []]
    assert {result.rule_id for result in found.results or []} == set(rules) <= set(TABLE)
    for result in found.results or []:
        assert rules[result.rule_index or 0] == result.rule_id


def extra(value: Any) -> list[str]:
    """Names in the log that SARIF does not have."""
    if isinstance(value, list):
        return [name for each in value for name in extra(each)]
    if not hasattr(value, "model_extra"):
        return []
    inside = [name for field in type(value).model_fields for name in extra(getattr(value, field))]
    return [*(value.model_extra or {}), *inside]


@pytest.mark.parametrize("harm", ["missing", "changed", "cut"])
def test_an_artifact_that_is_not_whole(harm: str, tmp_path: Path) -> None:
    made = make_artifact(tmp_path / "made")
    assert check(Request(directory=made)).findings == ()
    weights = made / "model.onnx.data"
    content = weights.read_bytes()
    weights.write_bytes({"missing": b"", "changed": bytes(len(content)), "cut": content[:-1]}[harm])
    if harm == "missing":
        weights.unlink()
    (finding,) = check(Request(directory=made)).findings
    assert finding.code == "NP902"
    assert "model.onnx.data" in finding.found


def test_a_config_is_compared_with_the_manifest_of_what_was_published(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    publish_proven(make_artifact(tmp_path / "made"), repository)
    config = repository / "m/config.pbtxt"
    config.write_text(config.read_text().replace("TYPE_INT64", "TYPE_INT32"))
    (repository / "m/1/model.onnx").unlink()
    found = check(Request(directory=repository)).findings
    assert [(each.code, artifact.MANIFEST in each.found) for each in found if each.code == "NP604"] == [("NP604", True)]


def test_ranks_and_tokenizers(tmp_path: Path) -> None:
    version = tmp_path / "m/1"
    version.mkdir(parents=True)
    (tmp_path / "m/config.pbtxt").write_text(PLAN.replace("pytorch", "tensorrtllm"))
    (version / "config.json").write_text('{"mapping": {"world_size": 2, "tp_size": 2, "pp_size": 1}}')
    (version / "rank0.safetensors").touch()
    codes = {each.code: each for each in check(Request(directory=tmp_path, target=Target(1))).findings}
    assert set(codes) == {"NP216", "NP806"}
    assert "rank1" in codes["NP216"].found
    (version / "rank1.safetensors").touch()
    assert check(Request(directory=tmp_path, target=Target(2))).findings == ()
    weights = version / "weights"
    weights.mkdir()
    (weights / "config.json").write_text("{}")
    (weights / "model.safetensors").touch()
    (finding,) = check(Request(directory=tmp_path)).findings
    assert (finding.code, finding.file) == ("NP215", "m/1/weights")
    (weights / "tokenizer.json").touch()
    assert check(Request(directory=tmp_path)).findings == ()


def test_another_config_of_a_model_is_judged_as_well(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "canary/configs/canary.pbtxt").write_text(PLAN + "version_policy { specific { versions: 7 } }")
    found = check(Request(directory=tmp_path, model="canary")).findings
    assert {(each.code, each.file) for each in found} == {
        (code, "canary/configs/canary.pbtxt") for code in ("NP203", "NP205")
    }
