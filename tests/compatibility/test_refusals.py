"""Where the matrix is asked: before anything is read, at publishing, at promotion, and as a server starts."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from repository.made import make_artifact, make_python, publish_proven, write_verdict

from nemoport import artifact, plugins
from nemoport.cli import main
from nemoport.compatibility import judge, runtime, triton, version
from nemoport.errors import MachineError, PolicyError, UsageError
from nemoport.exporters.convert import TARGETS
from nemoport.repository import labels, stamps, values
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.repository.regenerate import regenerate
from nemoport.repository.versions import evidence_of, state

SOURCE = Path(__file__).parent.parent / "data/megatron/megatron_lm/torch_dist_tp2"
RUNTIMES = ("tritonserver:26.07-trtllm", "trtllm:1.3", "tritonserver:26.07-py3", "nim:2.1")
INSTEAD = {
    "hf": "--to llmapi is loaded there",
    "onnx": "--to llmapi is loaded there",
    "trtllm": "--to hf or --to llmapi",
}


def elsewhere(target: str) -> str:
    """A runtime that loads no artifact of a target."""
    loads = plugins.load(TARGETS, target).LOADS
    return next(word for word in RUNTIMES if judge(target, loads, runtime(word)).refused)


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="nemoport")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("target", plugins.names(TARGETS))
def test_a_runtime_that_loads_no_such_artifact_is_refused_before_anything_is_read(target: str, tmp_path: Path) -> None:
    """The source is a pipe that nobody writes to: whoever opened it would wait for ever."""
    os.mkfifo(tmp_path / "source")
    ended = run("convert", tmp_path / "source", "--to", target, "--runtime", elsewhere(target), "-o", tmp_path / "made")
    assert ended.exit_code == 2
    assert "does not load in" in ended.stderr
    assert INSTEAD.get(target, "") in ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_method_that_the_runtime_lacks_is_refused_before_its_text_is_read(tmp_path: Path) -> None:
    for name in ("source", "text"):
        os.mkfifo(tmp_path / name)
    words = ["--to", "hf", "--quantize", "int4_awq", "--calib", tmp_path / "text", "-o", tmp_path / "made"]
    ended = run("convert", tmp_path / "source", *words, "--runtime", "vllm:0.24")
    assert ended.exit_code == 2
    assert "TensorRT-LLM 1.0 or later (PyTorch backend), and not vLLM" in ended.stderr


def test_what_only_the_model_says_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Its bfloat16, which ONNX Runtime takes later than other dtypes."""
    words = ["convert", SOURCE, "--to", "onnx", "-o", tmp_path / "made", "--runtime", "26.07"]
    ended = run(*words)
    assert ended.exit_code == 2
    assert "ONNX Runtime 1.31 or later loads it, and it has ONNX Runtime 1.27.0" in ended.stderr
    assert not list(tmp_path.iterdir())
    assert run(*words, "--dtype", "float32", "--dry-run").exit_code == 0


def test_a_conversion_says_where_it_loads(tmp_path: Path) -> None:
    words = ["convert", SOURCE, "--to", "trtllm", "-o", tmp_path / "made", "--dry-run", "--runtime"]
    told = json.loads(run(*words, "26.02", "--json").stdout)["runtime"]
    assert told == {
        "outcome": "needs",
        "place": "tritonserver:26.02-trtllm",
        "reason": "it has TensorRT-LLM 1.1.0",
        "first": "compile it with nemoport compile --to trtllm, in that release, and lay it out with "
        "nemoport layout inflight_batcher_llm, or convert with --to llmapi",
    }
    strange = run(*words, "27.01")
    assert strange.exit_code == 0
    assert "Warning: no row speaks of Triton 27.01" in strange.stderr
    assert "26.07" in strange.stderr
    assert "not known for tritonserver:27.01-trtllm" in strange.stdout


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("checkpoint") / "made"
    assert run("convert", SOURCE, "--to", "trtllm", "-o", made).exit_code == 0
    return made


def test_compiling_for_a_runtime_that_has_no_engines_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    run("convert", SOURCE, "--to", "trtllm", "-o", tmp_path / "made")
    (tmp_path / "made/rank0.safetensors").unlink()
    ended = run("compile", tmp_path / "made", "--to", "trtllm", "--runtime", "trtllm:1.3", "-o", tmp_path / "engines")
    assert ended.exit_code == 2
    assert "it has TensorRT-LLM 1.3" in ended.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


PROGRAMS = {
    "trtllm-build": "exit 9",
    "nvidia-smi": "echo ${SM:-9.0}",
    "python3": "echo ${RELEASE:-1.1.0}",
}


@pytest.mark.parametrize(
    ("found", "code", "said"),
    [
        ({}, 9, ""),
        ({"RELEASE": "1.2.1"}, 4, "tensorrt_llm is 1.2.1 here; tritonserver:26.02-trtllm loads what 1.1.0 built"),
        ({"SM": "8.0"}, 4, "sm is 80 here; run this on the GPU that is meant"),
    ],
)
def test_a_job_for_a_runtime_builds_with_its_release_on_its_gpu_alone(
    found: dict[str, str], code: int, said: str, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    for name, line in PROGRAMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    words = ["--to", "trtllm", "--runtime", "tritonserver:26.02-trtllm@h100", "-o", tmp_path / "engines", "--job"]
    assert run("compile", checkpoint, *words).exit_code == 0
    job = tmp_path / "engines.job"
    assert "nvcr.io/nvidia/tritonserver:26.02-trtllm-python-py3" in (job / "Dockerfile").read_text()
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", job / "build.sh"], env={**os.environ, "PATH": path, **found}, capture_output=True, text=True
    )
    assert (ended.returncode, said in ended.stderr) == (code, True), ended.stderr


def altered(directory: Path, **facts: Any) -> Path:
    """The same artifact with another stamp."""
    artifact.write_manifest(directory, replace(artifact.read_manifest(directory), **facts))
    return directory


def test_a_new_model_is_declared_for_the_oldest_release_that_loads_it(tmp_path: Path) -> None:
    for name, loads, release in (
        ("new", "ONNX Runtime 1.23 or later", "25.08"),
        ("old", "ONNX Runtime 1.17 or later", "24.10"),
    ):
        publish(altered(make_artifact(tmp_path / name), loads=(loads,)), tmp_path / "repository", name)
        assert stamps.declared(state(tmp_path / "repository", name).model) == triton(release)


@pytest.mark.parametrize(
    ("word", "error", "way_out"),
    [
        ("25.07", PolicyError, "the oldest release that loads it is 25.08"),
        ("tritonserver:26.07-vllm", PolicyError, "it has no ONNX Runtime"),
        ("nim:2.1", UsageError, "is no release of Triton"),
        ("24.01", UsageError, "needs 24.10 or later"),
    ],
)
def test_publishing_for_a_release_that_does_not_load_it_is_refused(
    word: str, error: type[Exception], way_out: str, tmp_path: Path
) -> None:
    """Before any of its files is read: they are not there."""
    made = altered(make_artifact(tmp_path / "made"), loads=("ONNX Runtime 1.23 or later",))
    (made / "model.onnx.data").unlink()
    if word == "24.01":
        altered(made, loads=("ONNX Runtime 1.17 or later",))
    with pytest.raises(error, match=way_out):
        publish(made, tmp_path / "repository", "m", runtime=runtime(word))
    assert not (tmp_path / "repository").exists()


def test_a_second_version_must_load_where_the_model_is_declared_for(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    publish_proven(make_artifact(tmp_path / "a1"), repository)
    newer = altered(make_artifact(tmp_path / "a2", seed=2), loads=("ONNX Runtime 1.23 or later",))
    with pytest.raises(PolicyError, match=r"it has ONNX Runtime 1\.19\.2"):
        publish(newer, repository, "m")
    with pytest.raises(UsageError, match=r"is declared for Triton 24\.10"):
        publish(newer, repository, "m", runtime=triton("25.08"))
    regenerate(repository, "m", runtime=triton("25.08"))
    assert publish_proven(newer, repository) == 2
    with pytest.raises(PolicyError, match="version 2 of m is live"):
        regenerate(repository, "m", runtime=triton("25.07"))


def test_promotion_verifies_the_stamp(tmp_path: Path) -> None:
    """Whatever became of the manifest, or of the release that the model is declared for, since it was published."""
    repository = tmp_path / "repository"
    publish_proven(make_artifact(tmp_path / "a1"), repository)
    evidence = publish(make_artifact(tmp_path / "a2", seed=2), repository, "m").evidence
    for stamp, reason in (
        ({"loads": ("ONNX Runtime 1.23 or later",)}, "it has ONNX Runtime 1.19.2"),
        ({"loads": ("vLLM",)}, "what loads it is vLLM"),
        ({"loads": ("ONNX Runtime 1.17",), "built_with": {"onnxruntime": "1.31.1"}}, "it was built with ONNX Runtime"),
    ):
        write_verdict(altered(evidence, **{"built_with": {}, **stamp}))
        with pytest.raises(PolicyError, match=reason):
            promote(repository, "m", force=True)
        with pytest.raises(PolicyError, match=reason):
            labels.label(repository, "m", "new", "2")
    write_verdict(altered(evidence, loads=("ONNX Runtime 1.19",), built_with={}))
    place = repository / "m" / values.FILE
    place.write_text(place.read_text().replace('"24.10"', '"25.08"').replace("'24.10'", "'25.08'"))
    with pytest.raises(PolicyError, match=r"declared for Triton 25\.08: it does not load"):
        promote(repository, "m")
    regenerate(repository, "m", runtime=triton("24.10"))
    assert promote(repository, "m").live == (1, 2)


HERE = {"onnxruntime": version("1.31.1"), "tensorrt_llm": None}


@pytest.mark.parametrize(
    ("stamp", "reason"),
    [
        ({"loads": ("ONNX Runtime 1.40 or later",)}, "this machine has ONNX Runtime 1.31.1"),
        ({"loads": ("ONNX Runtime 1.20",)}, "this machine has ONNX Runtime 1.31.1"),
        (
            {"loads": ("TensorRT-LLM 1.1.0 on GPUs of SM 90",), "built_with": {"tensorrt_llm": "1.1.0", "sm": 90}},
            "built with TensorRT-LLM 1.1.0, and this machine has none",
        ),
        ({"loads": ("ONNX Runtime 1.17 or later on GPUs of SM 90",)}, "has no GPU that can be asked"),
        ({"built_with": {"onnxruntime": "1.16.0"}}, "says that ONNX Runtime 1.17 or later loads it"),
    ],
)
def test_serving_verifies_the_stamp_of_what_is_live(stamp: dict[str, Any], reason: str, tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    publish_proven(make_artifact(tmp_path / "a1"), repository)
    publish(make_artifact(tmp_path / "a2", seed=2), repository, "m")
    altered(evidence_of(repository, "m") / "2", loads=("ONNX Runtime 1.99 or later",))
    stamps.admit(repository / "m", HERE, ())  # what is staged is not served
    altered(evidence_of(repository, "m") / "1", **stamp)
    with pytest.raises(MachineError, match=reason):
        stamps.admit(repository / "m", HERE, ())


def test_a_server_refuses_a_version_of_another_machine_as_it_starts(tmp_path: Path) -> None:
    repository, quiet = tmp_path / "repository", ["--allow-grpc", "false", "--allow-metrics", "false"]
    publish_proven(make_python(tmp_path / "a1"), repository)
    altered(evidence_of(repository, "m") / "1", built_with={"tensorrt_llm": "1.1.0", "sm": 90})
    ended = CliRunner().invoke(main, ["serve", str(repository), "--http-port", "0", *quiet])
    assert ended.exit_code != 0
    assert "version 1 of m is not for this machine: it was built with TensorRT-LLM 1.1.0" in ended.output


def test_what_nobody_published_is_served_unasked(tmp_path: Path) -> None:
    (tmp_path / "repository/m/1").mkdir(parents=True)
    stamps.admit(tmp_path / "repository/m", HERE, ())


def test_check_judges_artifacts_and_what_is_served(tmp_path: Path) -> None:
    made = altered(make_artifact(tmp_path / "made"), loads=("ONNX Runtime 1.23 or later",))
    publish_proven(made, tmp_path / "repository")
    for subject, code in ((made, "NP906"), (tmp_path / "repository", "NP808")):
        found = run("check", subject, "--runtime", "tritonserver:25.07", "--format", "json")
        assert [each["code"] for each in json.loads(found.stdout)["findings"]] == [code]
        assert found.exit_code == 1
        assert run("check", subject, "--triton-release", "25.08").exit_code == 0
    altered(made, built_with={"onnxruntime": "1.22.0"})
    assert "NP905" in run("check", made).stdout
    assert run("check", tmp_path / "repository", "--runtime", "nim:2.1").exit_code == 2
