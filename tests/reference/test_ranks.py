"""Rank files, run rank by rank, say what the model they were cut from says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from nemoport import reference
from nemoport.errors import DamagedInput, InputError, UnsupportedInput
from nemoport.reference.rank_files import read
from nemoport.reference.rope import frequencies
from nemoport.spec import Attention, Block, Dense, LanguageModel, ModelSpec, Norm, Rope

from .tiny import DATA, answers, attention, canonical, huggingface, pair, save_ranks, spec, tokens

CHECKPOINTS = DATA / "trtllm/ckpt"
written_by_tensorrt_llm = pytest.mark.parametrize("name", ["llama_gqa_t2p2", "llama_gqa_t4p1"])


@pytest.fixture(scope="module")
def ids() -> NDArray[np.int64]:
    return tokens(batch=3, length=19, vocab=1003)


@pytest.fixture(scope="module")
def expected(ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Of the model that TensorRT-LLM's converter was given."""
    source = DATA / "trtllm/hf/llama_gqa"
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_pretrained(source)).float().eval()
    model.load_state_dict({name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()})
    return answers(model, ids)


@written_by_tensorrt_llm
def test_logits_of_a_checkpoint_by_tensorrt_llm_are_those_of_its_source(
    name: str, ids: NDArray[np.int64], expected: NDArray[np.float32]
) -> None:
    np.testing.assert_allclose(reference.rank_logits(CHECKPOINTS / name, ids), expected, atol=2e-6, rtol=1e-5)


@written_by_tensorrt_llm
def test_ranks_differ_from_the_whole_by_rounding_only(name: str, ids: NDArray[np.int64]) -> None:
    mixer = Attention(heads=8, kv_heads=2, head_dim=8, rope=Rope(dims=8))
    meaning = ModelSpec(
        family="llama",
        vocab_size=1003,
        hidden_size=64,
        max_positions=128,
        norm=Norm(eps=1e-6),
        head=LanguageModel(),
        blocks=(Block(mixer=mixer, ffn=Dense(intermediate=176)),) * 4,
    )
    assert reference.load_ranks(CHECKPOINTS / name).spec == meaning
    whole = reference.logits(meaning, canonical(load_file(DATA / "trtllm/hf/llama_gqa/model.safetensors")), ids)
    found = reference.rank_logits(CHECKPOINTS / name, ids)
    assert np.abs(found - whole).max() <= 1e-5 * np.abs(whole).max()


@written_by_tensorrt_llm
def test_ranks_generate_what_the_whole_generates(name: str, ids: NDArray[np.int64]) -> None:
    spec_of_file = reference.load_ranks(CHECKPOINTS / name).spec
    weights = canonical(load_file(DATA / "trtllm/hf/llama_gqa/model.safetensors"))
    whole = reference.greedy(spec_of_file, weights, ids, max_tokens=9)
    np.testing.assert_array_equal(reference.rank_greedy(CHECKPOINTS / name, ids, max_tokens=9), whole)


@written_by_tensorrt_llm
def test_frequencies_are_those_that_tensorrt_llm_wrote(name: str) -> None:
    stored = load_file(CHECKPOINTS / name / "rank0.safetensors")["rotary_inv_freq"]
    torch.testing.assert_close(frequencies(Rope(dims=8)), stored)


@pytest.mark.parametrize("name, one, other", [("llama_gqa_t2p2", 2, 3), ("llama_gqa_t4p1", 0, 3)])
def test_swapped_rank_files_change_the_logits(
    tmp_path: Path, name: str, one: int, other: int, ids: NDArray[np.int64], expected: NDArray[np.float32]
) -> None:
    directory = copy(name, tmp_path)
    swap(directory, one, other)
    assert np.abs(reference.rank_logits(directory, ids) - expected).max() > 0.05


def test_one_layer_of_another_rank_changes_the_logits(
    tmp_path: Path, ids: NDArray[np.int64], expected: NDArray[np.float32]
) -> None:
    """Swapping whole files of a first stage would only reorder a sum: heads with their own output columns."""
    directory = copy("llama_gqa_t2p2", tmp_path)
    qkv = "transformer.layers.1.attention.qkv.weight"
    other = load_file(directory / "rank1.safetensors")[qkv]
    change(directory / "rank0.safetensors", {qkv: other})
    assert np.abs(reference.rank_logits(directory, ids) - expected).max() > 1e-4


@pytest.mark.parametrize(
    "replicated", ["transformer.vocab_embedding.weight", "transformer.layers.0.input_layernorm.weight"]
)
def test_each_rank_uses_its_own_copy_of_what_is_replicated(
    tmp_path: Path, ids: NDArray[np.int64], expected: NDArray[np.float32], replicated: str
) -> None:
    directory = copy("llama_gqa_t2p2", tmp_path)
    tensor = load_file(directory / "rank1.safetensors")[replicated]
    change(directory / "rank1.safetensors", {replicated: tensor * 2})
    assert np.abs(reference.rank_logits(directory, ids) - expected).max() > 1e-4


def test_files_of_two_stages_swapped_are_refused(tmp_path: Path) -> None:
    directory = copy("llama_gqa_t2p2", tmp_path)
    swap(directory, 0, 2)
    with pytest.raises(DamagedInput, match=r"rank0\.safetensors: transformer\.vocab_embedding\.weight is missing"):
        reference.load_ranks(directory)


CUTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("Llama", {}, {}),
    ("Llama", {"attention_bias": True, "mlp_bias": True}, {"attn_bias": True, "mlp_bias": True}),
    ("Llama", {}, {"embedding_axis": 0}),
    ("Llama", {}, {"embedding_axis": 1}),
    (
        "Llama",
        {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rotary_base": 500.0, "rotary_scaling": {"type": "linear", "factor": 4.0}},
    ),
    ("Qwen2", {}, {"attn_bias": True}),
    ("Mistral", {"sliding_window": 5}, {}),
]


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 3), (2, 3), (6, 1)])
@pytest.mark.parametrize("name, theirs, ours", CUTS, ids=lambda value: value if isinstance(value, str) else "")
def test_every_cut_gives_the_logits_of_transformers(
    tmp_path: Path, name: str, theirs: dict[str, Any], ours: dict[str, Any], tp: int, pp: int
) -> None:
    if tp == 6:
        theirs, ours = {**theirs, "intermediate_size": 54}, {**ours, "intermediate_size": 54}
    model = huggingface(name, **theirs)
    directory = save_ranks(tmp_path / "ranks", model, f"{name}ForCausalLM", tp, pp, **ours)
    ids = tokens()
    found = reference.rank_logits(directory, ids, max_attention_window=theirs.get("sliding_window"))
    np.testing.assert_allclose(found, answers(model, ids), atol=5e-5, rtol=1e-5)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_shared_embedding_table_is_the_output_matrix(tmp_path: Path, tp: int) -> None:
    model = huggingface("Llama", tie_word_embeddings=True)
    axis = 0 if tp > 1 else None
    directory = save_ranks(tmp_path / "r", model, "LlamaForCausalLM", tp, 1, axis, share_embedding_table=True)
    np.testing.assert_allclose(reference.rank_logits(directory, tokens()), answers(model, tokens()), atol=5e-5)


def test_a_padded_row_is_answered_by_ranks_as_by_the_whole(tmp_path: Path) -> None:
    model = pair(huggingface("Llama"), spec(attention()))
    directory = save_ranks(tmp_path / "ranks", model.huggingface, "LlamaForCausalLM", 2, 3)
    ids, mask = tokens(), np.ones((2, 17), bool)
    mask[0, :5] = False
    whole = reference.logits(model.spec, model.weights, ids, mask=mask)
    np.testing.assert_allclose(reference.rank_logits(directory, ids, mask=mask)[mask], whole[mask], atol=2e-5)


QKV = "transformer.layers.0.attention.qkv.weight"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({QKV: None}, rf"rank1\.safetensors: {QKV} is missing, bfloat16 \[48, 64\] needed"),
        (
            {QKV: torch.zeros(64, 48, dtype=torch.bfloat16)},
            rf"{QKV} is bfloat16 \[64, 48\], bfloat16 \[48, 64\] needed",
        ),
        ({QKV: torch.zeros(48, 64)}, rf"{QKV} is float32 \[48, 64\], bfloat16 \[48, 64\] needed"),
        ({"lm_head.weight": torch.zeros(2, 2)}, r"lm_head\.weight is there as float32 \[2, 2\], no such tensor needed"),
    ],
)
def test_a_wrong_tensor_is_named_with_what_was_found_and_needed(
    tmp_path: Path, tensors: Mapping[str, torch.Tensor | None], message: str
) -> None:
    directory = copy("llama_gqa_t2p2", tmp_path)
    change(directory / "rank1.safetensors", tensors)
    with pytest.raises(DamagedInput, match=message):
        reference.load_ranks(directory)


@pytest.mark.parametrize("length", [0, 5, 100, -1])
def test_a_truncated_rank_is_damaged(tmp_path: Path, length: int) -> None:
    directory = copy("llama_gqa_t2p2", tmp_path)
    path = directory / "rank3.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DamagedInput, match=r"rank3\.safetensors"):
        reference.load_ranks(directory)


def test_a_missing_and_a_surplus_rank_are_named(tmp_path: Path) -> None:
    directory = copy("llama_gqa_t2p2", tmp_path)
    (directory / "rank2.safetensors").rename(directory / "rank7.safetensors")
    with pytest.raises(DamagedInput, match=r"lacks rank2\.safetensors \(1 of 4 ranks\)"):
        reference.load_ranks(directory)
    shutil.copy(directory / "rank7.safetensors", directory / "rank2.safetensors")
    with pytest.raises(DamagedInput, match=r"has rank7\.safetensors"):
        reference.load_ranks(directory)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"architecture": "FalconForCausalLM"}, UnsupportedInput, "is a FalconForCausalLM"),
        ({"architecture": "MixtralForCausalLM"}, UnsupportedInput, "has no experts"),
        ({"architecture": None}, UnsupportedInput, "is a None"),
        ({"quantization": {"quant_algo": "FP8"}}, UnsupportedInput, "quant_algo FP8"),
        ({"moe": {"num_experts": 8}}, UnsupportedInput, "has experts"),
        ({"hidden_act": "gelu"}, UnsupportedInput, "hidden_act 'gelu'"),
        ({"qk_layernorm": True}, UnsupportedInput, "qk_layernorm True"),
        ({"rotary_scaling": {"type": "yarn"}}, UnsupportedInput, "of type yarn"),
        ({"share_embedding_table": True}, UnsupportedInput, "shares the embedding table"),
        ({"num_attention_heads": "8"}, DamagedInput, "config.json"),
        ({"num_attention_heads": 7}, DamagedInput, "7 heads do not divide over tp=2"),
        ({"num_key_value_heads": 0}, DamagedInput, "config.json|rank0"),
        ({"mapping": {"world_size": 8, "tp_size": 2, "pp_size": 2}}, DamagedInput, "world_size 8 is not tp_size 2"),
        ({"norm_epsilon": ...}, DamagedInput, "does not say 'norm_epsilon'"),
        ({"num_hidden_layers": 0}, DamagedInput, "without layers"),
        ({"embedding_sharding_dim": 2}, DamagedInput, "embedding_sharding_dim 2, 0 or 1 needed"),
        ({"rotary_embedding_dim": 10}, DamagedInput, "rotary_embedding_dim 10"),
    ],
)
def test_a_config_that_does_not_run_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[InputError], message: str
) -> None:
    directory = copy("llama_gqa_t2p2", tmp_path)
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    with pytest.raises(error, match=message):
        reference.load_ranks(directory)


def test_a_directory_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInput, match=r"has no config\.json"):
        reference.load_ranks(tmp_path)


def test_row_parallel_biases_stay_with_the_first_rank_of_a_stage(tmp_path: Path) -> None:
    model = huggingface("Llama", attention_bias=True, mlp_bias=True)
    directory = save_ranks(tmp_path / "r", model, "LlamaForCausalLM", 2, 3, attn_bias=True, mlp_bias=True)
    ranks = read(directory).ranks
    assert [("layers.0.attn.o.bias" in rank, "layers.0.ffn.down.bias" in rank) for rank in ranks] == [
        (True, True),
        (False, False),
    ] * 3


def copy(name: str, to: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINTS / name, to / name))


def swap(directory: Path, one: int, other: int) -> None:
    aside = directory / "aside"
    first, second = directory / f"rank{one}.safetensors", directory / f"rank{other}.safetensors"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def change(path: Path, tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Replace tensors of a file, or remove those that are None."""
    stored = {**load_file(path), **tensors}
    save_file({name: tensor for name, tensor in stored.items() if tensor is not None}, path)
