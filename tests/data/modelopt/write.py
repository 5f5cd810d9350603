"""Writes what lies beside it: a tiny Llama, tokens, its activations as transformers computes them and ModelOpt sums
them up, and a digest of every tensor that ModelOpt exports of it. Needs nvidia-modelopt 0.47 (`python write.py`)."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
import transformers
from blake3 import blake3
from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from nemoport.calibration.search import losses
from nemoport.exporters import source
from nemoport.exporters.statistics import Statistics, to_bytes

HERE = Path(__file__).parent
BATCH = 2
"""Rows: the means of ModelOpt's batches are rounded, so its pre-scales depend on it."""
CONFIGS = {
    "fp8": "FP8_DEFAULT_CFG",
    "fp8_dynamic": "FP8_PER_CHANNEL_PER_TOKEN_CFG",
    "fp8_block": "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
    "int8": "INT8_WEIGHT_ONLY_CFG",
    "int8_sq": "INT8_SMOOTHQUANT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "nvfp4": "NVFP4_DEFAULT_CFG",
    "nvfp4_weights": "W4A16_NVFP4_CFG",
}
RANKS = {"fp8": 2, "int4_awq": 1, "int8_sq": 1, "nvfp4": 1}
"""Those that are exported for TensorRT-LLM too, and at which tp."""
LINEARS = {
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.o",
    "mlp.gate_proj": "ffn.gate",
    "mlp.up_proj": "ffn.up",
    "mlp.down_proj": "ffn.down",
}


def loaded() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(HERE, dtype=torch.bfloat16)


def run(model: Any) -> None:
    tokens = np.load(HERE / "tokens.npz")["tokens"]
    with torch.no_grad():
        for start in range(0, len(tokens), BATCH):
            model(torch.from_numpy(tokens[start : start + BATCH]))


def make_model() -> None:
    torch.manual_seed(11)
    config = transformers.LlamaConfig(
        vocab_size=67,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=64,
        dtype="bfloat16",
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    for name, each in model.named_parameters():  # channels that differ, so that a search has something to find
        if "layernorm" in name:
            each.data = torch.exp(torch.randn(each.shape)).to(each.dtype)
    model.save_pretrained(HERE)
    tokens = np.random.default_rng(3).integers(0, 67, (8, 16))
    np.savez(HERE / "tokens.npz", tokens=tokens)


def make_statistics() -> None:
    model, seen, canonical = loaded(), dict[str, list[Tensor]](), source.model(HERE)

    def keep(name: str, module: Any, given: Any) -> None:
        seen.setdefault(name, []).append(given[0].reshape(-1, given[0].shape[-1]))

    for name, module in model.named_modules():
        place = name.split(".", 3)
        if len(place) == 4 and place[3] in LINEARS:
            module.register_forward_pre_hook(partial(keep, f"layers.{place[2]}.{LINEARS[place[3]]}"))
    run(model)
    arrays = {}
    for name, inputs in seen.items():
        mean = torch.stack([x.abs().mean(0).float() for x in inputs]).mean(0).numpy()  # as awq_lite averages batches
        rows = torch.cat(inputs).float()
        arrays[f"{name}/amax"], arrays[f"{name}/mean"] = rows.abs().amax(0).numpy(), mean
        arrays[f"{name}/losses"] = losses(canonical.tensors[f"{name}.weight"], mean, rows.T @ rows / len(rows))
    (HERE / "statistics.npz").write_bytes(to_bytes(Statistics(arrays, {"computed by": "transformers"})))


def digests(path: Path) -> Iterator[tuple[str, list[Any]]]:
    for name, tensor in sorted(load_file(path).items()):
        content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        number = [tensor.item()] if tensor.numel() == 1 else []
        yield (
            name,
            [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), blake3(content).hexdigest()[:32], *number],
        )


def make_losses() -> dict[str, list[float]]:
    """What each exponent cost in awq_lite's search: the mean squared error of a linear's output in bfloat16."""
    recipe = copy.deepcopy(mtq.INT4_AWQ_CFG)
    recipe["algorithm"] = {"method": "awq_lite", "alpha_step": 0.1, "debug": True}
    model, found = mtq.quantize(loaded(), recipe, run), {}
    batches = len(np.load(HERE / "tokens.npz")["tokens"]) // BATCH
    for name, module in model.named_modules():
        if search := getattr(module, "awq_lite", None):
            layer, place = name.split(".", 3)[2:]
            found[f"layers.{layer}.{LINEARS[place]}"] = [loss / batches for loss in search.loss.values()]
    return found


def make_exports() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method, config in CONFIGS.items():
        for kv_cache in (False, True) if method == "fp8" else (False,):
            recipe = copy.deepcopy(getattr(mtq, config))
            recipe["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"] if kv_cache else []
            model = mtq.quantize(loaded(), recipe, run)
            key = f"hf {method}" + (" kv" if kv_cache else "")
            with TemporaryDirectory() as scratch:
                export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=scratch)
                found[key] = {
                    "tensors": dict(digests(Path(scratch) / "model.safetensors")),
                    "hf_quant_config.json": json.loads((Path(scratch) / "hf_quant_config.json").read_text()),
                    "quantization_config": json.loads((Path(scratch) / "config.json").read_text())[
                        "quantization_config"
                    ],
                }
    for method, tp in RANKS.items():
        model = mtq.quantize(loaded(), copy.deepcopy(getattr(mtq, CONFIGS[method])), run)
        with TemporaryDirectory() as scratch:
            export_tensorrt_llm_checkpoint(
                model, "llama", torch.bfloat16, scratch, inference_tensor_parallel=tp, inference_pipeline_parallel=1
            )
            found[f"trtllm {method}"] = {
                "tp": tp,
                "ranks": [dict(digests(Path(scratch) / f"rank{rank}.safetensors")) for rank in range(tp)],
                "quantization": json.loads((Path(scratch) / "config.json").read_text())["quantization"],
            }
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    make_model()
    make_statistics()
    found = {**make_exports(), "losses": make_losses()}
    (HERE / "exports.json").write_text(json.dumps(found, indent=1) + "\n")
