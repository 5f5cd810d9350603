"""Blocks that differ, against transformers' Llama: a half whose output matrix is zero is a half that is skipped, a
narrow one is a wide one with zeros, and fewer KV heads are some that are equal."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nemoport import reference
from nemoport.errors import UnsupportedInput
from nemoport.exporters import convert, source, stream
from nemoport.spec import Plan
from nemoport.validation import Request, validate

from .test_transformers import Array

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

HIDDEN, HEADS, WIDE, NARROW, VOCAB, LENGTH = 48, 6, 512, 256, 131, 13
KV_HEADS = (3, None, 1, 3)
WIDTHS = (WIDE, NARROW, None, NARROW)
BLOCKS = [
    {
        "attention": {"n_heads_in_group": HEADS // kv if kv else None, "no_op": not kv, "replace_with_linear": False},
        "ffn": {"ffn_mult": 3 * width / (2 * HIDDEN) if width else None, "no_op": not width},
    }
    for kv, width in zip(KV_HEADS, WIDTHS, strict=True)
]
CONFIG = {
    "model_type": "nemotron-nas",
    "architectures": ["DeciLMForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": len(BLOCKS),
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "num_key_value_heads": None,
    "intermediate_size": None,
    "block_configs": BLOCKS,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array, Array]:
    """The checkpoint, tokens, and what the Llama that it amounts to answers."""
    torch.manual_seed(2)
    config = transformers.LlamaConfig(
        **{key: CONFIG[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "num_hidden_layers")},
        intermediate_size=WIDE,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        attn_implementation="eager",
    )
    llama = transformers.LlamaForCausalLM(config).eval().float()
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.normal_(mean=0.5, std=0.2)
        for layer, kv, width in zip(llama.model.layers, KV_HEADS, WIDTHS, strict=True):
            if not kv:
                layer.self_attn.o_proj.weight.zero_()
            if kv == 1:
                for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                    linear.weight.copy_(linear.weight[: HIDDEN // HEADS].repeat(3, 1))
            layer.mlp.down_proj.weight[:, width or 0 :] = 0
        ids = np.random.default_rng(5).integers(0, VOCAB, (2, LENGTH))
        logits = llama(torch.from_numpy(ids), use_cache=False).logits.numpy()
    stored = {}
    for name, tensor in llama.state_dict().items():
        layer = int(name.split(".")[2]) if ".layers." in name else None
        if layer is not None:
            kv, width = KV_HEADS[layer], WIDTHS[layer]
            if (not kv and ("self_attn" in name or "input_layernorm" in name)) or (
                not width and ("mlp" in name or "post_attention" in name)
            ):
                continue
            if kv and (".k_proj." in name or ".v_proj." in name):
                tensor = tensor[: kv * HIDDEN // HEADS]
            if width and ("gate_proj" in name or "up_proj" in name):
                tensor = tensor[:width]
            if width and "down_proj" in name:
                tensor = tensor[:, :width]
        stored[name] = tensor.contiguous().clone()
    path = tmp_path_factory.mktemp("nas") / "model"
    path.mkdir()
    save_file(stored, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path, ids, logits


def test_the_reference_answers_as_the_llama_that_it_amounts_to(model: tuple[Path, Array, Array]) -> None:
    path, ids, logits = model
    found = source.model(path)
    assert found.spec.family == "llama_nemotron"
    assert [block.mixer and block.mixer.kv_heads for block in found.spec.blocks] == list(KV_HEADS)
    assert [block.ffn and getattr(block.ffn, "intermediate", None) for block in found.spec.blocks] == list(WIDTHS)
    np.testing.assert_allclose(reference.logits(found.spec, found.tensors, ids), logits, rtol=0, atol=2e-5)


def test_the_graph_has_no_cache_where_there_is_no_attention(model: tuple[Path, Array, Array], tmp_path: Path) -> None:
    path, *_ = model
    stream.run(convert.plan(path, "onnx", tmp_path / "out", plan=Plan(dtype="float32")))
    import onnx

    graph = onnx.load_model(tmp_path / "out/model.onnx", load_external_data=False).graph
    caches = {each.name for each in graph.input if "past" in each.name}
    assert caches == {f"past_key_values.{i}.{part}" for i in (0, 2, 3) for part in ("key", "value")}
    assert validate(Request(subject=tmp_path / "out")).passed


def test_it_is_written_as_it_was_and_refused_where_it_cannot_be(
    model: tuple[Path, Array, Array], tmp_path: Path
) -> None:
    path, *_ = model
    stream.run(convert.plan(path, "hf", tmp_path / "out", plan=Plan()))
    assert source.model(tmp_path / "out").spec == source.model(path).spec
    assert validate(Request(subject=tmp_path / "out")).passed
    with pytest.raises(UnsupportedInput, match="llama_nemotron has no trtllm names; use --to hf"):
        convert.plan(path, "trtllm", tmp_path / "ranks", plan=Plan())
