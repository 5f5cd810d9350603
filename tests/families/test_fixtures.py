"""Checkpoints that Megatron-core and TensorRT-LLM's own converter wrote become what they should, bit for bit."""

from __future__ import annotations

import json
import pickle
import warnings
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from blake3 import blake3
from exporters.made import torch_tensor
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemoport import reference
from nemoport.errors import UnsupportedInput
from nemoport.exporters import convert, source, stream
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.formats import megatron
from nemoport.exporters.targets import hf
from nemoport.exporters.tensor import read, stack, unstacked
from nemoport.spec import Plan
from nemoport.validation import Request, validate

DATA = Path(__file__).parents[1] / "data"
MCORE, HUGGINGFACE = DATA / "megatron/mcore", DATA / "megatron/hf"
MODELS = {
    "gpt2": "gpt2_te_tp2pp1",
    "nemotron": "nemotron_te_tp1pp1",
    "mixtral": "mixtral_te_ep2",
    "deepseek": "deepseek_te_tp1pp1",
}
ROTARY_BUFFERS = {"embed_positions", "embed_positions_for_gpt_attention", "rotary_inv_freq"}
NOT_ROUNDED = defaultdict(
    set, {"deepseek": {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in (1, 2)}}
)
"""float32 in Megatron's checkpoint, and rounded by Megatron-Bridge with all others. Here it stays what it was."""
every_model = pytest.mark.parametrize("name", MODELS)
torch.set_num_threads(1)


def config(name: str) -> dict[str, Any]:
    words: dict[str, Any] = json.loads((MCORE / f"{MODELS[name]}.cfg.json").read_text())
    return words


def converted(path: Path, to: str, out: Path, words: dict[str, Any] | None = None, **plan: Any) -> Path:
    stream.run(convert.plan(path, to, out, config=words, plan=Plan(**plan)))
    return out


@every_model
def test_megatron_becomes_the_same_model_of_hugging_face(name: str, tmp_path: Path) -> None:
    made = converted(MCORE / MODELS[name], "hf", tmp_path / "out", config(name))
    found, expected = (load_file(path / "model.safetensors") for path in (made, HUGGINGFACE / name))
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        rounded = found[key].to(torch.bfloat16) if key in NOT_ROUNDED[name] else found[key]
        assert rounded.dtype == tensor.dtype, key
        assert torch.equal(rounded, tensor), key
    ours, theirs = (source.model(path).spec for path in (made, HUGGINGFACE / name))
    assert ours == theirs == source.model(MCORE / MODELS[name], config(name)).spec


@every_model
def test_logits_are_those_of_megatron_core(name: str, tmp_path: Path) -> None:
    made = converted(MCORE / MODELS[name], "hf", tmp_path / "out", config(name))
    with np.load(MCORE / f"{MODELS[name]}.ref.npz") as answers:
        tokens, expected = answers["tokens"].astype(np.int64), answers["logits_fp32"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).eval()
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.from_numpy(tokens)).logits.numpy(), expected, rtol=0, atol=2e-5)
    model = source.model(MCORE / MODELS[name], config(name))
    np.testing.assert_allclose(reference.logits(model.spec, model.tensors, tokens), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("to, plan", [("hf", {}), ("onnx", {"dtype": "float32"}), ("onnx", {"dtype": "float16"})])
@every_model
def test_what_is_written_is_proven(name: str, to: str, plan: dict[str, Any], tmp_path: Path) -> None:
    report = validate(Request(subject=converted(MCORE / MODELS[name], to, tmp_path / "out", config(name), **plan)))
    assert report.passed, [check for check in report.checks if not check.passed]


def test_experts_become_the_same_bytes_however_they_are_named() -> None:
    """Stacked as distributed checkpoints have them, by layer or all layers at once; one by one as modules name them."""
    whole = source.model(MCORE / MODELS["mixtral"], config("mixtral"))
    stored, expected = whole.checkpoint.tensors, digests(whole)
    stacks = {name for name in stored if ".experts.experts." in name}
    assert len(stacks) == 4
    others = {name: tensor for name, tensor in stored.items() if name not in stacks}
    together = {
        name.replace(".layers.0.", ".layers."): stack([stored[name], stored[name.replace(".0.", ".1.")]])
        for name in stacks
        if ".layers.0." in name
    }
    named = [megatron.weights(together, ())[0]]
    for form in ("local_experts.{e}.{linear}.weight", "{linear}.weight{e}"):
        named.append(
            {
                name.replace(f"experts.{linear}.weight", form.format(e=e, linear=linear)): tensor
                for name in stacks
                for linear in (name.split(".")[-2],)
                for e, tensor in enumerate(unstacked(stored[name]))
            }
        )
    assert [len(each) for each in named] == [4, 16, 16]
    for each in named:
        assert digests(source.resolved(replace(whole.checkpoint, tensors=others | each))) == expected


@pytest.mark.parametrize("ep", [1, 2, 4])
def test_experts_become_the_same_bytes_at_every_expert_parallelism(ep: int, tmp_path: Path) -> None:
    """A stack of experts lies in a chunk for each expert rank, as torch.distributed.checkpoint has them."""
    whole = source.model(MCORE / MODELS["mixtral"], config("mixtral"))
    saved, index = tmp_path / "saved", Metadata(state_dict_metadata={}, storage_data={})
    saved.mkdir()
    for number, (name, tensor) in enumerate(whole.checkpoint.tensors.items()):
        pieces = ep if ".experts.experts." in name else 1
        chunks, stored = [], torch_tensor(tensor)
        for rank, piece in enumerate(stored.chunk(pieces)):
            corner = torch.Size((rank * len(piece), *[0] * (piece.ndim - 1)))
            file = f"__{rank}_{number}.distcp"
            torch.save(piece.clone(), saved / file)
            chunks.append(ChunkStorageMetadata(corner, piece.shape))
            index.storage_data[MetadataIndex(name, corner)] = _StorageInfo(file, 0, (saved / file).stat().st_size)
        index.state_dict_metadata[name] = TensorStorageMetadata(
            TensorProperties(dtype=stored.dtype), stored.shape, chunks
        )
    (saved / ".metadata").write_bytes(pickle.dumps(index))
    assert digests(source.model(saved, config("mixtral"))) == digests(whole)


def digests(model: Model) -> dict[str, str]:
    """Of everything that is written of a model."""
    return {
        slot.name: blake3(read(slot.tensor).tobytes()).hexdigest()
        for file in hf.output(model, Plan()).files
        for slot in file.slots
    }


def test_zero_centred_norms_are_written_whole_for_tensorrt_llm(tmp_path: Path) -> None:
    made = converted(MCORE / MODELS["nemotron"], "trtllm", tmp_path / "out", config("nemotron"), tp=2, pp=2)
    assert validate(Request(subject=made)).passed
    stored = load_file(HUGGINGFACE / "nemotron/model.safetensors")["model.layers.0.input_layernorm.weight"]
    found = load_file(made / "rank1.safetensors")["transformer.layers.0.input_layernorm.weight"]
    assert torch.equal(found, (stored.float() + 1).bfloat16())


def test_an_exact_gelu_is_refused_for_tensorrt_llm_which_has_none(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedInput, match="activation gelu"):
        converted(MCORE / MODELS["gpt2"], "trtllm", tmp_path / "out", config("gpt2"))


@pytest.mark.parametrize("name", ["gpt2", "mixtral"])
def test_ranks_are_what_tensorrt_llms_converter_writes(name: str, tmp_path: Path) -> None:
    made = converted(DATA / "trtllm/hf" / name, "trtllm", tmp_path / "out", tp=2, pp=2)
    theirs = DATA / f"trtllm/ckpt/{name}_t2p2"
    assert json.loads((made / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    for rank in range(4):
        found, expected = (load_file(path / f"rank{rank}.safetensors") for path in (made, theirs))
        assert found.keys() == expected.keys() - ROTARY_BUFFERS
        for key, tensor in found.items():
            assert expected[key].dtype == tensor.dtype, key
            assert torch.equal(expected[key], tensor), key
    assert validate(Request(subject=made)).passed


def test_openais_own_names_are_read_and_their_masks_left_out(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    whole = load_file(HUGGINGFACE / "gpt2/model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in whole.items()}
    bare |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 128, 128) for layer in range(3)}
    save_file(bare, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((HUGGINGFACE / "gpt2/config.json").read_text())
    made = converted(tmp_path, "hf", tmp_path.parent / f"{tmp_path.name}-out")
    found = load_file(made / "model.safetensors")
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())
