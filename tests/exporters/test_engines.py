"""Artifacts for engines of texts: the `hf` directory whatever the ranks, and arguments that the engines document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemoport import calibration
from nemoport.errors import NemoportError
from nemoport.exporters import convert, stream
from nemoport.exporters.methods import ENGINES
from nemoport.exporters.quantize import KV_CACHES
from nemoport.exporters.targets import llmapi, vllm
from nemoport.spec import Plan, Recipe
from nemoport.validation import Request, validate

from .commands import artifact_of, command
from .conftest import Once
from .fixtures import DATA, LLAMA

MODELOPT = DATA / "modelopt"
SIDECARS = {"vllm": "model.json", "llmapi": "model.yaml"}
COUNT = range(1, 1 << 20)
FRACTION = (0.0, 1.0)
"""From, to."""
DOCUMENTED: dict[str, dict[str, Any]] = {
    # AsyncEngineArgs: docs.vllm.ai, "Engine Arguments"; vllm/engine/arg_utils.py. The types of a cache: CacheDType of
    # vllm/config/cache.py, as far as every release since 0.10 has them. Methods: QUANTIZATION_METHODS.
    "vllm": {
        "model": str,
        "tokenizer": str,
        "dtype": {"auto", "half", "float16", "bfloat16", "float", "float32"},
        "max_model_len": COUNT,
        "tensor_parallel_size": COUNT,
        "pipeline_parallel_size": COUNT,
        "enable_expert_parallel": bool,
        "kv_cache_dtype": {"auto", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"},
        "quantization": {"awq", "fp8", "modelopt", "modelopt_fp4", "gptq", "compressed-tensors"},
        "gpu_memory_utilization": FRACTION,
    },
    # TorchLlmArgs, KvCacheConfig: nvidia.github.io/TensorRT-LLM, "LLM API Reference"; tensorrt_llm/llmapi/llm_args.py.
    # triton_config: TensorRT-LLM's triton_backend/all_models/llmapi/tensorrt_llm/1/model.yaml and model.py, which wants
    # max_batch_size 0.
    "llmapi": {
        "model": str,
        "tokenizer": str,
        "backend": {"pytorch", "_autodeploy"},
        "dtype": {"auto", "float16", "bfloat16", "float32"},
        "tensor_parallel_size": COUNT,
        "pipeline_parallel_size": COUNT,
        "moe_expert_parallel_size": COUNT,
        "moe_tensor_parallel_size": COUNT,
        "kv_cache_config": {
            "dtype": {"auto", "fp8", "nvfp4"},
            "free_gpu_memory_fraction": FRACTION,
            "enable_block_reuse": bool,
        },
        "triton_config": {"max_batch_size": range(1), "decoupled": bool, "cancellation_check_period_ms": COUNT},
    },
}
MANDATORY = {
    "vllm": ("model", "tensor_parallel_size", "pipeline_parallel_size"),
    "llmapi": ("model", "backend", "tensor_parallel_size", "pipeline_parallel_size", "triton_config"),
}
CASES: dict[str, tuple[Plan, str | None]] = {
    "one rank": (Plan(), None),
    "tp 2, pp 3": (Plan(tp=2, pp=3), None),
    "experts": (Plan(tp=4, ep=4), None),
    **{f"{name} cache": (Plan(), word) for name, word in KV_CACHES.items()},
}
every_engine = pytest.mark.parametrize("target", ENGINES)


@every_engine
@pytest.mark.parametrize("case", CASES)
def test_every_argument_is_one_that_the_engine_documents(target: str, case: str) -> None:
    said = arguments(target, *CASES[case])
    check(said, DOCUMENTED[target])
    plan = CASES[case][0]
    assert (said["tensor_parallel_size"], said["pipeline_parallel_size"]) == (plan.tp, plan.pp)


def arguments(target: str, plan: Plan, kv_cache: str | None) -> dict[str, Any]:
    return vllm.arguments(plan, kv_cache) if target == "vllm" else llmapi.arguments(plan, kv_cache)


def check(said: dict[str, Any], documented: dict[str, Any], place: str = "") -> None:
    """Every field by its row: a type, the values there are, a range of whole numbers, two bounds, or fields again."""
    for name, value in said.items():
        row, what = documented[name], f"{place}{name} is {value!r}"
        if isinstance(row, dict):
            check(value, row, f"{place}{name}.")
        elif isinstance(row, type):
            assert type(value) is row, what
        elif isinstance(row, tuple):
            assert type(value) is float, what
            assert row[0] <= value <= row[1], what
        else:
            assert type(value) is (int if isinstance(row, range) else str), what
            assert value in row, what


@every_engine
@pytest.mark.parametrize(
    "name, value",
    [
        ("model", 1),
        ("tensor_parallel_size", 0),
        ("tensor_parallel_size", True),
        ("pipeline_parallel_size", "2"),
        ("tensor_parallel", 2),
        ("dtype", "bf16"),
    ],
)
def test_a_field_that_is_not_documented_does_not_pass(target: str, name: str, value: Any) -> None:
    with pytest.raises((AssertionError, KeyError)):
        check({name: value}, DOCUMENTED[target])


@every_engine
def test_what_is_written_says_what_the_plan_does(target: str, once: Once) -> None:
    directory = once(LLAMA["nemo2"], target, tp=2)
    said = yaml.safe_load((directory / SIDECARS[target]).read_text())
    check(said, DOCUMENTED[target])
    assert (directory / said["model"] / "config.json").is_file()
    assert said["tensor_parallel_size"] == 2
    assert set(MANDATORY[target]) <= said.keys()
    assert "${" not in (directory / SIDECARS[target]).read_text()


@every_engine
def test_the_weights_are_those_of_hf_whatever_the_ranks(target: str, once: Once) -> None:
    same_weights(once(LLAMA["nemo2"], "hf"), once(LLAMA["nemo2"], target, tp=2, pp=2))


@every_engine
def test_a_quantized_directory_is_that_of_hf_and_its_cache_is_an_argument(target: str, tmp_path: Path) -> None:
    seen = calibration.from_tokens(MODELOPT / "tokens.npz", MODELOPT, None, calibration.Limits())
    for to, tp in (("hf", 1), (target, 2)):
        plan = Plan(tp=tp, recipe=Recipe(method="fp8", kv_cache="fp8"))
        stream.run(convert.plan(MODELOPT, to, tmp_path / to, plan=plan, calibration=seen))
    same_weights(tmp_path / "hf", tmp_path / target)
    said = yaml.safe_load((tmp_path / target / SIDECARS[target]).read_text())
    check(said, DOCUMENTED[target])
    assert (said.get("kv_cache_dtype") or said["kv_cache_config"]["dtype"]) == "fp8"
    whole, engine = (validate(Request(subject=tmp_path / to)) for to in ("hf", target))
    assert {check.name: check.passed for check in engine.checks} == {check.name: check.passed for check in whole.checks}


def same_weights(whole: Path, engine: Path) -> None:
    files = {file.path for file in artifact_of(whole).files} - {"ledger.jsonl", "calibration.npz"}
    assert files == {path.name for path in (engine / "weights").iterdir()}
    for name in files:
        assert (engine / "weights" / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    "target, plan, words",
    [
        ("vllm", Plan(tp=4, ep=2), "use ep 1 or 4"),
        ("vllm", Plan(tp=3), "tp=3"),
        ("llmapi", Plan(tp=3), "tp=3"),
        ("vllm", Plan(recipe=Recipe(method="int8")), "vLLM is not among them; use --to hf"),
    ],
)
def test_what_an_engine_cannot_load_is_refused_before_anything_is_written(
    target: str, plan: Plan, words: str, tmp_path: Path
) -> None:
    with pytest.raises(NemoportError, match=words):
        convert.plan(LLAMA["nemo2"].path, target, tmp_path / "out", config=LLAMA["nemo2"].config, plan=plan)


def test_the_command_line_of_vllm_is_said(tmp_path: Path) -> None:
    result = command(
        "convert", LLAMA["nemo2"].path, "--to", "vllm", "--tp", 2, "-o", tmp_path / "out", "--dry-run", "--json"
    )
    assert result.exit_code == 0, result.stderr
    first = json.loads(result.stdout)["loads"][0]
    assert first == "vLLM (vllm serve DIR/weights --tensor-parallel-size 2 --pipeline-parallel-size 1)"
