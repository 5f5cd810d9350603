"""Adapters: merged or carried, the answers are those of the base with the adapter beside it.

The answers stored with `lora/bridge_adapter` come from a stand-in for Transformer Engine whose fused linears do not
hand out their norm, so that the adapters of linear_qkv and linear_fc1 were given the input before the norm. Real ones
get it after the norm (megatron.bridge.peft.utils sets `return_layernorm_output`), which alone can be merged. So the
factors are held against those answers as they were computed, and the merge against the same forward with the norm.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from nemoport import artifact, reference
from nemoport.errors import DamagedInput, InputError, UnsupportedInput, UsageError
from nemoport.exporters import convert, lora, source, stream
from nemoport.exporters.layouts import TRANSPOSED
from nemoport.exporters.lora import Pair
from nemoport.exporters.rules import Column, Rule
from nemoport.exporters.tensor import Held, LazyTensor
from nemoport.spec import ModelSpec, Plan, tensors
from nemoport.validation import Request, validate

from .commands import command, contents, sentence
from .fixtures import HUGGINGFACE, LLAMA, MEGATRON
from .made import SPECS, bound, config, save_huggingface, save_torch_dist, torch_tensor

ADAPTER = MEGATRON / "lora/bridge_adapter"
BASE = LLAMA["torch_dist at tp 2 pp 2"]
Numbers = dict[str, Tensor]


def merged(
    to: str, destination: Path, adapter: Path = ADAPTER, mode: Any = "merge", base: Path = HUGGINGFACE, **plan: Any
) -> Path:
    job = convert.plan(base, to, destination, plan=Plan(**plan), adapter=adapter, adapter_mode=mode)
    stream.run(job)
    return destination


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixture's adapter in the fixture's base."""
    return merged("hf", tmp_path_factory.mktemp("lora") / "merged")


# The fixture's answers


def test_the_factors_are_those_that_the_writer_computed_with() -> None:
    """bfloat16 against float32: 0.0154 relative and 0.076 at worst; for the base alone that noise is 0.0104 and 0.051.
    A factor in another place, or half the scale, is 0.6 off."""
    tokens, logits = fixture_answers()
    numbers, pairs = fixture_model()
    found = forward(numbers, pairs, tokens, normed=False)
    assert distance(found, logits) < 0.02
    assert np.abs(found - logits).max() < 0.1
    halved = {name: replace(pair, alpha=pair.alpha / 2) for name, pair in pairs.items()}
    turned = pairs | {name: pairs[name.replace("gate", "up")] for name in pairs if "gate" in name}
    wrongs: tuple[dict[str, Pair], ...] = ({}, halved, turned)
    for wrong in wrongs:
        assert distance(forward(numbers, wrong, tokens, normed=False), logits) > 0.2


def test_the_merged_model_answers_as_the_base_with_the_adapter_beside_it() -> None:
    """Rounding the merged weights to bfloat16 costs 0.0068."""
    tokens, _ = fixture_answers()
    numbers, pairs = fixture_model()
    model = source.model(BASE.path, BASE.config, adapter=ADAPTER)
    found = reference.logits(model.spec, model.tensors, tokens)
    assert distance(found, forward(numbers, pairs, tokens, normed=True)) < 0.01
    assert distance(found, forward(numbers, {}, tokens, normed=True)) > 0.5


def forward(
    numbers: Numbers, pairs: Mapping[str, Pair], tokens: NDArray[np.int64], *, normed: bool
) -> NDArray[np.float32]:
    """The fixture's llama with adapters beside its linears, in plain torch. `normed`: see the head of this file."""

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * numbers[f"{name}.weight"]

    def linear(name: str, x: Tensor, raw: Tensor) -> Tensor:
        out = x @ numbers[f"{name}.weight"].T
        if pair := pairs.get(f"{name}.weight"):
            out = out + pair.scale * ((x if normed else raw) @ values(pair.a).T @ values(pair.b).T)
        return out

    def rotated(x: Tensor) -> Tensor:
        angles = torch.outer(torch.arange(x.shape[1]), 5e5 ** -(torch.arange(8) / 8))
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        left, right = x[..., :8], x[..., 8:]
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    x = numbers["embed.weight"][torch.from_numpy(tokens)]
    for layer in (f"layers.{number}" for number in range(4)):
        inside = norm(x, f"{layer}.attn_norm")
        q, k, v = (linear(f"{layer}.attn.{part}", inside, x).view(*tokens.shape, -1, 16) for part in "qkv")
        q, k, v = rotated(q), rotated(k).repeat_interleave(2, 2), v.repeat_interleave(2, 2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + linear(f"{layer}.attn.o", out, out)
        inside = norm(x, f"{layer}.ffn_norm")
        gate, up = (linear(f"{layer}.ffn.{part}", inside, x) for part in ("gate", "up"))
        inside = torch.nn.functional.silu(gate) * up
        x = x + linear(f"{layer}.ffn.down", inside, inside)
    logits: NDArray[np.float32] = (norm(x, "norm") @ numbers["head.weight"].T).numpy()
    return logits


def fixture_answers() -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    with np.load(ADAPTER.with_suffix(".ref.npz")) as stored:
        return stored["tokens"], stored["logits_native"]


def fixture_model() -> tuple[Numbers, dict[str, Pair]]:
    base, adapter = source.with_adapter(HUGGINGFACE, ADAPTER)
    return {name: values(tensor) for name, tensor in base.tensors.items()}, dict(adapter.pairs)


def values(tensor: LazyTensor) -> Tensor:
    return torch_tensor(tensor).float()


def distance(found: NDArray[Any], wanted: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# The merge


def test_every_merged_weight_is_what_torch_computes(made: Path) -> None:
    """W + 2 B A on the tensors as Megatron fuses them, rounded once; then taken apart by hand."""
    stored = source.checkpoint(BASE.path, BASE.config).tensors
    factors = source.adapter_at(ADAPTER).tensors
    found = load_file(made / "model.safetensors")
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


def test_what_is_carried_merges_to_what_is_merged(made: Path, tmp_path: Path) -> None:
    carried = merged("hf", tmp_path / "carried", mode="carry")
    base = load_file(HUGGINGFACE / "model.safetensors")
    assert all(torch.equal(tensor, base[name]) for name, tensor in load_file(carried / "model.safetensors").items())
    again = merged("hf", tmp_path / "again", carried / "adapter", base=carried)
    assert (again / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()
    assert artifact.read_manifest(carried).source["adapter"]["mode"] == "carry"
    artifact.verify(carried, artifact.read_manifest(carried))


def test_the_merge_does_not_depend_on_tp(made: Path, tmp_path: Path) -> None:
    straight = merged("trtllm", tmp_path / "straight", tp=2)
    stream.run(convert.plan(made, "trtllm", tmp_path / "twice", plan=Plan(tp=2)))
    for rank in ("rank0.safetensors", "rank1.safetensors"):
        assert (straight / rank).read_bytes() == (tmp_path / "twice" / rank).read_bytes()


@pytest.mark.parametrize("block, tile", [(96, 512), (1024, 7), (400, 3)])
def test_a_merge_in_pieces_is_that_of_the_whole(
    block: int, tile: int, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "BLOCK", block)
    monkeypatch.setattr(lora, "_TILE", tile)
    pieces = merged("hf", tmp_path / "pieces")
    assert (pieces / "model.safetensors").read_bytes() == (made / "model.safetensors").read_bytes()


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


def sum_of(weight: LazyTensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    whole = torch_tensor(weight)
    return (whole.double() + scale * (b.double() @ a.double())).to(whole.dtype)


# Where adapters come from


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


# What does not fit


def test_an_adapter_tensor_that_is_not_used_is_an_error(tmp_path: Path) -> None:
    spec = SPECS["llama"]["plain"]
    factors = megatron_factors(spec)
    factors |= {"decoder.layers.3.mlp.linear_fc2": factors["decoder.layers.2.mlp.linear_fc2"]}
    with pytest.raises(UnsupportedInput, match=r"2 of 26 .* decoder.layers.3.mlp.linear_fc2.adapter.linear_in.weight"):
        fit(tmp_path, factors, {"alpha": 6})


def test_an_adapter_of_another_model_is_an_error(tmp_path: Path) -> None:
    factors = megatron_factors(SPECS["llama"]["plain"])
    with pytest.raises(DamagedInput, match=r"is \[120, 10\], .*linear_qkv.weight of the base \[72, 10\]"):
        fit(tmp_path, factors, {"alpha": 6}, SPECS["llama"]["one group"])


BAD = {
    "no rank of its own": ({"dim": 4, "alpha": 6}, "has rank 3, lora.json says 4"),
    "no alpha": ({"dim": 3}, "does not say the alpha"),
    "alpha in words": ({"alpha": "six"}, "numbers are needed"),
    "another kind": ({"peft": "DoRA", "alpha": 6}, "an adapter of DoRA"),
}


@pytest.mark.parametrize("said, message", BAD.values(), ids=BAD)
def test_a_config_that_cannot_be_meant_is_refused(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fit(tmp_path, megatron_factors(SPECS["llama"]["plain"]), said)


_FC2 = "decoder.layers.0.mlp.linear_fc2"
MORE = {
    "half a pair": (f"{_FC2}.adapter.adapter_down.linear_in.weight", (3, 14), "has no B beside it"),
    "twice": (f"{_FC2}.to_wrap.adapter.linear_in.weight", (3, 14), "the same factor"),
    "magnitudes": (f"{_FC2}.adapter.weight_magnitude", (10,), "of DoRA"),
    "something else": (f"{_FC2}.adapter.gate.weight", (3, 3), "of no LoRA"),
    "a weight of the base": ("decoder.final_layernorm.weight", (10,), "of no LoRA, the first is decoder.final"),
}


@pytest.mark.parametrize("name, shape, message", MORE.values(), ids=MORE)
def test_a_tensor_that_is_no_pair_is_refused(name: str, shape: tuple[int, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fit(tmp_path, megatron_factors(SPECS["llama"]["plain"]), {"alpha": 6}, more={name: torch.ones(shape)})


PEFT = {
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "of type PROMPT_TUNING"),
    "dora": ({"use_dora": True}, "DoRA"),
    "pissa": ({"init_lora_weights": "pissa_niter_16"}, "changes the base"),
    "an expression": ({"rank_pattern": {"(a+)+$": 2}}, "write their names"),
    "no alpha": ({"lora_alpha": None}, "does not say r and lora_alpha"),
    "an alpha beyond numbers": ({"lora_alpha": 1e999}, "does not say r and lora_alpha"),
    "ranks in a list": ({"rank_pattern": [3]}, "does not say r and lora_alpha"),
    "half a pair": ({}, "lora_A.weight has no B"),
}


@pytest.mark.parametrize("said, message", PEFT.values(), ids=PEFT)
def test_what_peft_can_do_and_we_cannot_is_refused_by_name(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | said))
    save_file({"base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(4, 2)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match=message):
        source.model(HUGGINGFACE, adapter=tmp_path)


def test_carrying_is_refused_where_there_is_no_place_for_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--to trtllm has no place for an adapter"):
        merged("trtllm", tmp_path / "out", mode="carry")
    with pytest.raises(UsageError, match="--dtype float16 would change the base"):
        merged("hf", tmp_path / "out", mode="carry", dtype="float16")


# What is recorded


def test_an_adapter_is_never_written_into(tmp_path: Path) -> None:
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    with pytest.raises(UsageError, match="lies inside the adapter"):
        merged("hf", adapter / "out", adapter)


def test_the_ledger_accounts_for_the_adapter(made: Path) -> None:
    rows = [json.loads(line) for line in (made / artifact.LEDGER).read_text().splitlines()]
    used = {row["source"] for row in rows if row.get("fate") == "used"}
    assert {lora.OWN + name for name in source.adapter_at(ADAPTER).tensors} < used
    (row,) = (row for row in rows if row.get("target") == "model.layers.2.self_attn.k_proj.weight")
    assert row["transform"] == "merge adapter (r 4, alpha 8)"
    assert row["sources"] == [
        "adapter/decoder.layers.2.self_attention.linear_qkv.adapter.linear_in.weight",
        "adapter/decoder.layers.2.self_attention.linear_qkv.adapter.linear_out.weight",
        "model.layers.2.self_attn.k_proj.weight",
    ]
    assert artifact.read_manifest(made).source["adapter"]["scaling"] == ["r 4, alpha 8"]


def test_the_same_command_with_another_adapter_is_another_job(tmp_path: Path) -> None:
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    first = merged("hf", tmp_path / "out", adapter)
    assert merged("hf", tmp_path / "out", adapter) == first
    (adapter / "lora.json").write_text('{"dim": 4, "alpha": 9}')
    with pytest.raises(UsageError, match="is not the result of this conversion"):
        merged("hf", tmp_path / "out", adapter)


@pytest.mark.parametrize("to, plan", [("hf", {}), ("trtllm", {"tp": 2}), ("onnx", {"dtype": "float32"})])
def test_a_merged_model_is_validated_without_another_word(to: str, plan: dict[str, Any], tmp_path: Path) -> None:
    report = validate(Request(subject=merged(to, tmp_path / "out", **plan)))
    assert report.passed
    assert report.source["adapter"]["scaling"] == ["r 4, alpha 8"]


def test_a_carried_adapter_is_validated_with_its_base(tmp_path: Path) -> None:
    carried = merged("hf", tmp_path / "out", mode="carry")
    assert validate(Request(subject=carried)).passed


def test_validate_sees_an_adapter_that_was_not_merged(made: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    stream.run(convert.plan(HUGGINGFACE, "hf", bare, plan=Plan()))
    assert not validate(Request(subject=bare, against=HUGGINGFACE, adapter=ADAPTER)).passed
    assert not validate(Request(subject=shutil.copytree(made, tmp_path / "made"), against=HUGGINGFACE)).passed


def test_validate_sees_a_wrong_scale(tmp_path: Path) -> None:
    adapter = shutil.copytree(ADAPTER, tmp_path / "adapter")
    out = merged("hf", tmp_path / "out", adapter)
    (adapter / "lora.json").write_text('{"dim": 4, "alpha": 8.5}')
    report = validate(Request(subject=out))
    failed = {check.name for check in report.checks if not check.passed}
    assert "weights of the source" in failed
    assert any(name.startswith("logits of the source") for name in failed)


def test_the_command_line_merges_carries_and_inspects(made: Path, tmp_path: Path) -> None:
    arguments = ("convert", HUGGINGFACE, "--to", "hf", "--adapter", ADAPTER)
    result = command(*arguments, "-o", tmp_path / "merged")
    assert result.exit_code == 0
    assert "r 4, alpha 8" in result.output
    assert contents(tmp_path / "merged") == contents(made)
    result = command(*arguments, "--adapter-mode", "carry", "-o", tmp_path / "carried", "--json")
    assert json.loads(result.stdout)["adapter"]["mode"] == "carry"
    for adapter, format_name in ((ADAPTER, "megatron"), (tmp_path / "carried/adapter", "huggingface")):
        facts = json.loads(command("inspect", adapter, "--json").stdout)
        assert facts["format"] == f"adapter ({format_name})"
        assert facts["adapter"]["scaling"] == ["r 4, alpha 8"]
    result = command("convert", ADAPTER, "--to", "hf", "-o", tmp_path / "no")
    assert result.exit_code in (2, 3)
    assert sentence(result.stderr)


# Made adapters

WEIGHTS = "adapter_model.safetensors"


def random_numbers(spec: ModelSpec) -> dict[str, LazyTensor]:
    """Every canonical tensor in float32, of ordinary numbers."""
    bits = np.random.default_rng(11)
    return {name: Held(bits.normal(0, 0.3, t.shape).astype(np.float32), "float32") for name, t in tensors(spec).items()}


def random_pair(out: int, inner: int, *, seed: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    """A and B, in bfloat16, whose products are exact in float64."""
    bits = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, inner, generator=bits), torch.randn(out, rank, generator=bits)
    return a.bfloat16(), b.bfloat16()


def megatron_factors(spec: ModelSpec) -> dict[str, tuple[Tensor, Tensor]]:
    """A pair for every linear of every layer, as Megatron fuses them."""
    linears = [each for each in bound(spec, "megatron") if ".linear_" in each.stored and len(each.shape) == 2]
    return {
        each.stored.removesuffix(".weight"): random_pair(*each.shape, seed=seed) for seed, each in enumerate(linears)
    }


def save_adapter(
    directory: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    said: Mapping[str, Any],
    more: Mapping[str, Tensor] | None = None,
) -> Path:
    """A LoRA in Megatron's names, a key a layer, written by torch; its scaling in lora.json."""
    named = {
        f"module.{linear}.adapter.linear_{side}.weight": factor.clone()
        for linear, pair in factors.items()
        for side, factor in zip(("in", "out"), pair, strict=True)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_distributed(
            named | {name: tensor.clone() for name, tensor in (more or {}).items()},
            checkpoint_id=directory,
            no_dist=True,
        )
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (directory / "lora.json").write_text(json.dumps(said))
    return directory


def fit(
    directory: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    said: Mapping[str, Any],
    spec: ModelSpec = SPECS["llama"]["plain"],
    more: Mapping[str, Tensor] | None = None,
) -> None:
    base = save_huggingface(directory / "base", spec, random_numbers(spec))
    source.model(base, adapter=save_adapter(directory / "adapter", factors, said, more))


def save_peft(directory: Path, base: Path, options: Mapping[str, Any]) -> None:
    """An adapter of every linear, trained by chance, as peft saves it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import transformers

        linears = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=linears, **options))
        bits = torch.Generator().manual_seed(3)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=bits)
        adapted.save_pretrained(directory)


def merged_by_peft(base: Path, adapter: Path) -> Numbers:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        import transformers

        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        merged: Numbers = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return merged
