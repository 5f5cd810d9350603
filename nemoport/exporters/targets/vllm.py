"""`vllm`: the `hf` directory below `weights/`, and `model.json` with the engine's arguments for Triton's vLLM backend;
tp, pp and ep are written there and cut no file.

The backend gives `model.json` to vLLM's AsyncEngineArgs as it stands (triton-inference-server/vllm_backend,
src/model.py), so vLLM looks for a relative `model` from where tritonserver was started, and not from the version. Our
runner looks from the version.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemoport.artifact import json_bytes
from nemoport.errors import UsageError
from nemoport.exporters import serving
from nemoport.exporters.checkpoint import Model, Output
from nemoport.exporters.targets import hf
from nemoport.spec import Plan

DIALECTS, PASSES = hf.DIALECTS, hf.PASSES
LOADS = serving.of_engine(hf.LOADS, "vllm")
FILE = "model.json"


def output(model: Model, plan: Plan) -> Output:
    if plan.ep not in (1, plan.tp):
        raise UsageError(
            f"vLLM spreads experts over all ranks of tp or over none, ep={plan.ep} of tp={plan.tp} was asked for; "
            f"use ep 1 or {plan.tp}"
        )
    made = serving.weights(model, plan, "vllm")
    said = arguments(plan, model.quantized.kv_cache if model.quantized else None)
    options = "".join(_option(name, value) for name, value in said.items() if name != "model")
    return replace(
        made,
        sidecars={FILE: json_bytes(said), **made.sidecars},
        loads=(
            *(f"{each} (vllm serve DIR/{serving.WEIGHTS}{options})" for each in made.loads),
            f"Triton's vLLM backend, once {FILE} says the full path of {serving.WEIGHTS}/ in its version",
        ),
    )


def arguments(plan: Plan, kv_cache: str | None) -> dict[str, Any]:
    """Of vLLM's AsyncEngineArgs."""
    said: dict[str, Any] = {
        "model": serving.WEIGHTS,
        "tensor_parallel_size": plan.tp,
        "pipeline_parallel_size": plan.pp,
    }
    if plan.ep > 1:
        said["enable_expert_parallel"] = True
    if kv_cache:
        said["kv_cache_dtype"] = kv_cache.lower()
    return said


def _option(name: str, value: Any) -> str:
    """The same on vLLM's command line."""
    flag = f" --{name.replace('_', '-')}"
    return flag if value is True else f"{flag} {value}"
