"""Checkpoints of a file for each rank, cut here as Megatron cuts them, and not by the reader's tables."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from nemoport.exporters.tensor import LazyTensor, read
from nemoport.spec import Attention, Dense, ModelSpec

from .made import sized, stored, torch_tensor

State = dict[str, torch.Tensor]
SPEC = sized(layers=6, hidden=32, ffn=20, vocab=50)
"""Eight heads in two groups."""
_ROWS = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias")
_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")


def whole(canonical: Mapping[str, LazyTensor], spec: ModelSpec = SPEC) -> State:
    """The model under Megatron-core's names, its vocabulary padded to 64 rows."""
    named = {name: torch_tensor(tensor) for name, tensor in stored(spec, "megatron", canonical).items()}
    return {name: _padded(tensor) if name.endswith(_ROWS[:2]) else tensor for name, tensor in named.items()}


def tensor_rank(state: State, rank: int, tp: int) -> State:
    """What one tensor-parallel rank holds."""

    def cut(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if "linear_fc1." in name and "layer_norm" not in name:
            return torch.cat([half.chunk(tp)[rank] for half in tensor.chunk(2)])
        if name.endswith(_ROWS):
            return tensor.chunk(tp)[rank].clone()
        return tensor.chunk(tp, 1)[rank].clone() if name.endswith(_COLUMNS) else tensor.clone()

    return {name: cut(name, tensor) for name, tensor in state.items()}


def stages(state: State, counts: Sequence[int]) -> list[State]:
    """So many layers each, numbered from 0 in each; the embedding in the first, norm and head in the last."""
    found: list[State] = [{} for _ in counts]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    for name, tensor in state.items():
        if not name.startswith("decoder.layers."):
            found[0 if name.startswith("embedding") else -1][name] = tensor
            continue
        _, _, number, rest = name.split(".", 3)
        stage = max(i for i, first in enumerate(firsts) if first <= int(number) and counts[i])
        found[stage][f"decoder.layers.{int(number) - firsts[stage]}.{rest}"] = tensor
    return found


def arguments(spec: ModelSpec = SPEC, **more: Any) -> Namespace:
    """As Megatron-LM pickles them; what it has and nobody reads among them."""
    mixer, ffn = _block(spec)
    return Namespace(
        **{
            "num_layers": len(spec.blocks),
            "hidden_size": spec.hidden_size,
            "num_attention_heads": mixer.heads,
            "group_query_attention": True,
            "num_query_groups": mixer.kv_heads,
            "kv_channels": mixer.head_dim,
            "ffn_hidden_size": ffn.intermediate,
            "normalization": "RMSNorm",
            "norm_epsilon": spec.norm.eps,
            "swiglu": True,
            "squared_relu": False,
            "add_bias_linear": ffn.bias,
            "position_embedding_type": "rope",
            "rotary_base": 10000,
            "rotary_percent": 1.0,
            "untie_embeddings_and_output_weights": True,
            "max_position_embeddings": spec.max_positions,
            "vocab_size": spec.vocab_size,
            "padded_vocab_size": 64,
            "params_dtype": torch.bfloat16,
        }
        | more
    )


def save_legacy(directory: Path, models: Mapping[Any, Mapping[str, Any]], args: Namespace | None, **more: Any) -> Path:
    """Megatron-LM's directory: each rank, a tuple, by the numbers of its name, with what it saved of the model."""
    for numbers, model in models.items():
        name = "_".join(["mp_rank", f"{numbers[0]:02d}", *(f"{number:03d}" for number in numbers[1:])])
        (directory / "iter_0000007" / name).mkdir(parents=True)
        rng = {"np_rng_state": np.random.RandomState(1).get_state(), "cpu": torch.get_rng_state()}
        optimizer = {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}}
        saved = {"args": args, "iteration": 7, "checkpoint_version": 3.0, "rng_state": [rng], "optimizer": optimizer}
        torch.save({**saved, **more, **model}, directory / "iter_0000007" / name / "model_optim_rng.pt")
    (directory / "latest_checkpointed_iteration.txt").write_text("7")
    return directory


def save_nemo1(directory: Path, files: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]) -> Path:
    """NeMo 1.0's, unpacked: a state dict for each path."""
    for name, state in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, directory / name)
    (directory / "model_config.yaml").write_text(yaml.safe_dump(dict(config)))
    return directory


def nemo1_config(spec: ModelSpec = SPEC, **more: Any) -> dict[str, Any]:
    mixer, ffn = _block(spec)
    return {
        "encoder_seq_length": spec.max_positions,
        "num_layers": len(spec.blocks),
        "hidden_size": spec.hidden_size,
        "ffn_hidden_size": ffn.intermediate,
        "num_attention_heads": mixer.heads,
        "num_query_groups": mixer.kv_heads,
        "kv_channels": mixer.head_dim,
        "normalization": "rmsnorm",
        "layernorm_epsilon": spec.norm.eps,
        "activation": "fast-swiglu",
        "bias": ffn.bias,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "share_embeddings_and_output_weights": False,
        "override_vocab_size": spec.vocab_size,
        "target": "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel",
        "nemo_version": "1.23.0",
    } | more


def check_equal(found: Mapping[str, LazyTensor], expected: Mapping[str, LazyTensor]) -> None:
    """Bit by bit."""
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(bits(found[name]), bits(expected[name]), name)


def bits(tensor: LazyTensor) -> np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger]]:
    array = read(tensor)
    return np.ascontiguousarray(array).view(f"u{array.itemsize}").reshape(array.shape)


def renamed(state: State, names: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in state.items():
        for new, old in names.items():
            name = name.replace(new, old)
        yield name, tensor


def _block(spec: ModelSpec) -> tuple[Attention, Dense]:
    mixer, ffn = spec.blocks[0].mixer, spec.blocks[0].ffn
    assert isinstance(mixer, Attention)
    assert isinstance(ffn, Dense)
    return mixer, ffn


def _padded(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, torch.full((64 - tensor.shape[0], tensor.shape[1]), 7.0, dtype=tensor.dtype)])
