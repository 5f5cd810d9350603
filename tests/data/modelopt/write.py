"""Writes what lies beside it: a tiny Llama, tokens, its activations as transformers computes them and ModelOpt sums
them up, and a digest of every tensor that ModelOpt exports of it. Needs nvidia-modelopt 0.47 (`python write.py`)."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
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
from modelopt.torch.export.model_config import QUANTIZATION_INT8_WO
from modelopt.torch.export.quant_utils import from_quantized_weight, pack_int4_in_uint8
from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor
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
RANKS = {"fp8": 2, "fp8 kv": 2, "int4_awq": 1, "int8_sq": 1, "nvfp4": 1}
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
        yield name, digest(tensor)


def digest(tensor: Tensor) -> list[Any]:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    number = [tensor.item()] if tensor.numel() == 1 else []
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), blake3(content).hexdigest()[:32], *number]


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


def unpacked(method: str, tensors: dict[str, Tensor]) -> dict[str, list[Any]]:
    """What ModelOpt's own reading of an export stands for, in float32, by linear; what it is multiplied with beside."""
    found = {}
    for name in sorted(name for name in tensors if f"{name}_scale" in tensors):
        linear = name.removesuffix(".weight")
        numbers = UNPACK[method](tensors[name], tensors, linear)
        if (pre_scale := tensors.get(f"{linear}.pre_quant_scale")) is not None:
            numbers = numbers * pre_scale.float()
        found[linear] = digest(numbers + 0)[:3]  # its table for NVFP4 has no zero below zero
    return found


def fp8(weight: Tensor, tensors: dict[str, Tensor], linear: str, **blocks: Any) -> Tensor:
    scale = tensors[f"{linear}.weight_scale"].float()
    scale = scale[:, None] if scale.dim() == 1 else scale[:, 0, :, 0] if blocks else scale
    packed = FP8QTensor(weight.shape, torch.float32, weight.float())  # it multiplies in the dtype of the numbers
    numbers: Tensor = packed.dequantize(torch.float32, scale=scale, **blocks)
    return numbers


def int8(weight: Tensor, tensors: dict[str, Tensor], linear: str) -> Tensor:
    scale = tensors[f"{linear}.weight_scale"]
    numbers: Tensor = from_quantized_weight(weight, scale, QUANTIZATION_INT8_WO, torch.float32)
    return numbers


def int4(weight: Tensor, tensors: dict[str, Tensor], linear: str) -> Tensor:
    """It only packs: what it packs to the same bytes again."""
    scale = tensors[f"{linear}.weight_scale"]
    nibbles = torch.stack([weight & 15, weight >> 4], 1).reshape(-1, weight.shape[1]).to(torch.int8)
    numbers = ((nibbles ^ 8) - 8).float() * scale.repeat_interleave(128, 1)
    assert torch.equal(pack_int4_in_uint8(numbers, scale, 128), weight)
    return numbers


def nvfp4(weight: Tensor, tensors: dict[str, Tensor], linear: str) -> Tensor:
    scale, whole = tensors[f"{linear}.weight_scale"], tensors[f"{linear}.weight_scale_2"]
    packed = NVFP4QTensor((weight.shape[0], 2 * weight.shape[1]), torch.float32, weight)
    numbers: Tensor = packed.dequantize(torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16})
    return numbers


UNPACK: dict[str, Callable[..., Tensor]] = {
    "fp8": fp8,
    "fp8_dynamic": fp8,
    "fp8_block": partial(fp8, block_sizes={0: 128, 1: 128}),
    "int8": int8,
    "int8_sq": int8,
    "int4_awq": int4,
    "nvfp4": nvfp4,
    "nvfp4_weights": nvfp4,
}


def quantized(export: str) -> Any:
    """A method, and whether its cache is FP8."""
    method, *kv_cache = export.split()
    recipe = copy.deepcopy(getattr(mtq, CONFIGS[method]))
    recipe["quant_cfg"] += mtq.FP8_KV_CFG["quant_cfg"] if kv_cache else []
    return mtq.quantize(loaded(), recipe, run)


def make_exports() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for export in [*CONFIGS, "fp8 kv"]:
        with TemporaryDirectory() as scratch:
            at = Path(scratch)
            export_hf_checkpoint(quantized(export), dtype=torch.bfloat16, export_dir=scratch)
            found[f"hf {export}"] = {
                "tensors": dict(digests(at / "model.safetensors")),
                "unpacked": unpacked(export.split()[0], load_file(at / "model.safetensors")),
                "hf_quant_config.json": json.loads((at / "hf_quant_config.json").read_text()),
                "quantization_config": json.loads((at / "config.json").read_text())["quantization_config"],
            }
    for export, tp in RANKS.items():
        model = quantized(export)
        with TemporaryDirectory() as scratch:
            export_tensorrt_llm_checkpoint(
                model, "llama", torch.bfloat16, scratch, inference_tensor_parallel=tp, inference_pipeline_parallel=1
            )
            found[f"trtllm {export}"] = {
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
