"""The `trtllm` target: what TensorRT-LLM's own converter writes, from any source, for any number of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nemoport.exporters.tensor import LazyTensor
from nemoport.spec import Attention, LanguageModel, ModelSpec

from .commands import converted
from .conftest import Once
from .fixtures import DATA, LLAMA_GQA, Fixture, every_megatron_llama
from .made import random_tensors, save_huggingface, sized, torch_tensor

TABLES = ("embed_positions", "rotary_inv_freq")
"""TensorRT-LLM's saver adds them, its loader does without."""
MODEL = sized(layers=4, hidden=48, ffn=20, vocab=131, heads=8)
"""Two KV heads, heads of 6: at tp 4 every KV head lies in two ranks, and 131 rows are padded to 132."""
every_layout = pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])


@pytest.mark.parametrize("tp, pp", [(2, 2), (4, 1)])
def test_ranks_are_those_of_tensorrt_llms_converter(tp: int, pp: int, once: Once) -> None:
    made, theirs = once(LLAMA_GQA, "trtllm", tp=tp, pp=pp), DATA / f"trtllm/ckpt/llama_gqa_t{tp}p{pp}"
    assert json.loads((made / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    for rank in range(tp * pp):
        found, expected = (load_file(path / f"rank{rank}.safetensors") for path in (made, theirs))
        expected = {name: tensor for name, tensor in expected.items() if not any(table in name for table in TABLES)}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
    assert not (made / f"rank{tp * pp}.safetensors").exists()


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (2, 2), (4, 1)])
@every_megatron_llama
def test_straight_from_megatron_is_the_same_as_through_huggingface(
    fixture: Fixture, tp: int, pp: int, once: Once
) -> None:
    straight = once(fixture, "trtllm", tp=tp, pp=pp)
    through = once(once(fixture, "hf"), "trtllm", tp=tp, pp=pp)
    for rank in range(tp * pp):
        name = f"rank{rank}.safetensors"
        assert (straight / name).read_bytes() == (through / name).read_bytes(), name
    assert (straight / "config.json").read_bytes() == (through / "config.json").read_bytes()


@pytest.fixture(scope="module")
def canonical() -> dict[str, LazyTensor]:
    return random_tensors(MODEL)


@pytest.fixture(scope="module")
def model(canonical: dict[str, LazyTensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_huggingface(tmp_path_factory.mktemp("made") / "model", MODEL, canonical)


@every_layout
def test_gathered_ranks_are_the_model_whatever_the_layout(
    tp: int, pp: int, model: Path, canonical: dict[str, LazyTensor], tmp_path: Path
) -> None:
    directory = converted(model, "trtllm", tmp_path / "out", tp=tp, pp=pp)
    gathered = gather(directory, MODEL, tp, pp)
    assert gathered.keys() == canonical.keys()
    for name, tensor in gathered.items():
        np.testing.assert_array_equal(_bits(tensor), _bits(torch_tensor(canonical[name])), name)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_tied_model_has_its_head_written_out(tp: int, tmp_path: Path) -> None:
    spec = replace(MODEL, head=LanguageModel(tied=True))
    canonical = random_tensors(spec)
    made = converted(save_huggingface(tmp_path / "model", spec, canonical), "trtllm", tmp_path / "out", tp=tp)
    gathered = gather(made, spec, tp, 1)
    np.testing.assert_array_equal(_bits(gathered["head.weight"]), _bits(torch_tensor(canonical["embed.weight"])))
    assert json.loads((made / "config.json").read_text()).get("share_embedding_table", False) is False


def test_padding_rows_of_the_head_are_zeros(model: Path, tmp_path: Path) -> None:
    ranks = converted(model, "trtllm", tmp_path / "out", tp=4)
    last = load_file(ranks / "rank3.safetensors")["lm_head.weight"]
    assert last.shape == (33, 48)
    assert not last[-1].any()


def gather(directory: Path, spec: ModelSpec, tp: int, pp: int) -> dict[str, torch.Tensor]:
    """The ranks put together again by the format's description, written here without the tables of nemoport."""
    ranks = [load_file(directory / f"rank{rank}.safetensors") for rank in range(tp * pp)]
    mixer = spec.mixers[0]
    assert isinstance(mixer, Attention)
    copies, heads = max(1, tp // mixer.kv_heads), mixer.heads // tp * mixer.head_dim
    first, last = ranks[:tp], ranks[-tp:]
    whole = {
        "embed.weight": _same([rank["transformer.vocab_embedding.weight"] for rank in first]),
        "norm.weight": _same([rank["transformer.ln_f.weight"] for rank in last]),
        "head.weight": torch.cat([rank["lm_head.weight"] for rank in last])[: spec.vocab_size],
    }
    layers = len(spec.blocks) // pp
    for layer in range(len(spec.blocks)):
        stage = ranks[layer // layers * tp :][:tp]
        prefix, place = f"transformer.layers.{layer % layers}.", f"layers.{layer}."
        qkv = [rank[f"{prefix}attention.qkv.weight"] for rank in stage]
        kv = (qkv[0].shape[0] - heads) // 2
        assert kv == max(1, mixer.kv_heads // tp) * mixer.head_dim
        keys, values = ([part[start : start + kv] for part in qkv] for start in (heads, heads + kv))
        whole[f"{place}attn.q.weight"] = torch.cat([part[:heads] for part in qkv])
        for name, parts in (("k", keys), ("v", values)):
            owners = [_same(parts[i : i + copies]) for i in range(0, tp, copies)]
            whole[f"{place}attn.{name}.weight"] = torch.cat(owners)
        cut = {"attn.o": ("attention.dense", 1), "ffn.gate": ("mlp.fc", 0), "ffn.up": ("mlp.gate", 0)}
        for name, (theirs, axis) in {**cut, "ffn.down": ("mlp.proj", 1)}.items():
            whole[f"{place}{name}.weight"] = torch.cat([rank[f"{prefix}{theirs}.weight"] for rank in stage], axis)
        for name, theirs in {"attn_norm": "input_layernorm", "ffn_norm": "post_layernorm"}.items():
            whole[f"{place}{name}.weight"] = _same([rank[f"{prefix}{theirs}.weight"] for rank in stage])
    return whole


def _same(copies: list[torch.Tensor]) -> torch.Tensor:
    for copy in copies[1:]:
        np.testing.assert_array_equal(_bits(copy), _bits(copies[0]))
    return copies[0]


def _bits(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.int16]]:
    return tensor.contiguous().view(torch.int16).numpy()
