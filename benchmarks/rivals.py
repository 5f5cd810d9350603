"""What nemoport is measured beside: ModelOpt's export and onnxruntime-genai, run by the Python that has them."""

from __future__ import annotations

import os
from pathlib import Path

PYTHON = Path(os.environ.get("NEMOPORT_BENCH_PYTHON", Path(__file__).parents[1] / ".venv-bench/bin/python"))
"""That of the venv which `make bench` makes from requirements.txt."""
MODELOPT = """
import sys, warnings
warnings.simplefilter("ignore")
import modelopt.torch.quantization as mtq, torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
mtq.quantize(model, getattr(mtq, sys.argv[3]), lambda m: m(torch.arange(8)[None]))
export_hf_checkpoint(model, export_dir=sys.argv[2])
"""
"""Calibrated on eight tokens, which is as near to none as it goes."""
MODELOPT_START = "import torch, modelopt.torch.quantization, modelopt.torch.export, transformers"
BUILDER = "onnxruntime_genai.models.builder"
DECODE = """
import json, sys, time
import onnxruntime_genai as genai
prompt, steps = map(int, sys.argv[2:])
model = genai.Model(sys.argv[1])
params = genai.GeneratorParams(model)
params.set_search_options(max_length=prompt + steps + 1, min_length=prompt + steps + 1, do_sample=False)
generator = genai.Generator(model, params)
generator.append_tokens(list(range(1, prompt + 1)))
seconds = []
for _ in range(steps):
    start = time.perf_counter(), time.process_time()
    generator.generate_next_token()
    seconds.append((time.perf_counter() - start[0], time.process_time() - start[1]))
print(json.dumps(seconds[1:]))
"""


def here() -> bool:
    return PYTHON.is_file()


def absence() -> str:
    return f"ModelOpt and onnxruntime-genai are not measured: there is no {PYTHON}, which `make bench` makes\n"
