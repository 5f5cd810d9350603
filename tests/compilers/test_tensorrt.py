"""`compile --to tensorrt`, as far as a machine without TensorRT can tell: the programs against TensorRT's signatures,
the graphs against what its parser takes, profiles against what ONNX Runtime runs, and the job up to where it lacks."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from exporters.commands import command, sentence
from families.test_conformance import unwritten
from families.test_stages import PP, SPECS, Graph, every_kind_of_model, loaded, places
from onnx import TensorProto, helper
from repository.made import write_verdict
from tritonserver import tritonserver
from validation.small import write

from nemoport import artifact
from nemoport.compilers import graphs as graphs_of
from nemoport.compilers import machine, onnx_parser, profiles
from nemoport.compilers.builders import tensorrt as builder
from nemoport.compilers.profiles import Bounds
from nemoport.errors import DamagedInput, MachineError, UsageError
from nemoport.exporters.targets import onnx as target
from nemoport.repository import config
from nemoport.runner.model import LoadOptions, load_version
from nemoport.spec import ModelSpec, Plan
from nemoport.validation import Request, validate

ROOT = Path(__file__).parents[2]
RECORDED = {path.name.removesuffix(".pyi.txt"): path for path in (ROOT / "tests/data/tensorrt").glob("*.pyi.txt")}
PROGRAMS = [ROOT / "nemoport/templates/job/build_plan.py", ROOT / "nemoport/runner/plans.py"]
LACKING = pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has what is to be missing")


def judged(programs: list[Path], version: str, room: Path) -> str:
    """What mypy says of them beside the recorded signatures."""
    shutil.copy(RECORDED[version], room / "tensorrt.pyi")
    how = ["--config-file=", "--strict", "--no-warn-unused-ignores", "--follow-imports=skip", "--cache-dir", str(room)]
    ended = subprocess.run(
        [sys.executable, "-m", "mypy", *how, *map(str, programs)],
        env={**os.environ, "MYPYPATH": str(room)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode == 0) == ended.stdout.startswith("Success"), ended.stdout + ended.stderr
    return "" if ended.returncode == 0 else ended.stdout


@pytest.mark.parametrize("version", RECORDED)
def test_the_programs_use_tensorrt_as_its_own_signatures_say(version: str, tmp_path: Path) -> None:
    assert {each.partition(".")[0] for each in RECORDED} == {"10", "11"}
    assert judged(PROGRAMS, version, tmp_path) == ""


def test_a_program_that_uses_it_otherwise_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    text = PROGRAMS[0].read_text()
    assert "profile.set_shape(name, least" in text
    wrong.write_text(text.replace("profile.set_shape(name, least", "profile.set_shape(least").replace("REFIT", "FP16"))
    found = judged([wrong], "11.4.0.106", tmp_path)
    assert '"set_shape"' in found
    assert "FP16" in found


def graphs(spec: ModelSpec, directory: Path, **plan: Any) -> Iterator[onnx.ModelProto]:
    output = target.output(unwritten(spec, directory), Plan(**plan))
    for place, _ in places(output):
        yield onnx.load_from_string(output.sidecars[f"{place}{target.GRAPH}"])


@pytest.mark.parametrize("plan", [{"dtype": "float32"}, {"dtype": "bfloat16", "pp": PP}], ids=["whole", "stages"])
@every_kind_of_model
def test_the_parser_takes_every_graph(spec: ModelSpec, plan: dict[str, Any], tmp_path: Path) -> None:
    for graph in graphs(spec, tmp_path, **plan):
        assert list(onnx_parser.refusals(graph)) == []


def test_no_operator_is_younger_than_the_release_that_is_asked_for() -> None:
    youngest = max(row.since for row in onnx_parser.OPERATORS.values())
    assert youngest == (10, 15)
    for version, accepted in (("10.14.1.48", False), ("10.15.1.29", True), ("10.16.1.11", True), ("11.4.0.106", True)):
        assert machine.accepts(builder.RELEASE, version) == accepted


def small(*nodes: onnx.NodeProto, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(name, dtype, [2, 3]) for name in "xy")
    axes = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    given = helper.make_tensor_value_info("given", TensorProto.INT64, [1])
    graph = helper.make_graph(nodes, "small", [x, given], [y], [axes])
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    )


REFUSED = {
    "is com.microsoft.QuickGelu": small(helper.make_node("QuickGelu", ["x"], ["y"], name="n", domain="com.microsoft")),
    "is Mod": small(helper.make_node("Mod", ["x", "x"], ["y"], name="n", fmod=1)),
    "takes x in INT64": small(helper.make_node("CumSum", ["x", "axes"], ["y"], name="n"), dtype=TensorProto.INT64),
    "takes given, which is not known before it runs": small(
        helper.make_node("ReduceSum", ["x", "given"], ["y"], name="n", keepdims=0)
    ),
    "has 6 inputs, of which it takes 4": small(helper.make_node("Attention", ["x"] * 6, ["y"], name="n")),
    "says softcap": small(helper.make_node("Attention", ["x"] * 4, ["y"], name="n", softcap=3.0)),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_the_parser_does_not_take_is_seen(said: str) -> None:
    (found,) = onnx_parser.refusals(REFUSED[said])
    assert said in found


PROFILED = {name: spec for name, spec in SPECS.items() if name.startswith(("bert", "nemotron_h", "deepseek", "gemma2"))}
PROFILED = {
    name: spec for name, spec in PROFILED.items() if "plain" in name or "matryoshka" in name or "types 3" in name
}


@pytest.mark.parametrize("spec", PROFILED.values(), ids=PROFILED)
def test_the_graph_runs_at_every_corner_of_its_profile(spec: ModelSpec, tmp_path: Path) -> None:
    """ONNX Runtime finds shapes that do not fit each other."""
    output = target.output(unwritten(spec, tmp_path), Plan(dtype="float32"))
    (graph,) = loaded(output, tmp_path)
    known = profiles.bounds(graph.signature, spec.longest, ["batch=1:2:3"])
    shapes = profiles.shapes(graph.signature, known)
    for corner in range(3):
        graph({name: filled(graph, name, shape[corner]) for name, shape in shapes.items()})
    for least, best, most in shapes.values():
        assert all(a <= b <= c for a, b, c in zip(least, best, most, strict=True))
    most_tokens = known["total" if "total" in known else "sequence"].most
    assert most_tokens <= spec.longest


def filled(graph: Graph, name: str, shape: list[int]) -> Any:
    (tensor,) = [tensor for tensor in graph.signature.inputs if tensor.name == name]
    return np.ones(shape, tensor.dtype)


def test_of_a_long_model_the_profile_is_as_usual_and_of_a_short_one_less() -> None:
    decoder = target.output(unwritten(PROFILED["deepseek megatron 0 plain"], Path()), Plan(dtype="float32")).signature
    assert decoder
    assert profiles.bounds(decoder, 10**5, ()) == {
        "batch": Bounds(1, 1, 8),
        "sequence": Bounds(1, 1, 512),
        "past": Bounds(0, 512, 1536),
        "total": Bounds(1, 513, 2048),
    }
    assert profiles.bounds(decoder, 40, ())["total"].most == 40
    given = profiles.bounds(decoder, 40, ["sequence=1:4:30", "past=0:5:10"])
    assert given["total"] == Bounds(1, 9, 40)


@pytest.mark.parametrize(
    "given, said",
    [
        ("total=1:2:3", "bounds no axis of the model, which has batch, sequence, past"),
        ("batch=1:2", "does not say batch=LEAST:BEST:MOST"),
        ("batch=a:b:c", "does not say batch=LEAST:BEST:MOST"),
        ("batch=4:2:8", "does not rise"),
        ("sequence=0:1:2", "does not rise from 1"),
        ("sequence=1:2:77", "the model takes 77; say --axis sequence=LEAST:BEST:MOST and past="),
    ],
)
def test_bounds_that_cannot_be_are_refused(given: str, said: str) -> None:
    signature = target.output(unwritten(PROFILED["deepseek megatron 0 plain"], Path()), Plan(dtype="float32")).signature
    assert signature
    with pytest.raises(UsageError, match=said):
        profiles.bounds(signature, 77, [given])
    with pytest.raises(UsageError, match="--axis batch is given twice"):
        profiles.bounds(signature, 77, ["batch=1:1:4", "batch=1:1:8"])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("plans")
    write(room / "source", hidden_size=32, head_dim=16, intermediate_size=64)
    done(command("convert", room / "source", "--to", "onnx", "--dtype", "float16", "-o", room / "made"))
    return room / "made"


def done(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return result


@LACKING
def test_without_tensorrt_the_job_is_left_and_says_what_it_lacks(made: Path, tmp_path: Path) -> None:
    flags = ("--refit", "--version-compatible", "--workspace", 512, "--builder-optimization-level", 4)
    told = command("compile", made, "--to", "tensorrt", *flags, "--axis", "batch=1:2:4", "-o", tmp_path / "plan")
    assert told.exit_code == 4
    assert "cannot build it: it has no tensorrt" in sentence(told.stderr)
    job = tmp_path / "plan.job"
    ended = subprocess.run(["bash", job / "build.sh"], capture_output=True, text=True, check=False)
    assert ended.returncode == 4
    assert "nvidia-smi is not on PATH" in sentence(ended.stderr)
    settings = json.loads((job / "settings.json").read_text())
    assert settings["flags"] == ["refit", "version_compatible"]
    assert (settings["workspace"], settings["optimization_level"]) == (512 << 20, 4)
    assert settings["shapes"]["input_ids"] == [[1, 1], [2, 1], [4, 16]]
    assert settings["shapes"]["past_key_values.0.key"] == [[1, 2, 0, 16], [2, 2, 48, 16], [4, 2, 48, 16]]
    assert settings["shapes"]["attention_mask"] == [[1, 1], [2, 49], [4, 64]]


@LACKING
def test_the_line_for_trtexec_says_the_same(made: Path, tmp_path: Path) -> None:
    done(command("convert", made.with_name("source"), "--to", "onnx", "--pp", 2, "-o", tmp_path / "staged"))
    command("compile", tmp_path / "staged", "--to", "tensorrt", "--refit", "--job", "-o", tmp_path / "plan")
    job = tmp_path / "plan.job"
    for number, line in enumerate((job / "trtexec.sh").read_text().splitlines()):
        words = dict(word.partition("=")[::2] for word in shlex.split(line)[1:])
        assert words["--onnx"] == f"artifact/stage{number}/model.onnx"
        assert (job / words["--onnx"]).is_file()
        assert words.keys() >= {"--stronglyTyped", "--noTF32", "--refit", "--timingCacheFile"}
        shapes = json.loads((job / f"stage{number}/settings.json").read_text())["shapes"]
        for at, flag in enumerate(("--minShapes", "--optShapes", "--maxShapes")):
            said = dict(each.split(":") for each in words[flag].split(","))
            assert {name: [int(size) for size in text.split("x")] for name, text in said.items()} == {
                name: shape[at] for name, shape in shapes.items()
            }


def test_graphs_that_the_parser_refuses_are_refused_before_anything_is_built(made: Path, tmp_path: Path) -> None:
    said = []
    for method, profile, code in (("int8", "portable", 0), ("int8_dynamic", "portable", 3), ("int8", "ort", 3)):
        place, how = tmp_path / f"{method} {profile}", ("--to", "onnx", "--quantize", method, "--profile", profile)
        done(command("convert", made.with_name("source"), *how, "--dtype", "float32", "-o", place))
        told = command("compile", place, "--to", "tensorrt", "--dry-run", "-o", tmp_path / "plan")
        assert told.exit_code == code, told.stderr
        said.append(told.stderr)
    assert "in place of --quantize int8_dynamic with int8" in sentence(said[1])
    assert "com.microsoft.MatMulNBits, for which it has no importer" in sentence(said[2])
    assert not (tmp_path / "plan.job").exists()
    done(command("compile", made, "--to", "onnxruntime", "-o", tmp_path / "optimized"))
    again = command("compile", tmp_path / "optimized", "--to", "tensorrt", "-o", tmp_path / "plan")
    assert "was compiled already" in sentence(again.stderr)


VERSION = "11.4.0.106"
BUILDS = """#!/usr/bin/env bash
[[ "$1" == -c ]] && exec {python} "$@"
graph="$2" plan="$3" settings="$4" cache="$5"
[[ -f $graph && -f $settings ]] || exit 1
mkdir -p "$(dirname "$plan")"
{{ printf ftrt; cat "$graph"; }} > "$plan"
printf timings >> "$cache"
"""


@pytest.fixture
def equipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose programs are stood in for: of a plan it makes the first bytes, so that what is around the build
    is walked to its end."""
    room = tmp_path / "equipped"
    installed = room / f"tensorrt-{VERSION}.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text(f"Name: tensorrt\nVersion: {VERSION}\n")
    (room / "tensorrt.py").write_text(f"__version__ = {VERSION!r}\n")
    programs = {"nvidia-smi": "#!/bin/sh\necho 9.0\n", "python3": BUILDS.format(python=sys.executable)}
    for name, text in programs.items():
        (room / name).write_text(text)
        (room / name).chmod(0o755)
    monkeypatch.syspath_prepend(room)
    monkeypatch.setenv("PYTHONPATH", f"{room}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(machine, "path", lambda: f"{room}:{os.environ['PATH']}")
    return room


def test_around_the_build_everything_is_walked_to_its_end(equipped: Path, made: Path, tmp_path: Path) -> None:
    cache = tmp_path / "timings"
    built = tmp_path / "plan"
    how = ("--to", "tensorrt", "--axis", "batch=1:1:4", "--timing-cache", cache)
    done(command("compile", made, *how, "-o", built))
    found = artifact.read_manifest(built)
    artifact.verify(built, found)
    assert (found.kind, found.built_with) == ("tensorrt", {"tensorrt": "11.4.0.106", "sm": 90})
    assert found.loads == ("TensorRT 11.4.0.106 on GPUs of SM 90",)
    assert found.signature == artifact.read_manifest(made).signature
    assert cache.read_bytes() == b"timings"
    done(command("compile", made, *how, "--version-compatible", "-o", tmp_path / "other"))
    assert (
        artifact.read_manifest(tmp_path / "other").loads[0].startswith("TensorRT 11.4.0.106 to 11.x on GPUs of SM 90 ")
    )
    assert cache.read_bytes() == b"timingstimings"

    models = tmp_path / "models"
    done(command("publish", built, "--model-repository", models, "--name", "m"))
    staged = next(models.with_name("models.staging").glob("m/config.pbtxt"))
    told = config.parse(staged.read_text(), "m")
    assert (told.max_batch_size, told.backend) == (4, "tensorrt")
    assert told.tuning["instance_group"] == [{"count": 1, "kind": "KIND_GPU"}]
    more = command("publish", built, "--model-repository", models, "--name", "n", "--max-batch-size", 6)
    assert "more than the 4 that the plan was built for" in sentence(more.stderr)


def test_a_real_tritonserver_takes_the_config_of_a_plan(equipped: Path, made: Path, tmp_path: Path) -> None:
    """Up to the GPU that it lacks."""
    built, models = tmp_path / "plan", tmp_path / "models"
    done(command("compile", made, "--to", "tensorrt", "-o", built))
    write_verdict(built)
    done(command("publish", built, "--model-repository", models, "--name", "m", "--promote"))
    path = models / "m/config.pbtxt"
    path.write_text(path.read_text().replace("kind: KIND_GPU", "kind: KIND_CPU"))
    with tritonserver(models) as server:
        assert server.index() == {("m", "1"): "READY"}


def test_a_product_that_is_no_plan_is_refused(tmp_path: Path, made: Path) -> None:
    parts = graphs_of.parts(made, artifact.read_manifest(made))
    with pytest.raises(DamagedInput, match="cannot be read"):
        builder.check(tmp_path, {}, parts)
    (tmp_path / "model.plan").write_bytes(b"ONNX")
    with pytest.raises(DamagedInput, match="begins with b'ONNX', and a plan with b'ftrt'"):
        builder.check(tmp_path, {}, parts)


@pytest.mark.parametrize("spoil, said", [(None, "KIND_GPU but no GPUs are available"), ("cpu", "runs on GPUs alone")])
def test_the_runner_says_what_it_lacks_for_a_plan(
    spoil: str | None, said: str, equipped: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done(command("compile", made, "--to", "tensorrt", "-o", tmp_path / "plan"))
    write_verdict(tmp_path / "plan")
    done(command("publish", tmp_path / "plan", "--model-repository", tmp_path / "models", "--name", "m", "--promote"))
    with pytest.raises(MachineError, match=said):
        load_version(tmp_path / "models/m", "1", LoadOptions(allow_cpu_fallback=spoil == "cpu"))
    with pytest.raises(MachineError, match=said):
        validate(Request(subject=tmp_path / "plan", allow_cpu_fallback=spoil == "cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [(), ("--pp", 2), ("--dtype", "float32")])
def test_on_a_gpu_a_plan_is_built_and_proven(plan: tuple[object, ...], made: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    done(command("convert", made.with_name("source"), "--to", "onnx", *plan, "-o", tmp_path / "made"))
    done(command("compile", tmp_path / "made", "--to", "tensorrt", "-o", tmp_path / "plan"))
    report = validate(Request(subject=tmp_path / "plan"))
    assert report.passed, report.checks
