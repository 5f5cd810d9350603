"""The matrix: every row has its source, every plug-in a way, and verdicts follow from what was seen."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from nemoport import plugins
from nemoport.compatibility import (
    KINDS,
    NAMES,
    TRITON,
    WAYS,
    Outcome,
    claims,
    contradiction,
    judge,
    least_triton,
    misfit,
    rows,
    runtime,
    triton,
    version,
)
from nemoport.compatibility.loads import claim
from nemoport.compilers.compile import BUILDERS
from nemoport.errors import UsageError
from nemoport.exporters import methods
from nemoport.exporters.convert import TARGETS
from nemoport.exporters.source import FAMILIES
from nemoport.repository.kinds import KINDS as SERVED

ENGINE = ("TensorRT-LLM 1.1.0 on GPUs of SM 90",)
EVERY_ROW = [
    *rows.TRITON,
    *rows.LEAST_SM,
    *rows.OPSETS,
    *rows.NIM,
    *rows.WAYS,
    *rows.NO_WAYS,
    *rows.GPUS,
]


def lines() -> set[str]:
    """All that plug-ins of ours say of who loads what they write."""
    found = {each for module in plugins.load_all(TARGETS).values() for each in module.LOADS}
    found |= {each for row in methods.rows() for each in row.loads}
    for module in plugins.load_all(FAMILIES).values():
        found |= {each for column in module.COLUMNS.values() for each in column.loads}
    return found


@pytest.mark.parametrize("row", EVERY_ROW, ids=lambda row: f"{type(row).__name__}-{getattr(row, fields(row)[0].name)}")
def test_every_row_has_its_source(row: object) -> None:
    assert re.match(r"https://\S+\.\S+/\S+", getattr(row, "source"))  # noqa: B009


def test_triton_is_whole_and_the_newest_comes_first() -> None:
    releases = [row.release for row in TRITON]
    assert releases == sorted(set(releases), reverse=True)
    for row in TRITON:
        for each in fields(row):
            value = getattr(row, each.name)
            assert value is None or each.name in ("source", "release") or version(value), value
    for least in rows.LEAST_SM:
        assert least.release in releases


@pytest.mark.parametrize("target", plugins.names(TARGETS))
def test_every_target_has_a_way_to_each_engine_that_it_names(target: str) -> None:
    assert target in KINDS
    engines = {each.engine for each in claims(plugins.load(TARGETS, target).LOADS)}
    assert engines
    assert engines <= {way.engine for way in WAYS if way.kind == target}


@pytest.mark.parametrize("builder", plugins.names(BUILDERS))
def test_every_builder_takes_and_makes_what_the_matrix_knows(builder: str) -> None:
    module = plugins.load(BUILDERS, builder)
    assert module.TAKES in KINDS
    assert module.KIND in KINDS
    assert module.KIND == module.TAKES or any(
        f"--to {builder}," in way.first for way in WAYS if way.kind == module.TAKES
    )


def test_every_kind_that_is_published_has_a_way_into_triton() -> None:
    assert SERVED.keys() <= {way.kind for way in WAYS if way.place == "triton"}


@pytest.mark.parametrize("line", sorted(lines()))
def test_a_line_that_names_an_engine_is_read_to_its_end(line: str) -> None:
    """What is left of it is words: a release that was not understood would be lost."""
    named = next(
        (name for names in NAMES.values() for name in names if re.match(rf"{re.escape(name)}(?![\w'-])", line)), ""
    )
    found = claim(line)
    assert bool(named) == bool(found)
    if found:
        head = re.split(r"[(,;]", line)[0]
        numbers = re.findall(r"\d+(?:\.\d+)+", head.removeprefix(named))
        said = [str(each) for each in (found.since, found.through) if each]
        assert set(numbers) <= set(said) | {"0.21"}, "0.21 is of tokenizers, which no runtime is asked for"


@pytest.mark.parametrize(
    ("word", "kind", "loads", "outcome", "reason"),
    [
        ("26.07", "onnx", ["ONNX Runtime 1.23 or later"], Outcome.LOADS, "ONNX Runtime 1.27.0"),
        ("25.07", "onnx", ["ONNX Runtime 1.23 or later"], Outcome.REFUSED, "it has ONNX Runtime 1.22.0"),
        ("tritonserver:26.07-vllm", "onnx", ["ONNX Runtime 1.23 or later"], Outcome.REFUSED, "has no ONNX Runtime"),
        ("26.07", "hf", ["vLLM"], Outcome.REFUSED, "Triton takes no artifact of kind hf"),
        ("26.07", "vllm", ["vLLM"], Outcome.LOADS, "vLLM 0.24.0"),
        ("tritonserver:26.07-trtllm", "vllm", ["vLLM"], Outcome.REFUSED, "it has no vLLM"),
        ("25.08", "llmapi", ["TensorRT-LLM 1.0 or later"], Outcome.REFUSED, "it has TensorRT-LLM 0.21.0"),
        ("25.09", "llmapi", ["TensorRT-LLM 1.0 or later"], Outcome.LOADS, "TensorRT-LLM 1.0.0"),
        ("trtllm:1.2", "trtllm", ["TensorRT-LLM 0.8 to 1.2"], Outcome.NEEDS, "TensorRT-LLM 1.2"),
        ("trtllm:1.2.1", "trtllm", ["TensorRT-LLM 0.8 to 1.2"], Outcome.NEEDS, "TensorRT-LLM 1.2.1"),
        ("trtllm:1.3.0rc22", "trtllm", ["TensorRT-LLM 0.8 to 1.2"], Outcome.REFUSED, "1.3.0rc22"),
        ("trtllm:0.7", "trtllm", ["TensorRT-LLM 0.8 to 1.2"], Outcome.REFUSED, "0.7"),
        ("nim:1.15", "trtllm", ["TensorRT-LLM 0.8 to 1.2", "NIM 1.x"], Outcome.NEEDS, "NIM 1.15"),
        ("nim:2.1", "trtllm", ["TensorRT-LLM 0.8 to 1.2", "NIM 1.x"], Outcome.REFUSED, "NIM 1.x loads it"),
        ("nim:2.1", "hf", ["vLLM"], Outcome.NEEDS, "vLLM 0.31.0"),
        ("nim:2.1", "vllm", ["vLLM"], Outcome.REFUSED, "NIM takes no artifact of kind vllm"),
        ("26.02", "trtllm_engine", ENGINE, Outcome.NEEDS, "TensorRT-LLM 1.1.0"),
        ("26.02@h100", "trtllm_engine", ENGINE, Outcome.NEEDS, "TensorRT-LLM 1.1.0"),
        ("26.02@a100", "trtllm_engine", ENGINE, Outcome.REFUSED, "SM 80 is meant"),
        ("26.03@sm90", "trtllm_engine", ENGINE, Outcome.REFUSED, "it has TensorRT-LLM 1.2.0"),
        ("26.07@v100", "onnx", ["ONNX Runtime 1.23 or later"], Outcome.REFUSED, "GPUs of SM 75 or later"),
        ("nim:1.15", "trtllm_engine", ENGINE, Outcome.UNKNOWN, "seen in no source"),
        ("26.07", "tensorrt", ["TensorRT 10.14.1 on GPUs of SM 90"], Outcome.UNKNOWN, "seen in no source"),
        ("26.07", "from-elsewhere", ["vLLM"], Outcome.UNKNOWN, "no row speaks of artifacts of kind from-elsewhere"),
        ("26.07", "vllm", ["transformers"], Outcome.REFUSED, "what loads it is transformers"),
    ],
)
def test_a_verdict_follows_from_the_rows(word: str, kind: str, loads: list[str], outcome: Outcome, reason: str) -> None:
    found = judge(kind, loads, runtime(word))
    assert found.outcome is outcome, found
    assert reason in found.reason
    assert (outcome is Outcome.NEEDS) == bool(found.first and not found.refused)


def test_a_release_without_a_container_is_its_best_container() -> None:
    for loads, kind, flavour in (
        (["ONNX Runtime 1.23 or later"], "onnx", "py3"),
        (["TensorRT-LLM 1.0 or later"], "llmapi", "trtllm"),
        (["vLLM"], "vllm", "vllm"),
    ):
        assert judge(kind, loads, triton("26.07")).place == f"tritonserver:26.07-{flavour}"
        assert judge(kind, loads, runtime(f"tritonserver:26.07-{flavour}")).outcome is Outcome.LOADS


@pytest.mark.parametrize(
    ("word", "nearest"),
    [("27.01", "26.07"), ("tritonserver:24.01-vllm", "24.04"), ("nim:3.0", "2.1.5"), ("nim:1.12", "1.10")],
)
def test_a_release_that_no_row_speaks_of_is_not_known_and_the_nearest_is_named(word: str, nearest: str) -> None:
    found = runtime(word)
    assert found.note.endswith(nearest)
    loads, kind = (["vLLM 0.9 or later"], "hf" if word.startswith("nim") else "vllm")
    assert judge(kind, loads, found).outcome is Outcome.UNKNOWN
    assert not runtime(word.partition(":")[0] if ":" in word else "tritonserver").note


@pytest.mark.parametrize(
    ("word", "way_out"),
    [
        ("tritonsever:26.07", "did you mean tritonserver?"),
        ("tritonserver:26.13", "called by year and month"),
        ("tritonserver:2.51", "called by year and month"),
        ("tritonserver:26.07-tensorrtllm", "py3, trtllm, vllm"),
        ("trtllm:new", "names no release"),
        ("26.07@h1000", "h100"),
        ("", "write tritonserver:26.07"),
    ],
)
def test_a_word_that_is_no_runtime_is_refused_with_what_is(word: str, way_out: str) -> None:
    with pytest.raises(UsageError, match=re.escape(way_out)):
        runtime(word)


def test_a_container_is_named_as_it_is_pulled() -> None:
    images = {place.image for place in runtime("nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3").places}
    assert images == {"nvcr.io/nvidia/tritonserver:26.07-trtllm-python-py3"}
    assert [place.image for place in runtime("trtllm:1.2").places] == [None]


def test_the_oldest_release_that_loads_it_and_all_later_ones_do() -> None:
    assert least_triton("onnx", ["ONNX Runtime 1.23 or later"], "24.10") == "25.08"
    assert least_triton("trtllm_engine", ENGINE, "24.10") == "25.12"
    assert least_triton("onnx", ["ONNX Runtime 1.99 or later"], "24.10") is None
    for kind, module in plugins.load_all(TARGETS).items():
        if (oldest := least_triton(kind, module.LOADS, "24.10")) and kind != "trtllm":
            later = [row.release for row in TRITON if row.release >= oldest]
            assert all(not judge(kind, module.LOADS, triton(release)).refused for release in later)


def test_a_stamp_that_contradicts_itself() -> None:
    assert contradiction(ENGINE, {"tensorrt_llm": "1.1.0", "sm": 90}) is None
    assert "built with TensorRT-LLM 1.1.1" in str(contradiction(ENGINE, {"tensorrt_llm": "1.1.1", "sm": 90}))
    assert "built for SM 80" in str(contradiction(ENGINE, {"tensorrt_llm": "1.1.0", "sm": 80}))
    assert contradiction(["vLLM"], {}) is None


@pytest.mark.parametrize(
    ("engines", "sms", "reason"),
    [
        ({"tensorrt_llm": "1.1.0"}, (90,), None),
        ({"tensorrt_llm": "1.1.0"}, (80, 90), None),
        ({"tensorrt_llm": "1.1.0"}, (80,), "this machine has SM 80"),
        ({"tensorrt_llm": "1.1.0"}, (), "no GPU that can be asked"),
        ({"tensorrt_llm": "1.2.1"}, (90,), "this machine has TensorRT-LLM 1.2.1"),
        ({}, (90,), "this machine has none"),
    ],
)
def test_an_engine_fits_the_machine_that_has_its_release_and_its_gpu(
    engines: dict[str, str], sms: tuple[int, ...], reason: str | None
) -> None:
    here = {engine: version(found) for engine, found in engines.items()}
    found = misfit("trtllm_engine", ENGINE, {"tensorrt_llm": "1.1.0", "sm": 90}, here, sms)
    assert found == reason if reason is None else reason in str(found)


def test_of_an_engine_that_is_not_here_nothing_is_said_of_what_it_did_not_build() -> None:
    assert misfit("vllm", ["vLLM 0.9 or later"], {}, {"vllm": None}, ()) is None
    assert "0.8.0" in str(misfit("vllm", ["vLLM 0.9 or later"], {}, {"vllm": version("0.8.0")}, ()))


def test_an_engine_that_would_not_serve_it_may_be_of_any_release() -> None:
    loads = ["ONNX Runtime 1.23 or later", "TensorRT 10.15 or later"]
    here = {"onnxruntime": version("1.31.1"), "tensorrt": version("10.13.0")}
    assert misfit("onnx", loads, {}, here, ()) is None
    assert "has ONNX Runtime 1.22.0" in str(misfit("onnx", loads, {}, {**here, "onnxruntime": version("1.22.0")}, ()))
