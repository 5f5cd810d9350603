"""`compile --to onnxruntime`: what the optimizer left answers what the graph answered, is proven and served like it,
and says where it runs."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from exporters.commands import command, sentence
from families.test_conformance import unwritten
from families.test_stages import SPECS, Graph, first, following, loaded, opened, same
from validation.small import write

from nemoport import artifact
from nemoport.artifact import Artifact
from nemoport.compilers.builders import onnxruntime as builder
from nemoport.compilers.graphs import Part
from nemoport.errors import DamagedInput
from nemoport.exporters.targets import onnx as target
from nemoport.repository import config
from nemoport.runner.client import Client
from nemoport.runner.serve import serving
from nemoport.runner.server import start
from nemoport.spec import LanguageModel, ModelSpec, Plan
from nemoport.validation import Request, validate, weights

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
SCRIPT = str(files("nemoport") / "templates/job/optimize.py")
WEIGHTS = "model.onnx.data"
PLAIN = {name: spec for name, spec in SPECS.items() if "plain" in name or "alternating" in name}


def optimize(monkeypatch: pytest.MonkeyPatch, made: Path, product: Path) -> None:
    """The job's program, in this process."""
    monkeypatch.setattr(sys, "argv", [SCRIPT, str(made / "model.onnx"), str(product / "model.onnx"), CPU, "extended"])
    runpy.run_path(SCRIPT)


@pytest.mark.parametrize("spec", PLAIN.values(), ids=PLAIN)
def test_an_optimized_graph_answers_what_the_graph_answered(
    spec: ModelSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unwritten(spec, tmp_path)
    output = target.output(model, Plan(dtype="float32"))
    assert output.signature
    (before,) = loaded(output, tmp_path / "before")
    optimize(monkeypatch, tmp_path / "before", tmp_path / "after")
    builder.check(tmp_path / "after", {}, (Part("", output.signature),))
    (after,) = opened(output, tmp_path / "after")
    given = first(spec, before.signature)
    answers = before(given)
    alike(after(given), answers)
    if isinstance(spec.head, LanguageModel):
        given = following(spec, given, answers, 1)
        alike(after(given), before(given))
    held = weights.of_optimized(tmp_path / "after/model.onnx", spec)
    assert weights.unequal(model, held) == ()
    assert "embed.weight" in {share.name for share in held}


def alike(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=1e-5 * np.abs(array).max(), err_msg=name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("compiled")
    write(room / "source", tie_word_embeddings=True, hidden_size=32, head_dim=16, intermediate_size=64)
    done(command("convert", room / "source", "--to", "onnx", "-o", room / "made"))
    return room / "made"


@pytest.fixture(scope="module")
def compiled(made: Path) -> Path:
    done(command("compile", made, "--to", "onnxruntime", "-o", made.with_name("compiled")))
    return made.with_name("compiled")


def done(result: Any) -> Any:
    assert result.exit_code == 0, result.stderr
    return result


def of(directory: Path) -> Artifact:
    found = artifact.read_manifest(directory)
    artifact.verify(directory, found)
    return found


def test_it_is_an_onnx_artifact_that_says_what_it_was_built_with(made: Path, compiled: Path) -> None:
    found, source = of(compiled), of(made)
    assert (found.kind, found.signature, found.dtype, found.spec) == ("onnx", source.signature, "float32", source.spec)
    assert found.built_with == {
        "onnxruntime": onnxruntime.__version__,
        "provider": CPU,
        "portability": f"operators of ONNX Runtime's own: {CPU} alone",
    }
    assert found.source["compiled"]["asked"] == {"provider": CPU, "level": "extended"}
    assert found.loads[0].startswith(f"ONNX Runtime {onnxruntime.__version__} or later")
    domains = {node.domain for node in onnx.load(compiled / "model.onnx", load_external_data=False).graph.node}
    assert "com.microsoft" in domains


@pytest.mark.parametrize("level, own", [("basic", False), ("all", True)])
def test_a_level_says_what_it_leaves_of_portability(level: str, own: bool, made: Path, tmp_path: Path) -> None:
    done(command("compile", made, "--to", "onnxruntime", "--level", level, "-o", tmp_path / "compiled"))
    graph = onnx.load(tmp_path / "compiled/model.onnx", load_external_data=False).graph
    assert any(node.domain for node in graph.node) == own
    built_with = of(tmp_path / "compiled").built_with
    assert ("processor" in built_with) == (level == "all")
    assert built_with["portability"].endswith("any provider" if level == "basic" else "like the one it was built on")


def test_the_same_command_finds_it_and_another_does_not(made: Path, compiled: Path) -> None:
    before = (compiled / "model.onnx").stat().st_mtime_ns
    done(command("compile", made, "--to", "onnxruntime", "-o", compiled))
    assert (compiled / "model.onnx").stat().st_mtime_ns == before
    other = command("compile", made, "--to", "onnxruntime", "--level", "basic", "-o", compiled)
    assert other.exit_code == 2, other.stderr


def test_it_is_validated_against_the_source(compiled: Path) -> None:
    report = validate(Request(subject=compiled))
    assert report.passed, report.checks
    (held,) = [check for check in report.checks if check.name == "weights of the source"]
    assert held.found.endswith("tensors equal")


def flip(directory: Path) -> None:
    with (directory / WEIGHTS).open("r+b") as file:
        file.seek(64)
        byte = file.read(1)[0]
        file.seek(64)
        file.write(bytes([byte ^ 1]))


def steeper(directory: Path) -> None:
    graph = onnx.load(directory / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        if node.op_type == "QuickGelu":
            node.attribute[0].f *= 1.01
    onnx.save(graph, directory / "model.onnx")


@pytest.mark.parametrize("spoil, seen", [(flip, "weights of the source"), (steeper, "logits of the source")])
def test_a_compiler_that_errs_is_seen(spoil: Callable[[Path], None], seen: str, compiled: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(compiled, wrong)
    spoil(wrong)
    manifest = json.loads((wrong / artifact.MANIFEST).read_bytes())
    for file in manifest["files"]:
        file |= {"size": (wrong / file["path"]).stat().st_size, "blake3": artifact.digest(wrong / file["path"])}
    (wrong / artifact.MANIFEST).write_bytes(artifact.json_bytes(manifest))
    report = validate(Request(subject=wrong))
    assert any(check.name.startswith(seen) for check in report.checks if not check.passed), report.checks


def test_it_is_published_for_its_provider_and_served(compiled: Path, made: Path, tmp_path: Path) -> None:
    validate(Request(subject=compiled))
    words = ["publish", compiled, "--model-repository", tmp_path / "models", "--name", "tiny", "--promote"]
    refused = command(*words)
    assert "no release that is known loads it" in refused.stderr  # of Triton: its ONNX Runtime is older than ours
    done(command(*words, "--triton-release", "27.01"))
    told = config.parse((tmp_path / "models/tiny" / config.FILE).read_text(), "tiny")
    assert told.tuning["instance_group"] == [{"count": 1, "kind": "KIND_CPU"}]
    done(command("check", tmp_path / "models"))
    spec, signature = of(made).spec, of(made).signature
    assert signature
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    whole = Graph(onnxruntime.InferenceSession(made / "model.onnx", options, providers=[CPU]), signature)
    inputs = {tensor.name for tensor in signature.inputs}
    given = {name: array for name, array in first(spec, signature).items() if name in inputs}
    with serving(start([tmp_path / "models"])) as address, Client(address) as client:
        same(client.infer("tiny", given), whole(given))


@pytest.mark.parametrize("plan", [("--pp", 2), ("--dtype", "float16")])
def test_whatever_was_converted_can_be_compiled(plan: Sequence[object], made: Path, tmp_path: Path) -> None:
    done(command("convert", made.with_name("source"), "--to", "onnx", *plan, "-o", tmp_path / "made"))
    done(command("compile", tmp_path / "made", "--to", "onnxruntime", "-o", tmp_path / "compiled"))
    found = of(tmp_path / "compiled")
    assert found.stages == of(tmp_path / "made").stages
    report = validate(Request(subject=tmp_path / "compiled"))
    assert not [check for check in report.checks if not check.passed]


@pytest.mark.parametrize(
    "how", [("int8", "portable"), ("int8", "ort"), ("int4", "portable"), ("int8_dynamic", "portable")]
)
def test_what_is_quantized_is_refused_with_the_way_out(how: tuple[str, str], made: Path, tmp_path: Path) -> None:
    method, profile = how
    plan = ("--quantize", method, "--profile", profile, *(("--group", 16) if method == "int4" else ()))
    done(command("convert", made.with_name("source"), "--to", "onnx", *plan, "-o", tmp_path / "made"))
    told = command("compile", tmp_path / "made", "--to", "onnxruntime", "-o", tmp_path / "no")
    assert told.exit_code == 3
    assert "serve it as it is: of --profile ort int4 and int8 are packed" in sentence(told.stderr)


@pytest.mark.parametrize("to", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("damage", [lambda graph: graph.write_bytes(graph.read_bytes()[:999]), Path.unlink])
def test_a_damaged_graph_is_refused(to: str, damage: Callable[[Path], None], made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "made")
    damage(tmp_path / "made/model.onnx")
    told = command("compile", tmp_path / "made", "--to", to, "-o", tmp_path / "no")
    assert told.exit_code == 3
    assert "is no graph of ONNX" in sentence(told.stderr)
    assert "; convert again" in sentence(told.stderr)


def test_what_would_be_of_no_use_is_refused(made: Path, compiled: Path, tmp_path: Path) -> None:
    again = command("compile", compiled, "--to", "onnxruntime", "-o", tmp_path / "again")
    assert again.exit_code == 3
    assert "was compiled already" in sentence(again.stderr)
    done(command("convert", made.with_name("source"), "--to", "onnx", "--dtype", "bfloat16", "-o", tmp_path / "wide"))
    wide = command("compile", tmp_path / "wide", "--to", "onnxruntime", "-o", tmp_path / "no")
    assert wide.exit_code == 3
    assert "has no kernels; convert with --dtype float32 or float16" in sentence(wide.stderr)


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="this machine has what is to be missing")
def test_for_a_gpu_that_is_not_here_the_job_is_left(made: Path, tmp_path: Path) -> None:
    told = command("compile", made, "--to", "onnxruntime", "--provider", CUDA, "-o", tmp_path / "engines")
    assert told.exit_code == 4
    assert "it has no onnxruntime-gpu; the build job is in" in sentence(told.stderr)
    job = tmp_path / "engines.job"
    assert "RUN pip install --no-cache-dir 'onnxruntime-gpu[cuda,cudnn]'" in (job / "Dockerfile").read_text()
    ended = subprocess.run(["bash", job / "build.sh"], capture_output=True, text=True, check=False)
    assert ended.returncode == 4
    assert ended.stderr.startswith("Error: ")
    assert not (job / "product").exists()


@pytest.mark.gpu
def test_for_the_gpu_that_is_here_it_is_built_and_proven(made: Path, tmp_path: Path) -> None:
    done(command("compile", made, "--to", "onnxruntime", "--provider", CUDA, "-o", tmp_path / "compiled"))
    assert of(tmp_path / "compiled").built_with["provider"] == CUDA
    assert validate(Request(subject=tmp_path / "compiled")).passed


def test_a_product_that_is_not_whole_is_refused(compiled: Path, tmp_path: Path) -> None:
    signature = of(compiled).signature
    assert signature
    shutil.copytree(compiled, tmp_path / "short")
    with (tmp_path / "short" / WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DamagedInput, match="does not hold"):
        builder.check(tmp_path / "short", {}, (Part("", signature),))
    (tmp_path / "short/model.onnx").write_bytes(b"nothing")
    with pytest.raises(DamagedInput, match="is no graph"):
        builder.check(tmp_path / "short", {}, (Part("", signature),))
