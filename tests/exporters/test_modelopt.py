"""Checkpoints that ModelOpt quantized: passed on bit for bit where a target has room for them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nemoport.artifact import read_manifest
from nemoport.exporters import source
from nemoport.exporters.dequantized import dequantized
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.tensor import cut, read

from .commands import command, converted
from .modelopt import CKPT, METHODS, SMALL, SPEC, Twin, every_method, save, stored_bytes

FIXTURES = os.environ.get("NEMOPORT_FIXTURES")
"""A folder of checkpoints too large to come along; `trtllm/ckpt` in it has those that ModelOpt itself wrote."""
TO_TRTLLM = ("fp8", "int4_awq", "nvfp4", "int8_sq")

with_fixtures = pytest.mark.skipif(FIXTURES is None, reason="NEMOPORT_FIXTURES names no folder")


@every_method
def test_hf_passes_everything_on_bit_for_bit(method: str, twins: dict[str, Twin], tmp_path: Path) -> None:
    source_path, out = twins[method].path, converted(twins[method].path, "hf", tmp_path / "out")
    assert stored_bytes(out / "model.safetensors") == stored_bytes(source_path / "model.safetensors")
    assert (out / "hf_quant_config.json").read_bytes() == (source_path / "hf_quant_config.json").read_bytes()
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (out, source_path))
    assert ours["quantization_config"] == theirs["quantization_config"]


def test_scales_of_the_kv_cache_are_passed_on_too(tmp_path: Path) -> None:
    twin = save(tmp_path / "twin", "fp8", SMALL, shared=False, kv_cache=True)
    out = converted(twin.path, "hf", tmp_path / "out")
    assert "model.layers.1.self_attn.v_proj.v_scale" in stored_bytes(out / "model.safetensors")
    assert stored_bytes(out / "model.safetensors") == stored_bytes(twin.path / "model.safetensors")


def test_the_manifest_names_the_quantization_and_the_ledger_every_scale(twins: dict[str, Twin], tmp_path: Path) -> None:
    out = converted(twins["fp8"].path, "trtllm", tmp_path / "out")
    said = read_manifest(out).source["quantization"]
    assert (said["algorithm"], said["producer"]) == ("FP8", "modelopt 0.47.0")
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert {row["source"]: row["fate"] for row in rows if "source" in row} == dict.fromkeys(
        stored_bytes(twins["fp8"].path / "model.safetensors"), "used"
    )


def test_a_pre_scale_that_is_in_a_norm_is_written_as_ones_and_the_ledger_says_so(
    twins: dict[str, Twin], tmp_path: Path
) -> None:
    out = converted(twins["int4_awq"].path, "trtllm", tmp_path / "out")
    rows = [json.loads(line) for line in (out / "ledger.jsonl").read_text().splitlines()]
    made = {
        row["target"]: row["transform"] for row in rows if row.get("target", "").endswith("prequant_scaling_factor")
    }
    at = "transformer.layers.0"
    assert made[f"{at}.attention.qkv.prequant_scaling_factor"] == "1.0 throughout, its pre_scale being absent"
    assert made[f"{at}.mlp.proj.prequant_scaling_factor"] == ""


def test_inspect_names_the_quantization(twins: dict[str, Twin]) -> None:
    facts = json.loads(command("inspect", twins["nvfp4"].path, "--json").stdout)
    assert (facts["quantization"]["algorithm"], facts["quantization"]["group"]) == ("NVFP4", 16)
    assert facts["family"] == "llama"
    assert "problem" not in facts


@every_method
def test_fields_stand_for_the_numbers_that_torch_computes(method: str, twins: dict[str, Twin]) -> None:
    model, seen = source.model(twins[method].path), 0
    for name, tensor in model.tensors.items():
        wanted = twins[method].numbers[model.sources[name][0]].float().numpy()
        if isinstance(tensor, Encoded):
            np.testing.assert_allclose(read(dequantized(tensor)).astype(np.float32), wanted, rtol=1e-6, atol=0)
            middle = read(cut(cut(dequantized(tensor), 0, 3, 8), 1, 17, 130 if wanted.shape[1] > 130 else 120))
            np.testing.assert_array_equal(middle, read(dequantized(tensor))[3:8, 17 : 17 + middle.shape[1]])
            seen += 1
    assert seen == 7 * len(SPEC.blocks)


NAMES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}
"""TensorRT-LLM's linears, and Hugging Face's in them."""
RULES: dict[str, dict[str, tuple[str, int | None, int | None]]] = {
    "fp8": {
        "weight": ("weight", 0, 1),
        "weights_scaling_factor": ("weight_scale", None, None),
        "activation_scaling_factor": ("input_scale", None, None),
    },
    "int4_awq": {
        "weight": ("weight", 0, 1),
        "weights_scaling_factor": ("weight_scale", 0, 1),
        "prequant_scaling_factor": ("pre_quant_scale", None, 0),
    },
    "nvfp4": {
        "weight": ("weight", 0, 1),
        "weights_scaling_factor": ("weight_scale", 0, 1),
        "weights_scaling_factor_2": ("weight_scale_2", None, None),
        "activation_scaling_factor": ("input_scale", None, None),
    },
    "int8_sq": {
        "weight": ("weight", 0, 1),
        "weights_scaling_factor": ("weight_scale", 0, None),
        "activation_scaling_factor": ("input_scale", None, None),
        "prequant_scaling_factor": ("pre_quant_scale", None, 0),
    },
}
"""A field in rank files: its name in Hugging Face's, and the axis that tp cuts of it in linears that are cut along
their output and along their input."""


def ranked(stored: dict[str, Tensor], method: str, tp: int, rank: int, layers: int) -> dict[str, Tensor]:
    """What ModelOpt writes for the quantized linears of a rank, from the same layout in Hugging Face's names."""
    found = {}
    for layer in range(layers):
        for name, linears in NAMES.items():
            for field, (suffix, by_output, by_input) in RULES[method].items():
                axis = by_input if name in ("attention.dense", "mlp.proj") else by_output
                inputs = stored[f"model.layers.{layer}.{linears[0]}.weight"].shape[1]
                ones = torch.ones(inputs, dtype=torch.bfloat16)
                parts = [stored.get(f"model.layers.{layer}.{linear}.{suffix}", ones) for linear in linears]
                kind = parts[0].dtype
                bits = [part.reshape(part.shape or (1,)) for part in parts]
                bits = [part.view(torch.uint8) if part.dtype == torch.float8_e4m3fn else part for part in bits]
                whole = torch.cat([part.chunk(tp, axis)[rank] for part in bits]) if axis is not None else bits[0]
                if field == "weight" and method == "int4_awq":
                    kind = torch.int8
                scalar = method == "nvfp4" and whole.numel() == 1
                found[f"transformer.layers.{layer}.{name}.{field}"] = (
                    whole.contiguous().view(kind).reshape(() if scalar else whole.shape)
                )
    return found


@pytest.mark.parametrize("method", TO_TRTLLM)
@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_hold_what_modelopt_writes(method: str, tp: int, twins: dict[str, Twin], tmp_path: Path) -> None:
    out = converted(twins[method].path, "trtllm", tmp_path / "out", tp=tp)
    stored = load_file(twins[method].path / "model.safetensors")
    for rank in range(tp):
        found = load_file(out / f"rank{rank}.safetensors")
        wanted = ranked(stored, method, tp, rank, len(SPEC.blocks))
        plain = set(found) - set(wanted)
        assert {name for name in plain if re.search(r"qkv|dense|mlp", name)} == set()
        for name, tensor in wanted.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    said = json.loads((out / "config.json").read_text())["quantization"]
    assert said["quant_algo"] == METHODS[method].said["quant_algo"]
    assert said["exclude_modules"] == ["lm_head"]


def test_the_config_says_of_awq_what_modelopt_says(twins: dict[str, Twin], tmp_path: Path) -> None:
    out = converted(twins["int4_awq"].path, "trtllm", tmp_path / "out")
    ours, theirs = (
        json.loads((path / "config.json").read_text())["quantization"] for path in (out, CKPT / "mo_int4_awq_t1p1")
    )
    assert {key: ours[key] for key in theirs} == theirs


def test_ranks_of_four_gather_to_one(twins: dict[str, Twin], tmp_path: Path) -> None:
    whole = load_file(converted(twins["fp8"].path, "trtllm", tmp_path / "one") / "rank0.safetensors")
    out = converted(twins["fp8"].path, "trtllm", tmp_path / "four", tp=4)
    ranks = [load_file(out / f"rank{rank}.safetensors") for rank in range(4)]
    for name, tensor in whole.items():
        parts = [rank[name].float() for rank in ranks]
        if name.endswith(("scaling_factor", "layernorm.weight", "ln_f.weight", "vocab_embedding.weight")):
            assert all(torch.equal(part, tensor.float()) for part in parts), name
        elif "dense" in name or "proj" in name:
            assert torch.equal(torch.cat(parts, 1), tensor.float()), name
        elif "qkv" in name:
            rows = [part.split([64, 32, 32]) for part in parts]
            assert torch.equal(torch.cat([rank[i] for i in range(3) for rank in rows]), tensor.float()), name
        else:
            assert torch.equal(torch.cat(parts)[: len(tensor)], tensor.float()), name


@with_fixtures
@pytest.mark.parametrize("method, apart", [("fp8", 0.04), ("int4_awq", None), ("nvfp4", 0.12)])
def test_modelopts_own_checkpoint_is_passed_on_byte_for_byte(method: str, apart: float | None, tmp_path: Path) -> None:
    assert FIXTURES
    path = Path(FIXTURES) / "trtllm/ckpt" / f"hf_{method}"
    out = converted(path, "hf", tmp_path / "out")
    for name in ("model.safetensors", "hf_quant_config.json"):
        assert (out / name).read_bytes() == (path / name).read_bytes()
    model, base = source.model(path), source.model(Path(FIXTURES) / "trtllm/hf/mo_llama")
    for name, tensor in model.tensors.items():
        if isinstance(tensor, Encoded) and (apart or name.endswith(("attn.o.weight", "ffn.down.weight"))):
            ours, theirs = (read(each).astype(np.float32) for each in (dequantized(tensor), base.tensors[name]))
            assert np.linalg.norm(ours - theirs) < (apart or 0.16) * np.linalg.norm(theirs), name


@with_fixtures
@pytest.mark.parametrize("method, tp", [("fp8", 2), ("int4_awq", 1)])
def test_modelopts_own_ranks_come_from_its_numbers_in_hugging_faces_names(method: str, tp: int, tmp_path: Path) -> None:
    """Its rank files, put together as a Hugging Face checkpoint with their shared scales, are written again equal."""
    assert FIXTURES
    theirs = Path(FIXTURES) / "trtllm/ckpt" / f"mo_{method}_t{tp}p1"
    ranks = []
    for rank in range(tp):
        with safe_open(theirs / f"rank{rank}.safetensors", "pt") as file:
            ranks.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    path = tmp_path / "twin"
    shutil.copytree(theirs.parent / f"hf_{method}", path)
    (path / "model.safetensors").unlink()
    save_file(_gathered(ranks, method), path / "model.safetensors", {"format": "pt"})
    out = converted(path, "trtllm", tmp_path / "out", tp=tp)
    for rank, wanted in enumerate(ranks):
        found = load_file(out / f"rank{rank}.safetensors")
        assert set(found) == set(wanted)
        for name, tensor in wanted.items():
            if "vocab_embedding" in name or "lm_head" in name:  # cut and padded by ModelOpt's own choice
                continue
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def _gathered(ranks: list[dict[str, Tensor]], method: str) -> dict[str, Tensor]:
    stored = {
        "model.norm.weight": ranks[0]["transformer.ln_f.weight"],
        "model.embed_tokens.weight": torch.cat([rank["transformer.vocab_embedding.weight"] for rank in ranks])[:1003],
        "lm_head.weight": torch.cat([rank["lm_head.weight"] for rank in ranks])[:1003],
    }
    for layer in range(2):
        ours, at = f"model.layers.{layer}.", f"transformer.layers.{layer}."
        stored[ours + "input_layernorm.weight"] = ranks[0][at + "input_layernorm.weight"]
        stored[ours + "post_attention_layernorm.weight"] = ranks[0][at + "post_layernorm.weight"]
        for name, linears in NAMES.items():
            for field, (suffix, by_output, by_input) in RULES[method].items():
                axis = by_input if name in ("attention.dense", "mlp.proj") else by_output
                each = [rank[f"{at}{name}.{field}"] for rank in ranks]
                each = [part.view(torch.uint8) if part.element_size() == 1 else part for part in each]
                for index, linear in enumerate(linears):
                    parts = [_rows(part, index) for part in each] if len(linears) > 1 and axis is not None else each
                    whole = torch.cat(parts, axis) if axis is not None else parts[0]
                    if method == "fp8":
                        whole = whole.view(torch.float8_e4m3fn) if field == "weight" else whole.reshape(())
                    stored[f"{ours}{linear}.{suffix}"] = whole.contiguous().clone()
    return stored


def _rows(fused: Tensor, index: int) -> Tensor:
    """Those of q, of k or of v: twice as many heads ask as are asked."""
    start, stop = ((0, 2), (2, 3), (3, 4))[index]
    return fused[start * len(fused) // 4 : stop * len(fused) // 4]
