"""The merge: what torch and peft compute, rounded once, whatever the pieces and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemoport import artifact
from nemoport.exporters import convert, lora, source, stream
from nemoport.exporters.layouts import TRANSPOSED
from nemoport.exporters.rules import Column, Rule
from nemoport.spec import Plan, tensors

from .adapters import (
    ADAPTER,
    BASE,
    WEIGHTS,
    megatron_factors,
    merged,
    merged_by_peft,
    random_numbers,
    random_pair,
    save_adapter,
    save_peft,
    sum_of,
)
from .fixtures import HUGGINGFACE
from .made import SPECS, bound, config, save_huggingface, save_torch_dist, torch_tensor


def test_every_merged_weight_is_what_torch_computes(merged_llama: Path) -> None:
    """W + 2 B A on the tensors as Megatron fuses them, rounded once; then taken apart by hand."""
    stored = source.checkpoint(BASE.path, BASE.config).tensors
    factors = source.adapter_at(ADAPTER).tensors
    found = load_file(merged_llama / "model.safetensors")
    for layer in range(4):
        there, here = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        whole = {}
        for linear in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
            a, b = (
                torch_tensor(factors[f"{there}{linear}.adapter.linear_{side}.weight"]).double()
                for side in ("in", "out")
            )
            weight = torch_tensor(stored[f"{there}{linear}.weight"]).double()
            whole[linear.rpartition("_")[2]] = (weight + 2 * (b @ a)).bfloat16()
        groups = whole["qkv"].view(4, 4, 16, 64)  # [q q k v], 16 rows each
        wanted = {
            "self_attn.q_proj": groups[:, :2].reshape(128, 64),
            "self_attn.k_proj": groups[:, 2].reshape(64, 64),
            "self_attn.v_proj": groups[:, 3].reshape(64, 64),
            "self_attn.o_proj": whole["proj"],
            "mlp.gate_proj": whole["fc1"][:176],
            "mlp.up_proj": whole["fc1"][176:],
            "mlp.down_proj": whole["fc2"],
        }
        for name, tensor in wanted.items():
            assert torch.equal(found[f"{here}{name}.weight"], tensor), (layer, name)


@pytest.mark.parametrize(
    "options",
    [
        {"r": 3, "lora_alpha": 7},
        {"r": 4, "lora_alpha": 8, "use_rslora": True},
        {"r": 2, "lora_alpha": 5, "rank_pattern": {"k_proj": 5}, "alpha_pattern": {"layers.1.self_attn.q_proj": 11}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_peft_merges_the_same_and_reads_what_is_carried(options: Mapping[str, Any], tmp_path: Path) -> None:
    """In float32, where peft rounds as we do but for the order of summation."""
    base = save_huggingface(tmp_path / "base", SPECS["llama"]["plain"], random_numbers(SPECS["llama"]["plain"]))
    save_peft(tmp_path / "adapter", base, options)
    found = load_file(merged("hf", tmp_path / "merged", tmp_path / "adapter", base=base) / "model.safetensors")
    carried = merged("hf", tmp_path / "carried", tmp_path / "adapter", "carry", base)
    for directory in (tmp_path / "adapter", carried / "adapter"):
        wanted = merged_by_peft(base, directory)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


def test_what_is_carried_merges_to_what_is_merged(merged_llama: Path, tmp_path: Path) -> None:
    carried = merged("hf", tmp_path / "carried", mode="carry")
    base = load_file(HUGGINGFACE / "model.safetensors")
    assert all(torch.equal(tensor, base[name]) for name, tensor in load_file(carried / "model.safetensors").items())
    again = merged("hf", tmp_path / "again", carried / "adapter", base=carried)
    assert (again / "model.safetensors").read_bytes() == (merged_llama / "model.safetensors").read_bytes()
    assert artifact.read_manifest(carried).source["adapter"]["mode"] == "carry"
    artifact.verify(carried, artifact.read_manifest(carried))


def test_the_merge_does_not_depend_on_tp(merged_llama: Path, tmp_path: Path) -> None:
    straight = merged("trtllm", tmp_path / "straight", tp=2)
    stream.run(convert.plan(merged_llama, "trtllm", tmp_path / "twice", plan=Plan(tp=2)))
    for rank in ("rank0.safetensors", "rank1.safetensors"):
        assert (straight / rank).read_bytes() == (tmp_path / "twice" / rank).read_bytes()


@pytest.mark.parametrize("block, tile", [(96, 512), (1024, 7), (400, 3)])
def test_a_merge_in_pieces_is_that_of_the_whole(
    block: int, tile: int, merged_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK", block)
    monkeypatch.setattr(lora, "_TILE", tile)
    pieces = merged("hf", tmp_path / "pieces")
    assert (pieces / "model.safetensors").read_bytes() == (merged_llama / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["plain", "every bias", "one group", "no groups", "qk norm, tied"])
def test_an_adapter_of_a_fused_linear_is_one_of_each_part(name: str, tmp_path: Path) -> None:
    """In the stored tensors nothing is taken apart: a checkpoint whose linears were added to there is the merge."""
    spec = SPECS["llama"][name]
    canonical, factors = random_numbers(spec), megatron_factors(spec)
    base = save_torch_dist(tmp_path / "base", spec, canonical)
    adapter = save_adapter(tmp_path / "adapter", factors, {"dim": 3, "alpha": 6})
    linears = {
        binding.stored: binding.layout.join([canonical[part.name] for part in binding.parts], binding.parts)
        for binding in bound(spec, "megatron")
    }
    added = {linear: sum_of(linears[f"{linear}.weight"], a, b, 2.0) for linear, (a, b) in factors.items()}
    found = source.model(base, config(spec, "megatron"), adapter=adapter)
    assert found.transforms["layers.1.attn.v.weight"] == "merge adapter (r 3, alpha 6)"
    for binding in bound(spec, "megatron"):
        whole = binding.layout.join([found.tensors[part.name] for part in binding.parts], binding.parts)
        wanted = added.get(binding.stored.removesuffix(".weight"), torch_tensor(linears[binding.stored]))
        assert torch.equal(torch_tensor(whole), wanted), binding.stored


def test_the_factors_of_a_transposed_weight_are_not(tmp_path: Path) -> None:
    """GPT-2's Conv1D holds [in, out], fused; peft's A and B are [r, in] and [out, r] all the same."""
    spec = SPECS["llama"]["no groups"]
    parts = tuple(f"layers.{{i}}.attn.{part}.weight" for part in "qkv")
    rules = (Rule("h.{i}.c_attn.weight", parts, TRANSPOSED),)
    a, b = random_pair(180, 10, seed=1)
    save_file({"base_model.model.h.1.c_attn.lora_A.weight": a, "h.1.c_attn.lora_B.weight": b}, tmp_path / WEIGHTS)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 6}')
    found = lora.bind(source.adapter_at(tmp_path), Column(rules=rules, dialects=()), tensors(spec)).pairs
    for number, part in enumerate("qkv"):
        pair = found[f"layers.1.attn.{part}.weight"]
        assert torch.equal(torch_tensor(pair.a), a)
        assert torch.equal(torch_tensor(pair.b), b[60 * number : 60 * number + 60])
