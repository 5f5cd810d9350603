"""Writes `exports.json` beside it: what compressed-tensors 0.20 makes of the linears of the model in `../modelopt`, as
digests of what it stores and of what it then decompresses. Needs compressed-tensors 0.20 (`python compress.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
PRESETS = {
    "fp8": ("FP8", "float-quantized"),
    "fp8_dynamic": ("FP8_DYNAMIC", "float-quantized"),
    "fp8_block": ("FP8_BLOCK", "float-quantized"),
    "int8": (None, "pack-quantized"),
    "int4": ("W4A16", "pack-quantized"),
    "nvfp4_weights": ("NVFP4A16", "nvfp4-pack-quantized"),
}
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def scheme(preset: str | None) -> QuantizationScheme:
    if preset is None:
        return QuantizationScheme(targets=["Linear"], weights=INT8)
    return preset_name_to_scheme(preset, ["Linear"])


def blocks(weight: Tensor, strategy: str, group: int | None) -> Tensor:
    """What shares a scale along the last axes."""
    if strategy == "tensor":
        return weight.reshape(1, -1)
    if strategy == "block":
        rows, inputs = weight.shape
        return weight.reshape(rows // 128, 128, inputs // 128, 128).transpose(1, 2).flatten(2)
    return weight[:, None] if strategy == "channel" else weight.reshape(len(weight), -1, group or weight.shape[1])


def digest(tensor: Tensor) -> list[Any]:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), blake3(content).hexdigest()[:32]]


def main() -> None:
    stored = load_file(HERE.parent / "modelopt/model.safetensors")
    found: dict[str, Any] = {}
    for method, (preset, form) in PRESETS.items():
        how = scheme(preset)
        args, compressor = how.weights, BaseCompressor.get_value_from_registry(form)
        assert args is not None
        said: dict[str, Any] = {"tensors": {}, "decompressed": {}}
        for name, weight in stored.items():
            if not name.endswith("_proj.weight"):
                continue
            parent, linear = name.removesuffix(".weight").rpartition(".")[::2]
            together = next((group for group in FUSED if linear in group), (linear,))
            each = blocks(weight, str(args.strategy), args.group_size)
            extra: dict[str, Tensor] = {}
            if "nvfp4" in method:
                amax = torch.stack([stored[f"{parent}.{other}.weight"].abs().max() for other in together]).max().float()
                extra["weight_global_scale"] = generate_gparam(-amax, amax)
            scale, _ = calculate_qparams(each.amin(-1), each.amax(-1), args, extra.get("weight_global_scale"))
            state = compressor.compress({"weight": weight, "weight_scale": scale, **extra}, how)
            for field, tensor in state.items():
                said["tensors"][f"{parent}.{linear}.{field}"] = digest(tensor)
            numbers = compressor.decompress(state, how)["weight"]
            said["decompressed"][name] = digest(numbers)
        said["weights"] = {key: value for key, value in args.model_dump(mode="json").items() if value is not None}
        found[method] = said
    (HERE / "exports.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
