"""Small models of transformers, what nemoport would say they are, and their graphs run with caches."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from nemoport.exporters.checkpoint import Checkpoint, Model, Output
from nemoport.exporters.targets import onnx as target
from nemoport.exporters.tensor import LazyTensor, Zeros, read
from nemoport.spec import (
    Attention,
    Block,
    Dense,
    LanguageModel,
    LinearScaling,
    Llama3Scaling,
    ModelSpec,
    Norm,
    Rope,
    tensors,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

Array = NDArray[Any]

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, POSITIONS = 3, 48, 6, 2, 10, 52, 131, 96
WINDOW = 5
LENGTH = 17

SIZES = {
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
ATTENTION = Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, rope=Rope(dims=HEAD_DIM))
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of transformers and what nemoport would say it is."""

    config: Callable[..., Any]
    words: dict[str, Any]
    attention: Attention = ATTENTION
    layers: tuple[Attention, ...] = ()
    """Where they differ."""
    ffn: Dense = Dense(intermediate=FFN)  # noqa: RUF009
    norm: Norm = Norm(eps=1e-6)  # noqa: RUF009
    tied: bool = False
    alter: Callable[[Any], None] = lambda model: None

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            family="test",
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            max_positions=POSITIONS,
            norm=self.norm,
            head=LanguageModel(tied=self.tied),
            blocks=tuple(Block(mixer=mixer, ffn=self.ffn) for mixer in self.layers or (self.attention,) * LAYERS),
        )


class Ungated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = torch.nn.Linear(HIDDEN, FFN), torch.nn.Linear(FFN, HIDDEN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.down_proj(torch.nn.functional.silu(self.up_proj(x)))
        return y


def ungate(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp = Ungated()


def rope(kind: str, theta: float, **more: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


CASES = {
    "llama": Case(config=transformers.LlamaConfig, words={"head_dim": HEAD_DIM}),
    "llama3 scaling": Case(
        config=transformers.LlamaConfig,
        words={"head_dim": HEAD_DIM, **rope("llama3", 5e5, **LLAMA3)},
        attention=replace(
            ATTENTION, rope=Rope(dims=HEAD_DIM, base=5e5, scaling=Llama3Scaling(original_max_positions=64))
        ),
    ),
    "linear scaling": Case(
        config=transformers.LlamaConfig,
        words={"head_dim": HEAD_DIM, **rope("linear", 1e4, factor=3.0)},
        attention=replace(ATTENTION, rope=Rope(dims=HEAD_DIM, scaling=LinearScaling(factor=3.0))),
    ),
    "biases, not gated": Case(
        config=transformers.LlamaConfig,
        words={"head_dim": HEAD_DIM, "attention_bias": True, "mlp_bias": True},
        attention=replace(ATTENTION, qkv_bias=True, out_bias=True),
        ffn=Dense(intermediate=FFN, gated=False, bias=True),
        alter=ungate,
    ),
    "mistral": Case(
        config=transformers.MistralConfig,
        words={"head_dim": HEAD_DIM, "sliding_window": WINDOW},
        attention=replace(ATTENTION, window=WINDOW),
    ),
    "qwen2": Case(
        config=transformers.Qwen2Config,
        words=rope("default", 1e6),
        attention=Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=8, rope=Rope(dims=8, base=1e6), qkv_bias=True),
    ),
    "qwen3 tied": Case(
        config=transformers.Qwen3Config,
        words={"head_dim": HEAD_DIM, "tie_word_embeddings": True},
        attention=replace(ATTENTION, qk_norm=True),
        tied=True,
    ),
    "layers with window, without rope": Case(
        config=transformers.SmolLM3Config,
        words=rope("default", 1e4)
        | {
            "no_rope_layers": [1, 0, 1],
            "sliding_window": WINDOW,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "tie_word_embeddings": False,
            "pad_token_id": 0,
        },
        layers=tuple(
            Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=8, rope=rope, window=window)
            for rope, window in ((Rope(dims=8), WINDOW), (None, None), (Rope(dims=8), None))
        ),
    ),
    "layer norm, partial rope": Case(
        config=transformers.StableLmConfig,
        words=rope("default", 1e4, partial_rotary_factor=0.5) | {"layer_norm_eps": 1e-5},
        attention=Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=8, rope=Rope(dims=4)),
        norm=Norm(kind="layer", eps=1e-5),
    ),
}

HF_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn.q_norm": "self_attn.q_norm",
    "attn.k_norm": "self_attn.k_norm",
    **{f"attn.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"ffn.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def hf_name(name: str) -> str:
    stem, _, last = name.rpartition(".")
    match stem.split(".", 2):
        case ["embed"]:
            return f"model.embed_tokens.{last}"
        case ["norm"]:
            return f"model.norm.{last}"
        case ["head"]:
            return f"lm_head.{last}"
        case ["layers", i, part]:
            return f"model.layers.{i}.{HF_NAMES[part]}.{last}"
    raise AssertionError(name)


def model_of(spec: ModelSpec, held: dict[str, LazyTensor]) -> Model:
    checkpoint = Checkpoint(path=Path(), format="test", writer="", naming="", config={}, tensors={})
    return Model(checkpoint=checkpoint, spec=spec, tensors=held, sources={name: (name,) for name in held})


def write(output: Output, directory: Path) -> Path:
    for file in output.files:
        with (directory / file.path).open("wb") as stream:
            stream.write(file.header)
            for slot, offset in zip(file.slots, file.offsets, strict=True):
                stream.seek(offset)
                stream.write(read(slot.tensor).tobytes())
    for path, content in output.sidecars.items():
        (directory / path).write_bytes(content)
    return directory / target.GRAPH


def run_on_cpu(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


class Runner:
    """A graph together with its KV cache."""

    def __init__(self, path: Path, spec: ModelSpec, batch: int = 1, dtype: str = "float32") -> None:
        self.session = run_on_cpu(path)
        self.past = {
            f"past_key_values.{i}.{state.name}": np.zeros(
                (batch, *(size or 0 for size in state.shape)), "float32" if state.wide else dtype
            )
            for i, mixer in enumerate(spec.mixers)
            for state in mixer.state
        }

    def __call__(self, ids: Array, mask: Array | None = None, positions: Array | None = None) -> Array:
        past = next(iter(self.past.values())).shape[2]
        total = past + ids.shape[1]
        given = {
            "input_ids": ids,
            "attention_mask": np.ones((len(ids), total), np.int64) if mask is None else mask,
            "position_ids": np.tile(np.arange(past, total), (len(ids), 1)) if positions is None else positions,
        }
        logits, *present = self.session.run(None, given | self.past)
        assert logits.dtype == np.float32
        self.past = dict(zip(self.past, present, strict=True))
        result: Array = logits
        return result


@dataclass(frozen=True)
class Exported:
    case: Case
    model: Model
    output: Output
    path: Path
    hf: Any

    def runner(self, batch: int = 1) -> Runner:
        return Runner(self.path, self.case.spec, batch)

    def truth(self, ids: Array) -> Array:
        with torch.no_grad():
            logits: Array = self.hf(input_ids=torch.from_numpy(ids)).logits.numpy()
        return logits


def zeros(spec: ModelSpec, dtype: str) -> Model:
    return model_of(spec, {name: Zeros(tensor.shape, dtype) for name, tensor in tensors(spec).items()})
