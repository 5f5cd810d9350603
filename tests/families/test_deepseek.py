"""DeepSeek beyond what all families keep: published sizes, every writer's names, layers that predict further tokens."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nemoport import reference
from nemoport.artifact import read_manifest
from nemoport.errors import UnsupportedInput
from nemoport.exporters import configs, convert, source, stream
from nemoport.exporters.checkpoint import Checkpoint, Model
from nemoport.exporters.families import deepseek
from nemoport.exporters.formats import megatron
from nemoport.exporters.sharding import shard
from nemoport.exporters.targets.trtllm import SHARDING
from nemoport.exporters.tensor import LazyTensor, cut, read, squeeze
from nemoport.reference import generate
from nemoport.reference.ranks import RankedDecoder
from nemoport.reference.weights import Weights
from nemoport.spec import (
    LatentAttention,
    Mixture,
    ModelSpec,
    Plan,
    YarnScaling,
    check_divisible,
    parameter_count,
    tensors,
)

from .test_fixtures import HUGGINGFACE, MCORE, MODELS, config

YARN = {"type": "yarn", "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
SHARED: dict[str, Any] = {
    "hidden_act": "silu",
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_layer_freq": 1,
    "attention_bias": False,
}
V2_LITE = SHARED | {
    "model_type": "deepseek_v2",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 1.0,
    "q_lora_rank": None,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "rope_scaling": YARN | {"factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707},
}
V3 = SHARED | {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 1536,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "num_nextn_predict_layers": 1,
    "rope_scaling": YARN | {"factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.827,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "rope_theta": 50000.0,
    "rope_scaling": YARN | {"beta_fast": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0},
}
MOONLIGHT = V3 | {
    "vocab_size": 163840,
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.446,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": None,
}
PUBLISHED = {
    "V2 Lite": (V2_LITE, 15.7),
    "V3": (V3, 671.0),
    "Kimi K2": (KIMI_K2, 1026.0),
    "Moonlight": (MOONLIGHT, 16.0),
}
"""Configs, and thousand millions of parameters, without the layers that predict further tokens."""


def described(words: Mapping[str, Any]) -> ModelSpec:
    return configs.read("deepseek", deepseek.HUGGINGFACE, words)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_has_the_published_size_and_is_written_back(name: str) -> None:
    words, size = PUBLISHED[name]
    spec = described(words)
    assert parameter_count(spec) / 1e9 == pytest.approx(size, rel=5e-3)
    written = configs.write(deepseek.HUGGINGFACE, spec, "say it otherwise")
    assert described(written) == spec
    assert written["model_type"] in ("deepseek_v2", "deepseek_v3"), "transformers knows no kimi_k2"


def test_scores_are_scaled_twice_by_the_temperature() -> None:
    mixer = described(V3).mixers[0]
    assert isinstance(mixer, LatentAttention)
    assert isinstance(mixer.rope.scaling, YarnScaling)
    assert mixer.scale == pytest.approx(0.1352337788608801)  # 192 ** -0.5 * (0.1 ln 40 + 1) ** 2
    assert mixer.rope.magnitude == 1.0


def test_a_group_is_judged_by_one_expert_in_v2_and_by_two_in_v3() -> None:
    v2 = V2_LITE | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    for words, best in ((v2, 1), (V3, 2)):
        ffn = described(words).blocks[-1].ffn
        assert isinstance(ffn, Mixture)
        assert ffn.router.groups
        assert ffn.router.groups.best == best


def stored() -> dict[str, LazyTensor]:
    return dict(source.checkpoint(MCORE / MODELS["deepseek"], config("deepseek")).tensors)


def resolved(held: Mapping[str, LazyTensor], **words: Any) -> Model:
    whole = config("deepseek") | words
    made = Checkpoint(path=MCORE, format="", writer="", naming="megatron", config=whole, tensors=held)
    return source.resolved(made)


def local_names(name: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
    """Without Transformer Engine, norms are modules of their own."""
    for fused, alone in {
        "self_attention.linear_q_up_proj.layer_norm_weight": "self_attention.q_layernorm.weight",
        "self_attention.linear_kv_up_proj.layer_norm_weight": "self_attention.kv_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }.items():
        name = name.replace(fused, alone)
    return {name: tensor}


def single_experts(name: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
    """As modules of experts one after the other name them."""
    if ".experts.experts." not in name:
        return {name: tensor}
    one = name.replace(".experts.experts.", ".experts.local_experts.{}.")
    return {one.format(expert): squeeze(cut(tensor, 0, expert, expert + 1)) for expert in range(tensor.shape[0])}


def grouped_experts(name: str, tensor: LazyTensor) -> dict[str, LazyTensor]:
    return {
        one.replace(f"local_experts.{expert}.", "") + str(expert) if expert is not None else one: each
        for one, each in single_experts(name, tensor).items()
        for expert in [int(one.split("local_experts.")[1].split(".")[0]) if "local_experts" in one else None]
    }


@pytest.mark.parametrize("renamed", [local_names, single_experts, grouped_experts])
def test_every_naming_of_megatron_gives_the_same_bytes(
    renamed: Callable[[str, LazyTensor], dict[str, LazyTensor]],
) -> None:
    as_stored = stored()
    otherwise: dict[str, LazyTensor] = {}
    for name, tensor in as_stored.items():
        otherwise |= renamed(name, tensor)
    assert otherwise.keys() != as_stored.keys()
    ours, theirs = resolved(as_stored), resolved(otherwise)
    assert ours.spec == theirs.spec
    for name, tensor in ours.tensors.items():
        assert read(theirs.tensors[name]).tobytes() == read(tensor).tobytes(), name


def test_layers_that_predict_further_tokens_are_left_out_and_named(tmp_path: Path) -> None:
    plain = load_file(HUGGINGFACE / "deepseek/model.safetensors")
    hidden = plain["model.norm.weight"].shape[0]
    further = {
        f"model.layers.3.{name.split('.', 3)[3]}": tensor.clone()
        for name, tensor in plain.items()
        if ".layers.2." in name
    } | {
        "model.layers.3.eh_proj.weight": torch.zeros(hidden, 2 * hidden),
        "model.layers.3.enorm.weight": torch.ones(hidden),
        "model.layers.3.hnorm.weight": torch.ones(hidden),
        "model.layers.3.embed_tokens.weight": plain["model.embed_tokens.weight"].clone(),
        "model.layers.3.shared_head.norm.weight": torch.ones(hidden),
        "model.layers.3.shared_head.head.weight": plain["lm_head.weight"].clone(),
    }
    source_of = tmp_path / "source"
    shutil.copytree(HUGGINGFACE / "deepseek", source_of)
    words = json.loads((source_of / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source_of / "config.json").write_text(json.dumps(words))
    save_file(plain | further, source_of / "model.safetensors")
    model = source.model(source_of)
    assert model.checkpoint.skipped == dict.fromkeys(further, "multi-token prediction")
    stream.run(convert.plan(source_of, "hf", tmp_path / "out", plan=Plan()))
    assert load_file(tmp_path / "out/model.safetensors").keys() == plain.keys()
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_layer_too_many_is_not_taken_for_one_that_predicts(tmp_path: Path) -> None:
    shutil.copytree(HUGGINGFACE / "deepseek", tmp_path / "source")
    path = tmp_path / "source/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(UnsupportedInput, match=r"explained by no rule, the first is model\.layers\.2\."):
        source.model(tmp_path / "source")


def test_megatrons_further_tokens_are_left_out_too() -> None:
    name = "mtp.layers.0.transformer_layer.mlp.linear_fc2.weight"
    norm = stored()["decoder.final_layernorm.weight"]
    kept, skipped = megatron.weights(stored() | {f"module.{name}": norm}, ())
    assert skipped[f"module.{name}"] == "multi-token prediction"
    assert resolved(kept, mtp_num_layers=1).spec == resolved(stored()).spec


def test_one_group_is_none() -> None:
    assert resolved(stored(), moe_router_num_groups=1, moe_router_group_topk=1).spec == resolved(stored()).spec


def test_the_eps_of_latents_is_the_models_in_megatron_and_fixed_in_transformers(tmp_path: Path) -> None:
    made = MCORE / MODELS["deepseek"], config("deepseek") | {"layernorm_epsilon": 1e-5}
    with pytest.raises(UnsupportedInput, match=r"latent_eps 1e-05.*convert it to onnx"):
        convert.plan(made[0], "hf", tmp_path / "out", config=made[1], plan=Plan())
    told = made[1] | {"latent_layernorm_epsilon": 1e-6}
    stream.run(convert.plan(made[0], "hf", tmp_path / "told", config=told, plan=Plan()))
    assert json.loads((tmp_path / "told/config.json").read_text())["rms_norm_eps"] == 1e-5


def test_the_graph_keeps_latents_and_nothing_else(tmp_path: Path) -> None:
    stream.run(convert.plan(HUGGINGFACE / "deepseek", "onnx", tmp_path / "out", plan=Plan(dtype="float32")))
    signature = read_manifest(tmp_path / "out").signature
    assert signature
    past = {each.name: each.shape for each in signature.inputs if "past" in each.name}
    assert past == {f"past_key_values.{i}.latent": ("batch", 1, "past", 16 + 8) for i in range(3)}


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_share_heads_and_have_the_latents_whole(tp: int) -> None:
    model, plan = source.model(HUGGINGFACE / "deepseek"), Plan(tp=tp)
    check_divisible(model.spec, plan)
    ranks = tuple(
        {name: shard(model.tensors[name], spec, SHARDING, tp, rank)[0] for name, spec in tensors(model.spec).items()}
        for rank in range(tp)
    )
    local = tensors(model.spec.shard(plan, tp - 1))
    layers = {name: tensor.shape for name, tensor in ranks[-1].items() if name.startswith("layers.")}
    assert layers == {name: local[name].shape for name in layers}
    ids: NDArray[np.int64] = np.random.default_rng(1).integers(0, model.spec.vocab_size, (2, 9))
    whole = reference.logits(model.spec, model.tensors, ids)
    ranked = RankedDecoder(model.spec, plan, None, tuple(map(Weights, ranks)))
    found = generate.logits(ranked, model.spec.vocab_size, ids, None)
    np.testing.assert_allclose(found, whole, atol=2e-5 * np.abs(whole).max())


def test_scores_without_positions_scaled_are_refused() -> None:
    with pytest.raises(UnsupportedInput, match="mscale_all_dim 1 and rope_type 'rope'"):
        resolved(stored(), mscale_all_dim=1.0)
