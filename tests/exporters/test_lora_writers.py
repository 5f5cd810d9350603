"""Where adapters come from: every writer says the same in a place of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from nemoport.errors import UnsupportedInput
from nemoport.exporters import source

from .adapters import (
    megatron_factors,
    random_numbers,
    random_pair,
    save_adapter,
    sum_of,
)
from .made import SPECS, config, save_huggingface, save_torch_dist, torch_tensor


@pytest.mark.parametrize("kind", ["bridge", "nemo2", "nemo2, io.json", "metadata", "lora.json"])
def test_every_writer_says_its_scaling_in_its_own_place(kind: str, tmp_path: Path) -> None:
    spec = SPECS["llama"]["plain"]
    base = save_huggingface(tmp_path / "base", spec, random_numbers(spec))
    plain = save_adapter(tmp_path / "plain", megatron_factors(spec), {"dim": 3, "alpha": 8})
    other = tmp_path / "other"
    shutil.copytree(plain, other / "weights")
    (other / "weights/lora.json").unlink()
    said = {"_target_": "megatron.bridge.peft.lora.LoRA", "dim": 3, "alpha": 8, "dropout": 0.1}
    (other / "context").mkdir()
    if kind == "bridge":
        shutil.copytree(other / "weights", other / "iter_0000003")
        shutil.rmtree(other / "weights")
        (other / "latest_checkpointed_iteration.txt").write_text("3")
        (other / "iter_0000003/run_config.yaml").write_text(yaml.safe_dump({"model": {}, "peft": said}))
    elif kind == "nemo2":
        (other / "weights/adapter_metadata.json").write_text('{"model_ckpt_path": "/somewhere"}')
        transform = said | {"_target_": "nemo.collections.llm.peft.lora.LoRA"}
        (other / "context/model.yaml").write_text(yaml.safe_dump({"model_transform": transform}))
    elif kind == "nemo2, io.json":
        (other / "context/io.json").write_text(json.dumps(fiddle(dim=3, alpha=8)))
    elif kind == "metadata":
        (other / "weights/adapter_metadata.json").write_text('{"model_ckpt_path": "/somewhere", "dim": 3, "alpha": 8}')
    else:
        (other / "lora.json").write_text('{"alpha": 8}')
    wanted, found = (source.model(base, adapter=adapter).tensors for adapter in (plain, other))
    for name, tensor in wanted.items():
        assert torch.equal(torch_tensor(tensor), torch_tensor(found[name])), name


def fiddle(**arguments: int) -> dict[str, Any]:
    """io.json of a model with a LoRA, as far as it matters."""

    def refer(key: str) -> dict[str, str]:
        return {"type": "ref", "key": key}

    def thing(kind: str, **attributes: Any) -> list[Any]:
        named = {"fn_or_cls": {"type": "pyref", "module": "nemo", "name": kind}}
        meta = {"items": [[f"Attr(name='{name}')", value] for name, value in named.items()]}
        return [{"items": [[f"Attr(name='{name}')", value] for name, value in attributes.items()]}, meta]

    leaves = {name: {"type": "leaf", "value": value} for name, value in arguments.items()}
    objects = {}
    for key, (found, meta) in {
        "root": thing("TrainerContext", model=refer("model")),
        "model": thing("LlamaModel", model_transform=refer("lora")),
        "lora": thing("LoRA", **leaves),
    }.items():
        objects[key] = found | {"metadata": refer(f"{key}_meta")}
        objects[f"{key}_meta"] = meta
    return {"root": refer("root"), "objects": objects}


def test_canonical_lora_has_an_adapter_for_each_part(tmp_path: Path) -> None:
    """Bridge's CanonicalLoRA: separate ranks of q, k, v, gate and up are possible, one of them may be missing."""
    spec = SPECS["llama"]["plain"]
    canonical = random_numbers(spec)
    base = save_huggingface(tmp_path / "base", spec, canonical)
    factors: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for number in range(len(spec.blocks)):
        there = f"decoder.layers.{number}"
        for linear, part, name in (
            ("self_attention.linear_qkv", "q", "attn.q"),
            ("self_attention.linear_qkv", "v", "attn.v"),
            ("mlp.linear_fc1", "up", "ffn.up"),
        ):
            out, inner = canonical[f"layers.{number}.{name}.weight"].shape
            factors[f"{there}.{linear}", part] = random_pair(out, inner, seed=len(factors))
    adapter = save_adapter(
        tmp_path / "adapter",
        {},
        {"peft": "CanonicalLoRA", "dim": 3, "alpha": 6},
        more={
            f"{linear}.adapter.adapter_{part}.linear_{side}.weight": factor
            for (linear, part), pair in factors.items()
            for side, factor in zip(("in", "out"), pair, strict=True)
        },
    )
    found = source.model(base, adapter=adapter)
    assert len(found.transforms) == 9
    for (linear, part), (a, b) in factors.items():
        name = f"layers.{linear.split('.')[2]}.{'ffn' if part == 'up' else 'attn'}.{part}.weight"
        assert torch.equal(torch_tensor(found.tensors[name]), sum_of(canonical[name], a, b, 2.0))


def test_one_checkpoint_may_hold_the_base_and_its_adapter(tmp_path: Path) -> None:
    """With the base's linears under `to_wrap`, as the modules are named."""
    spec = SPECS["llama"]["plain"]
    canonical, factors = random_numbers(spec), megatron_factors(spec)
    base = save_torch_dist(tmp_path / "base", spec, canonical)
    apart = save_adapter(tmp_path / "apart", factors, {"alpha": 6})
    whole = {
        name.replace(".weight", ".to_wrap.weight") if name.removesuffix(".weight") in factors else name: tensor
        for name, tensor in source.checkpoint(base, config(spec, "megatron")).tensors.items()
    }
    both = save_adapter(
        tmp_path / "both", factors, {"alpha": 6}, {name: torch_tensor(tensor) for name, tensor in whole.items()}
    )
    wanted = source.model(base, config(spec, "megatron"), adapter=apart).tensors
    found = source.model(both, config(spec, "megatron"), adapter=both).tensors
    for name, tensor in wanted.items():
        assert torch.equal(torch_tensor(tensor), torch_tensor(found[name])), name
    with pytest.raises(UnsupportedInput, match=r"are of an adapter.*--adapter DIR"):
        source.model(both, config(spec, "megatron"))
