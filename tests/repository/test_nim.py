"""Directories for NIM: exactly the files of its lists, byte for byte those of the artifact, readable by all; and
`check` finds everything that is wrong with one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from nemoport import artifact
from nemoport.check import Request, check
from nemoport.cli import main
from nemoport.compatibility import runtime
from nemoport.errors import UnsupportedInput, UsageError
from nemoport.repository.layouts import nim

SOURCE = Path(__file__).parents[1] / "data/megatron/nemo2/llama_tp1pp1"
TOKENIZER = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
ROOT = {"config.json", "generation_config.json", *TOKENIZER}


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="nemoport")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf, trtllm at tp 2, vllm, and what stands for engines of it."""
    place = tmp_path_factory.mktemp("made")
    for to, *more in (("hf",), ("trtllm", "--tp", "2"), ("vllm",)):
        ended = run("convert", SOURCE, "--to", to, *more, "-o", place / to)
        assert ended.exit_code == 0, ended.stderr
    engines = place / "trtllm_engine"
    engines.mkdir()
    for rank in range(2):
        (engines / f"rank{rank}.engine").write_bytes(b"engine %d" % rank)
    said = {"version": "1.1.0", "pretrained_config": {"mapping": {"world_size": 2}}}
    (engines / "config.json").write_text(json.dumps(said))
    for name in TOKENIZER:
        shutil.copyfile(place / "trtllm" / name, engines / name)
    stamped = replace(
        artifact.read_manifest(place / "trtllm"),
        kind="trtllm_engine",
        loads=("TensorRT-LLM 1.1.0 on GPUs of SM 90",),
        built_with={"tensorrt_llm": "1.1.0", "sm": 90},
        files=tuple(artifact.describe(path, engines) for path in sorted(engines.iterdir())),
    )
    artifact.write_manifest(engines, stamped)
    return place


def laid_out(made: Path, kind: str, line: str, destination: Path) -> Path:
    ended = run("layout", "nim", made / kind, "-o", destination, "--nim", line, "--name", "support")
    assert ended.exit_code == 0, ended.stderr
    return destination


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


LISTINGS = {
    ("hf", "1.x"): {*ROOT, "model.safetensors"},
    ("hf", "2.x"): {*ROOT, "model.safetensors"},
    ("trtllm", "1.x"): {*ROOT, "trtllm_ckpt/config.json", *(f"trtllm_ckpt/rank{n}.safetensors" for n in (0, 1))},
    ("trtllm_engine", "1.x"): {*ROOT, "trtllm_engine/config.json", *(f"trtllm_engine/rank{n}.engine" for n in (0, 1))},
}
every_layout = pytest.mark.parametrize(("kind", "line"), LISTINGS)


@every_layout
def test_the_directory_is_nims_list_and_its_bytes_are_the_artifacts(
    kind: str, line: str, made: Path, tmp_path: Path
) -> None:
    directory = laid_out(made, kind, line, tmp_path / "nim")
    assert files(directory) == LISTINGS[kind, line]
    for name in files(directory):
        below, _, own = name.rpartition("/")
        described = kind != "hf" and name in nim.HUGGING_FACE
        source = made / "hf" / name if described else made / kind / (own if below else name)
        assert (directory / name).read_bytes() == source.read_bytes(), name
    assert check(Request(directory=directory)).findings == ()
    assert check(Request(directory=directory, runtime=runtime(f"nim:{line}"))).findings == ()


@every_layout
def test_everybody_may_read_it_whoever_made_the_artifact(kind: str, line: str, made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / kind, tmp_path / kind)
    for path in (tmp_path / kind).iterdir():
        path.chmod(0o600)
    before = os.umask(0o077)
    try:
        directory = laid_out(tmp_path, kind, line, tmp_path / "nim")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in directory.rglob("*") if path.is_file()}
    assert modes == {0o644}
    assert {path.stat().st_mode & 0o777 for path in (directory, *directory.rglob("*")) if path.is_dir()} == {0o755}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / kind).iterdir()} == {0o600}


@pytest.mark.parametrize(
    ("kind", "line", "expected"),
    [
        (
            "hf",
            "2.x",
            {
                "NIM_MODEL_PATH": "/model-store",
                "NIM_SERVED_MODEL_NAME": "support",
                "NIM_TENSOR_PARALLEL_SIZE": "1",
            },
        ),
        (
            "hf",
            "1.x",
            {
                "NIM_MODEL_NAME": "/model-store",
                "NIM_MODEL_PROFILE": "vllm",
                "NIM_SERVED_MODEL_NAME": "support",
                "NIM_TENSOR_PARALLEL_SIZE": "1",
            },
        ),
        (
            "trtllm",
            "1.x",
            {
                "NIM_MODEL_NAME": "/model-store",
                "NIM_MODEL_PROFILE": "tensorrt_llm",
                "NIM_SERVED_MODEL_NAME": "support",
                "NIM_TENSOR_PARALLEL_SIZE": "2",
                "NIM_USE_TRTLLM_LEGACY_BACKEND": "1",
                "NIM_DISABLE_TRTLLM_PYTORCH_RT": "1",
            },
        ),
    ],
)
def test_the_environment_names_the_model_its_profile_and_its_gpus(
    kind: str, line: str, expected: dict[str, str], made: Path, tmp_path: Path
) -> None:
    laid_out(made, kind, line, tmp_path / "nim")
    lines = (tmp_path / "nim.nim/nim.env").read_text().splitlines()
    assert dict(each.split("=", 1) for each in lines if not each.startswith("#")) == expected
    assert files(tmp_path / "nim.nim") == {"nim.env", "layout.json", "manifest.json", "ledger.jsonl"}


@pytest.mark.parametrize(
    ("dtype", "algorithm", "tp", "tag"),
    [
        ("bfloat16", None, 4, "vllm-bf16-tp4-pp1"),
        ("bfloat16", "FP8", 1, "vllm-fp8-tp1-pp1"),
        ("bfloat16", "NVFP4", 2, "vllm-nvfp4-tp2-pp1"),
        ("bfloat16", "W4A16_AWQ", 1, None),
        ("float16", None, 1, None),
    ],
)
def test_a_profile_is_known_by_its_tag(
    dtype: str, algorithm: str | None, tp: int, tag: str | None, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    if algorithm:
        (tmp_path / "hf/hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": algorithm}}))
    artifact.write_manifest(tmp_path / "hf", replace(artifact.read_manifest(made / "hf"), dtype=dtype))
    planned = nim.plan(tmp_path / "hf", "2.x", tmp_path / "nim", served_name="m", tp=tp, described=lambda _: {})
    assert planned.profile == tag
    assert (f"profile {tag}:" in nim.environment_file(planned)) == bool(tag)
    assert (
        nim.plan(tmp_path / "hf", "1.x", tmp_path / "nim", served_name="m", tp=tp, described=lambda _: {}).profile
        == "vllm"
    )


@pytest.mark.parametrize(
    ("kind", "line", "tp", "error", "way_out"),
    [
        ("trtllm", "2.x", None, UsageError, "NIM 2.x takes what --to hf writes"),
        ("trtllm_engine", "2.x", None, UsageError, "NIM 2.x takes what --to hf writes"),
        ("vllm", "2.x", None, UsageError, "convert with --to hf"),
        ("trtllm", "1.x", 4, UsageError, "is cut for tp=2"),
    ],
)
def test_what_that_line_does_not_serve_is_refused_before_a_weight_is_read(
    kind: str, line: str, tp: int | None, error: type[Exception], way_out: str, made: Path, tmp_path: Path
) -> None:
    (tmp_path / kind).mkdir()
    shutil.copyfile(made / kind / artifact.MANIFEST, tmp_path / kind / artifact.MANIFEST)
    with pytest.raises(error, match=way_out):
        nim.plan(tmp_path / kind, line, tmp_path / "nim", served_name="m", tp=tp, described=lambda _: {})


def test_a_model_without_a_tokenizer_is_refused(made: Path, tmp_path: Path) -> None:
    kept = replace(artifact.read_manifest(made / "hf"), files=())
    (tmp_path / "hf").mkdir()
    artifact.write_manifest(tmp_path / "hf", kept)
    with pytest.raises(UnsupportedInput, match="has no tokenizer"):
        nim.plan(tmp_path / "hf", "2.x", tmp_path / "nim", served_name="m", described=lambda _: {})


def test_a_place_that_is_taken_is_refused_and_what_a_killed_run_left_is_not(made: Path, tmp_path: Path) -> None:
    laid_out(made, "hf", "2.x", tmp_path / "nim")
    again = run("layout", "nim", made / "hf", "-o", tmp_path / "nim", "--nim", "2.x")
    assert again.exit_code == 2
    shutil.rmtree(tmp_path / "nim")
    (tmp_path / ".nim.unfinished").mkdir()
    laid_out(made, "hf", "2.x", tmp_path / "nim")
    assert {path.name for path in tmp_path.iterdir()} == {"nim", "nim.nim"}


def test_the_root_may_be_described_by_another_directory(made: Path, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    for name in nim.HUGGING_FACE:
        (tmp_path / "own" / name).write_text('{"architectures": ["Own"]}')
    words = ["layout", "nim", made / "trtllm", "--nim", "1.x", "--hf", tmp_path / "own", "-o", tmp_path / "nim"]
    assert run(*words).exit_code == 0
    assert (tmp_path / "nim/config.json").read_text() == '{"architectures": ["Own"]}'


def _set(name: str, **more: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        said = json.loads((directory / name).read_text())
        (directory / name).write_text(json.dumps({**said, **more}))

    return change


def _speechless(directory: Path) -> None:
    for name in TOKENIZER:
        (directory / name).unlink()


def _links_out(directory: Path) -> None:
    (directory / "chat_template.jinja").symlink_to("/etc/hostname")


BROKEN: dict[str, tuple[str, str, Callable[[Path], object]]] = {
    "no config": ("hf", "NP911", lambda at: (at / "config.json").unlink()),
    "TensorRT-LLM's config": ("trtllm", "NP911", lambda at: shutil.copy(at / "trtllm_ckpt/config.json", at)),
    "no weights": ("hf", "NP912", lambda at: (at / "model.safetensors").unlink()),
    "no rank": ("trtllm", "NP912", lambda at: (at / "trtllm_ckpt/rank1.safetensors").unlink()),
    "no engine": ("trtllm_engine", "NP912", lambda at: (at / "trtllm_engine/rank1.engine").unlink()),
    "no description": ("hf", "NP913", _set("config.json", quantization_config={"quant_method": "modelopt"})),
    "no generation": ("hf", "NP914", lambda at: (at / "generation_config.json").unlink()),
    "private": ("hf", "NP915", lambda at: (at / "model.safetensors").chmod(0o600)),
    "closed": ("trtllm", "NP915", lambda at: (at / "trtllm_ckpt").chmod(0o700)),
    "link": ("hf", "NP916", _links_out),
    "no tokenizer": ("hf", "NP919", _speechless),
    "other line": ("trtllm", "NP917", lambda at: _set("layout.json", nim="2.x")(nim.beside(at))),
    "other weights": ("trtllm", "NP918", lambda at: _flip(at / "trtllm_ckpt/rank0.safetensors")),
    "other config": ("trtllm", "NP918", _set("config.json", torch_dtype="float16")),
    "no manifest": ("hf", "NP918", lambda at: (nim.beside(at) / "manifest.json").unlink()),
}


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()  # it may be a link of the artifact's
    path.write_bytes(content)
    path.chmod(0o644)


@pytest.mark.parametrize("case", BROKEN)
def test_check_finds_what_nim_would_not_serve(case: str, made: Path, tmp_path: Path) -> None:
    kind, code, breaks = BROKEN[case]
    shutil.copytree(made / kind, tmp_path / kind)
    directory = laid_out(tmp_path, kind, "1.x", tmp_path / "nim")
    breaks(directory)
    found = check(Request(directory=directory)).findings
    assert code in {each.code for each in found}, found


def test_check_judges_anybodys_directory_where_a_nim_is_meant(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "hf", tmp_path / "snapshot", ignore=shutil.ignore_patterns("manifest.json", "ledger.jsonl"))
    assert run("check", tmp_path / "snapshot", "--runtime", "nim:2.1").exit_code == 0
    (tmp_path / "snapshot/model.safetensors").chmod(0o600)
    ended = run("check", tmp_path / "snapshot", "--runtime", "nim:2.1")
    assert ended.exit_code == 1
    assert "NP915" in ended.stdout
    engines = laid_out(made, "trtllm_engine", "1.x", tmp_path / "engines")
    assert "NP917" in run("check", engines, "--runtime", "nim:2.1").stdout


def test_an_artifact_that_was_changed_is_not_laid_out(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "hf", tmp_path / "hf")
    _flip(tmp_path / "hf/model.safetensors")
    ended = run("layout", "nim", tmp_path / "hf", "-o", tmp_path / "nim", "--nim", "2.x")
    assert ended.exit_code == 3
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


def test_every_shape_is_a_way_of_the_matrix(made: Path) -> None:
    from nemoport.compatibility import WAYS

    assert nim.SHAPES.keys() == {way.kind for way in WAYS if way.place == "nim"}
