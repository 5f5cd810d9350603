"""`compile --to trtllm` where its programs are stood in for, and where they are not: what is called, with which files,
what comes of it, and what a job is worth that another machine runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporters.commands import artifact_of, command, contents, sentence
from exporters.conftest import Once
from exporters.fixtures import DATA, LLAMA

from nemoport import artifact, calibration
from nemoport.exporters import convert, stream
from nemoport.exporters.methods import rows
from nemoport.spec import Plan, Recipe
from nemoport.validation import Request, validate

from .stand_ins import Machine, machine

MODELOPT = DATA / "modelopt"
PLANS: Mapping[str, Plan] = {
    "one rank": Plan(),
    "tp 2": Plan(tp=2),
    "tp 2, pp 2": Plan(tp=2, pp=2),
    "tp 4": Plan(tp=4),
    "pp 4": Plan(pp=4),
}
METHODS = sorted(row.method for row in rows() if row.dialect == "trtllm" and row.loads)
ONE_RANK = ("int4_awq",)
"""Its groups do not divide over two ranks of so small a model."""


@pytest.fixture(scope="module")
def checkpoint(once: Once) -> Path:
    """A TensorRT-LLM checkpoint of two ranks."""
    return once(LLAMA["nemo2"], "trtllm", tp=2)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """This machine builds engines, as far as stand-ins do."""
    made = machine(tmp_path / "a machine")
    made.enter(monkeypatch)
    return made


def compiled(checkpoint: Path, out: Path, *more: object) -> Path:
    ended = command("compile", checkpoint, "--to", "trtllm", "-o", out, *more)
    assert ended.exit_code == 0, ended.stderr
    return out


def refused(checkpoint: Path, out: Path, *more: object) -> tuple[int, str]:
    """The exit code and the sentence."""
    ended = command("compile", checkpoint, "--to", "trtllm", "-o", out, *more)
    return ended.exit_code, sentence(ended.stderr)


def calls(made: Machine) -> list[list[str]]:
    return [json.loads(line) for line in made.log.read_text().splitlines()] if made.log.exists() else []


def test_what_was_asked_for_is_what_trtllm_build_is_told(checkpoint: Path, here: Machine, tmp_path: Path) -> None:
    asked = {"max_batch_size": 16, "max_seq_len": 96, "max_num_tokens": 512, "workers": 2, "kv_cache_type": "paged"}
    flags = [word for name, value in asked.items() for word in (f"--{name}", value)]
    compiled(checkpoint, tmp_path / "engines", *flags, "--plugin", "gemm_plugin=auto", "--logits-dtype", "float16")
    (words,) = calls(here)
    said = dict(zip(words[::2], words[1::2], strict=True))
    assert said == {
        "--checkpoint_dir": "artifact",
        "--output_dir": ".product",
        **{f"--{name}": str(value) for name, value in asked.items()},
        "--gemm_plugin": "auto",
        "--logits_dtype": "float16",
    }


def test_the_artifact_has_an_engine_for_each_rank_and_says_what_built_it(
    checkpoint: Path, here: Machine, tmp_path: Path
) -> None:
    source, before = artifact.read_manifest(checkpoint), contents(checkpoint)
    out = compiled(checkpoint, tmp_path / "engines", "--max-batch-size", 4)
    made = artifact_of(out)
    tokenizer = {name for name in before if name.startswith(("tokenizer", "special_tokens"))}
    assert tokenizer
    assert {file.path for file in made.files} == {"config.json", "rank0.engine", "rank1.engine", *tokenizer}
    assert made.kind == "trtllm_engine"
    assert made.built_with == {"tensorrt_llm": "1.2.1", "sm": 90}
    assert made.loads == ("TensorRT-LLM 1.2.1 on GPUs of SM 90",)
    assert (made.spec, made.plan, made.dtype) == (source.spec, source.plan, source.dtype)
    assert made.source["compiled"]["artifact"] == artifact.identity(checkpoint)
    assert made.source["compiled"]["asked"] == {"max_batch_size": 4}
    assert contents(checkpoint) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a machine", "engines"]


def test_the_same_command_again_finds_what_it_built_and_another_one_is_refused(
    checkpoint: Path, here: Machine, tmp_path: Path
) -> None:
    out = compiled(checkpoint, tmp_path / "engines")
    before = contents(out)
    compiled(checkpoint, out)
    assert contents(out) == before
    assert len(calls(here)) == 1
    code, said = refused(checkpoint, out, "--max-batch-size", 2)
    assert code == 2
    assert "is not what this would build" in said


def test_a_timing_cache_is_read_and_left_where_it_was_named(checkpoint: Path, here: Machine, tmp_path: Path) -> None:
    cache = tmp_path / "caches" / "of sm 90"
    compiled(checkpoint, tmp_path / "first", "--timing-cache", cache)
    assert cache.read_bytes() == b"a timing;"
    compiled(checkpoint, tmp_path / "second", "--timing-cache", cache, "--max-batch-size", 2)
    assert cache.read_bytes() == b"a timing;a timing;"
    assert contents(tmp_path / "second").keys() == contents(tmp_path / "first").keys()


@pytest.mark.parametrize("name", ["-o", "with space", "quote'and\"", "$(touch ran)", "naïve;true", "..more", "x" * 90])
def test_any_name_of_a_directory_will_do(
    name: str, checkpoint: Path, here: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / name
    place.mkdir()
    source = Path(shutil.copytree(checkpoint, place / f"{name} source"))
    monkeypatch.chdir(place)
    monkeypatch.setenv("CDPATH", str(tmp_path))
    out = Path(name)
    ended = command("compile", source, "--to", "trtllm", f"--output={out}")
    assert ended.exit_code == 0, ended.stderr
    assert artifact_of(place / out).kind == "trtllm_engine"
    assert sorted(path.name for path in place.iterdir()) == sorted([name, f"{name} source"])


PRODUCTS = {
    "an engine lacks": ("(out / 'rank1.engine').unlink()", 3, "lacks rank1.engine (1 of 3 files)"),
    "no config": ("(out / 'config.json').unlink()", 3, "lacks config.json"),
    "no JSON": ("(out / 'config.json').write_text('{')", 3, "is not what trtllm-build writes"),
    "of another release": (
        "(out / 'config.json').write_text(json.dumps({**whole, 'version': '0.9.0'}))",
        3,
        "is of TensorRT-LLM 0.9.0 and 2 ranks, 1.2.1 and 2 were to build it",
    ),
    "it fails": ("sys.exit(7)", 4, "ended with exit code 7"),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_a_product_that_is_not_what_was_asked_for_becomes_no_artifact(
    case: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more, wanted, words = PRODUCTS[case]
    machine(tmp_path / "a machine", more=more).enter(monkeypatch)
    code, said = refused(checkpoint, tmp_path / "engines")
    assert code == wanted
    assert words in said
    assert not (tmp_path / "engines").exists()


def test_a_product_that_is_refused_is_built_again_as_the_sentence_says(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = tmp_path / "engines.job/product"
    with monkeypatch.context() as inside:
        machine(tmp_path / "odd", more='(out / "rank1.engine").unlink()').enter(inside)
        assert refused(checkpoint, tmp_path / "engines")[1].endswith(f"; build again, once {product} is removed")
    machine(tmp_path / "sound").enter(monkeypatch)
    assert refused(checkpoint, tmp_path / "engines")[0] == 3
    shutil.rmtree(product)
    ended = command("compile", checkpoint, "--to", "trtllm", "-o", tmp_path / "engines")
    assert ended.exit_code == 0, ended.stderr


@pytest.mark.parametrize(
    "options, words",
    [
        (("--max-batch-size", 0), "max_batch_size is 0"),
        (("--max-input-len", 9, "--max-seq-len", 8), "max_input_len is 9 and max_seq_len 8"),
        (("--workers", 3), "there are 2 ranks"),
        (("--max-draft-len", 3), "goes with speculative_decoding_mode"),
        (("--speculative-decoding-mode", "lookahead_decoding"), "max_draft_len"),
        (("--plugin", "gemm_plugin"), "not NAME=VALUE"),
        (("--plugin", "gem_plugin=auto"), "gemm_plugin"),
        (("--plugin", "gemm_plugin=yes"), "takes auto, float16"),
        (("--container", "a b"), "no name of an image"),
        (("--timing-cache", "."), "is a directory"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(
    options: tuple[object, ...], words: str, checkpoint: Path, here: Machine, tmp_path: Path
) -> None:
    code, said = refused(checkpoint, tmp_path / "engines", *options)
    assert code == 2
    assert words in said
    assert [path.name for path in tmp_path.iterdir()] == ["a machine"]


@pytest.mark.parametrize("place", ["file", "directory", "of others.job", "itself"])
def test_nothing_of_others_is_written_over(place: str, checkpoint: Path, here: Machine, tmp_path: Path) -> None:
    out = tmp_path / "engines"
    source = Path(shutil.copytree(checkpoint, tmp_path / ("engines.job" if place == "itself" else "source")))
    taken = {"file": out, "directory": out / "mine", "of others.job": tmp_path / "engines.job/mine"}.get(place)
    if taken:
        taken.parent.mkdir(exist_ok=True)
        taken.write_text("mine")
    before = contents(tmp_path)
    code, said = refused(source, out)
    assert code == 2
    assert "remove it, or choose another" in said
    assert contents(tmp_path) == before


def test_only_a_checkpoint_for_trtllm_is_compiled(here: Machine, tmp_path: Path, once: Once) -> None:
    code, said = refused(once(LLAMA["nemo2"], "hf"), tmp_path / "engines")
    assert code == 3
    assert "is an artifact of kind hf, and --to trtllm compiles trtllm" in said


@pytest.mark.parametrize("release", ["1.3.0rc2", "1.3.0", "2.0"])
def test_a_release_without_engines_is_refused_here_and_by_the_script(
    release: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = machine(tmp_path / "a machine", release=release)
    made.enter(monkeypatch)
    code, said = refused(checkpoint, tmp_path / "engines")
    assert code == 4
    assert f"its TensorRT-LLM is {release}, and it builds engines up to 1.2" in said
    ended = _script(tmp_path / "engines.job")
    assert ended.returncode == 4
    assert sentence(ended.stderr).startswith(f"tensorrt_llm is {release} here; it builds engines up to 1.2")
    assert not calls(made)


@pytest.mark.parametrize("release", ["0.8.0", "0.21.0", "1.0.0", "1.1.0rc5", "1.2.0", "1.2.1"])
def test_every_release_with_engines_builds(
    release: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path / "a machine", release=release).enter(monkeypatch)
    out = compiled(checkpoint, tmp_path / "engines")
    assert artifact.read_manifest(out).built_with["tensorrt_llm"] == release


def _script(job: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(job / "build.sh")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        cwd="/",
    )


def test_where_trtllm_build_is_missing_the_job_is_left_and_says_so_with_exit_code_4(
    checkpoint: Path, tmp_path: Path
) -> None:
    code, said = refused(checkpoint, tmp_path / "engines")
    assert code == 4
    assert "it has no trtllm-build" in said
    assert f"the build job is in {tmp_path / 'engines.job'}" in said
    ended = _script(tmp_path / "engines.job")
    assert ended.returncode == 4
    assert sentence(ended.stderr).startswith("trtllm-build is not on PATH; run this in a container with TensorRT-LLM")
    assert not (tmp_path / "engines.job/product").exists()


def test_a_job_that_another_machine_ran_is_finished_by_the_same_command(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is carried away, run, and only what it left is carried back."""
    compiled(checkpoint, tmp_path / "engines", "--job", "--max-batch-size", 3)
    job, there = tmp_path / "engines.job", tmp_path / "there" / "moved"
    shutil.copytree(job, there)
    elsewhere = machine(tmp_path / "a machine", release="1.1.0", capability="8.9")
    ended = _script(there, **elsewhere.environment)
    assert ended.returncode == 0, ended.stderr
    assert _script(there, **elsewhere.environment).stderr.endswith("remove it to build again\n")
    assert len(calls(elsewhere)) == 1
    assert refused(checkpoint, tmp_path / "engines", "--max-batch-size", 3)[0] == 4
    shutil.copytree(there / "product", job / "product")
    shutil.copy(there / "built_with", job)
    code, said = refused(checkpoint, tmp_path / "engines", "--max-batch-size", 4)
    assert code == 2
    assert "is the job of another build" in said
    out = compiled(checkpoint, tmp_path / "engines", "--max-batch-size", 3)
    assert artifact_of(out).built_with == {"tensorrt_llm": "1.1.0", "sm": 89}
    assert not job.exists()


def test_a_dry_run_prints_the_command_and_writes_nothing(checkpoint: Path, tmp_path: Path) -> None:
    ended = command("compile", checkpoint, "--to", "trtllm", "-o", tmp_path / "engines", "--dry-run", "--json")
    assert ended.exit_code == 0
    found: dict[str, Any] = json.loads(ended.stdout)
    assert found["commands"] == [["trtllm-build", "--checkpoint_dir", "artifact", "--output_dir", ".product"]]
    assert found["lacking"] == "it has no trtllm-build and no nvidia-smi"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("case", PLANS)
def test_ranks_give_the_sources_logits_before_and_after_a_job_is_written_around_them(
    case: str, once: Once, tmp_path: Path
) -> None:
    plan = PLANS[case]
    _same_logits_in_the_job(once(LLAMA["nemo2"], "trtllm", tp=plan.tp, pp=plan.pp), LLAMA["nemo2"].path, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_quantized_ranks_too(method: str, tmp_path: Path) -> None:
    _same_logits_in_the_job(quantized(method, tmp_path), MODELOPT, tmp_path)


def quantized(method: str, place: Path) -> Path:
    seen = calibration.from_tokens(MODELOPT / "tokens.npz", MODELOPT, None, calibration.Limits())
    plan = Plan(tp=1 if method in ONE_RANK else 2, recipe=Recipe(method=method))
    stream.run(convert.plan(MODELOPT, "trtllm", place / "made", plan=plan, calibration=seen))
    return place / "made"


def _same_logits_in_the_job(made: Path, source: Path, place: Path) -> None:
    """Every rank simulated in one process, against the source's reference; of a quantized one against what its recipe
    makes of the source. What four bits cost a model that was never trained is not asked."""
    text = place / "text.npz"
    np.savez(text, tokens=np.arange(64).reshape(2, 32))
    asked = Request(subject=made, against=source, text=text if artifact.read_manifest(made).plan.recipe else None)
    before = validate(asked)
    judged = {check.name: check.passed for check in before.checks if text.name not in check.name}
    assert len(judged) > 3
    assert all(judged.values()), judged
    compiled(made, place / "engines", "--job")
    after = validate(replace(asked, subject=place / "engines.job/artifact"))
    assert after.checks == before.checks
    assert artifact.identity(place / "engines.job/artifact") == artifact.identity(made)


@pytest.mark.parametrize("algorithm, too_old, enough", [("FP8", "8.0", "8.9"), ("NVFP4", "9.0", "10.0")])
def test_a_gpu_without_kernels_for_the_quantization_is_refused_before_it_builds(
    algorithm: str, too_old: str, enough: str, tmp_path: Path
) -> None:
    compiled(quantized(algorithm.lower(), tmp_path), tmp_path / "engines", "--job")
    old, new = (machine(tmp_path / each, capability=each) for each in (too_old, enough))
    ended = _script(tmp_path / "engines.job", **old.environment)
    assert ended.returncode == 4
    assert f"{algorithm} has kernels for SM" in sentence(ended.stderr)
    assert not calls(old)
    assert _script(tmp_path / "engines.job", **new.environment).returncode == 0
