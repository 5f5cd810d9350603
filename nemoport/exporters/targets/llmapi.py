"""`llmapi`: the `hf` directory below `weights/`, with a `model.py` for Triton's python backend that gives text to
TensorRT-LLM's LLM API, and its `model.yaml`; tp, pp and ep are written there and cut no file.

`model.yaml` holds the arguments of `tensorrt_llm.LLM` (llmapi/llm_args.py) and `triton_config`, as NVIDIA's own model
of this kind has them (TensorRT-LLM, triton_backend/all_models/llmapi).
"""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from typing import Any

import yaml

from nemoport.exporters import serving
from nemoport.exporters.checkpoint import Model, Output
from nemoport.exporters.targets import hf
from nemoport.spec import Plan

DIALECTS, PASSES = hf.DIALECTS, hf.PASSES
LOADS = serving.of_engine(hf.LOADS, "llmapi")
PROGRAM, SETTINGS = "model.py", "model.yaml"
TRITON = {"max_batch_size": 0, "decoupled": True, "cancellation_check_period_ms": 100}
_HEAD = """\
# Arguments of tensorrt_llm.LLM; `model` is relative to this file. triton_config is for model.py beside it.
"""


def output(model: Model, plan: Plan) -> Output:
    made = serving.weights(model, plan, "llmapi")
    said = arguments(plan, model.quantized.kv_cache if model.quantized else None) | {"triton_config": TRITON}
    text = _HEAD + yaml.safe_dump(said, sort_keys=False)
    own = {PROGRAM: (files("nemoport") / "templates/llmapi/model.py").read_bytes(), SETTINGS: text.encode()}
    triton = "Triton's python backend in a container with TensorRT-LLM (tritonserver:YY.MM-trtllm-python-py3)"
    return replace(made, sidecars={**own, **made.sidecars}, loads=(*made.loads, triton))


def arguments(plan: Plan, kv_cache: str | None) -> dict[str, Any]:
    """Of `tensorrt_llm.LLM`."""
    said: dict[str, Any] = {
        "model": serving.WEIGHTS,
        "backend": "pytorch",
        "tensor_parallel_size": plan.tp,
        "pipeline_parallel_size": plan.pp,
    }
    if plan.ep > 1:
        said |= {"moe_expert_parallel_size": plan.ep, "moe_tensor_parallel_size": plan.expert_tp}
    if kv_cache:
        said["kv_cache_config"] = {"dtype": kv_cache.lower()}
    return said
