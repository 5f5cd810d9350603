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
from nemoport.exporters.targets import llmapi, vllm
from nemoport.spec import Plan, Recipe
from nemoport.validation import Request, validate

from .commands import artifact_of, command
from .conftest import Once
from .fixtures import DATA, LLAMA

MODELOPT = DATA / "modelopt"
SIDECARS = {"vllm": "model.json", "llmapi": "model.yaml"}
DOCUMENTED = {
    # AsyncEngineArgs: docs.vllm.ai, "Engine Arguments"; vllm/engine/arg_utils.py
    "vllm": {
        "model": str,
        "tokenizer": str,
        "dtype": str,
        "max_model_len": int,
        "tensor_parallel_size": int,
        "pipeline_parallel_size": int,
        "enable_expert_parallel": bool,
        "kv_cache_dtype": str,
        "quantization": str,
        "gpu_memory_utilization": float,
    },
    # TorchLlmArgs: nvidia.github.io/TensorRT-LLM, "LLM API Reference"; tensorrt_llm/llmapi/llm_args.py.
    # triton_config: TensorRT-LLM's triton_backend/all_models/llmapi/tensorrt_llm/1/model.yaml and model.py
    "llmapi": {
        "model": str,
        "tokenizer": str,
        "backend": str,
        "dtype": str,
        "tensor_parallel_size": int,
        "pipeline_parallel_size": int,
        "moe_expert_parallel_size": int,
        "moe_tensor_parallel_size": int,
        "kv_cache_config": {"dtype": str, "free_gpu_memory_fraction": float, "enable_block_reuse": bool},
        "triton_config": {"max_batch_size": int, "decoupled": bool, "cancellation_check_period_ms": int},
    },
}
CASES: dict[str, tuple[Plan, str | None]] = {
    "one rank": (Plan(), None),
    "tp 2, pp 3": (Plan(tp=2, pp=3), None),
    "experts": (Plan(tp=4, ep=4), None),
    "fp8 cache": (Plan(), "FP8"),
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


def check(said: dict[str, Any], documented: Any) -> None:
    for name, value in said.items():
        kind = documented[name]
        if isinstance(kind, dict):
            check(value, kind)
        else:
            assert type(value) is kind, name


@every_engine
def test_what_is_written_says_what_the_plan_does(target: str, once: Once) -> None:
    directory = once(LLAMA["nemo2"], target, tp=2)
    said = yaml.safe_load((directory / SIDECARS[target]).read_text())
    check(said, DOCUMENTED[target])
    assert (directory / said["model"] / "config.json").is_file()
    assert said["tensor_parallel_size"] == 2
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
