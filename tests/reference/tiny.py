"""Tiny models: a Hugging Face one with random weights, the same as a spec, canonical tensors and rank files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file

from nemoport.exporters.tensor import Held, LazyTensor
from nemoport.spec import Attention, Block, Dense, LanguageModel, ModelSpec, Norm, Rope

DATA = Path(__file__).parents[1] / "data"
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, FFN, LAYERS = 48, 6, 2, 10, 131, 52, 3

NAMES = {
    "model.embed_tokens.": "embed.",
    "model.layers.": "layers.",
    "model.norm.": "norm.",
    "lm_head.": "head.",
    ".self_attn.q_norm.": ".attn.q_norm.",
    ".self_attn.k_norm.": ".attn.k_norm.",
    ".self_attn.q_proj.": ".attn.q.",
    ".self_attn.k_proj.": ".attn.k.",
    ".self_attn.v_proj.": ".attn.v.",
    ".self_attn.o_proj.": ".attn.o.",
    ".mlp.gate_proj.": ".ffn.gate.",
    ".mlp.up_proj.": ".ffn.up.",
    ".mlp.down_proj.": ".ffn.down.",
    ".input_layernorm.": ".attn_norm.",
    ".post_attention_layernorm.": ".ffn_norm.",
}


@dataclass(frozen=True)
class Pair:
    """A model of transformers, and what it should be here."""

    huggingface: Any
    spec: ModelSpec
    weights: Mapping[str, LazyTensor]


def attention(**changes: Any) -> Attention:
    rope = changes.pop("rope", Rope(dims=HEAD_DIM))
    return Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, rope=rope, **changes)


def spec(*mixers: Attention, tied: bool = False, mlp_bias: bool = False) -> ModelSpec:
    """One mixer for each layer, or one for all."""
    ffn = Dense(intermediate=FFN, bias=mlp_bias)
    return ModelSpec(
        family="tiny",
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        max_positions=64,
        norm=Norm(eps=1e-5),
        head=LanguageModel(tied=tied),
        blocks=tuple(Block(mixer=mixer, ffn=ffn) for mixer in (mixers if len(mixers) > 1 else mixers * LAYERS)),
    )


def huggingface(name: str, **changes: Any) -> Any:
    """A random `{name}ForCausalLM`, its norms and biases random too."""
    config: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "pad_token_id": None,
        "attn_implementation": "eager",
        "tie_word_embeddings": False,
    }
    words = getattr(transformers, f"{name}Config")(**config | changes)
    torch.manual_seed(1234)
    model = getattr(transformers, f"{name}ForCausalLM")(words).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3) if parameter.ndim > 1 else parameter.normal_(mean=0.5, std=0.3)
    return model


def pair(model: Any, meaning: ModelSpec) -> Pair:
    return Pair(model, meaning, canonical(model.state_dict(), tied=meaning.language_model.tied))


def canonical(state: Mapping[str, torch.Tensor], *, tied: bool = False) -> dict[str, LazyTensor]:
    weights: dict[str, LazyTensor] = {}
    for name, tensor in state.items():
        if name.startswith("lm_head") and tied:
            continue
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        weights[name] = held(tensor)
    return weights


def held(tensor: torch.Tensor) -> Held:
    if tensor.dtype == torch.bfloat16:
        return Held(tensor.contiguous().view(torch.int16).numpy().view(np.uint16), "bfloat16")
    return Held(tensor.contiguous().numpy(), str(tensor.dtype).removeprefix("torch."))


def tokens(batch: int = 2, length: int = 17, vocab: int = VOCAB) -> NDArray[np.int64]:
    return np.random.default_rng(5).integers(0, vocab, (batch, length))


@torch.inference_mode()
def answers(model: Any, ids: NDArray[np.int64], mask: NDArray[Any] | None = None) -> NDArray[np.float32]:
    """Transformers' logits, with position ids that count real tokens, as its `generate` gives them."""
    extra = {}
    if mask is not None:
        real = torch.from_numpy(mask.astype(np.int64))
        extra = {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)}
    logits: NDArray[np.float32] = model(torch.from_numpy(ids), use_cache=False, **extra).logits.float().numpy()
    return logits


def save_ranks(
    directory: Path, model: Any, architecture: str, tp: int, pp: int, embedding_axis: int | None = None, **config: Any
) -> Path:
    """Cut a Hugging Face model into rank files with torch.chunk, by the format's description."""
    state = model.state_dict()
    words = {
        "architecture": architecture,
        "dtype": "float32",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_size": HEAD_DIM,
        "intermediate_size": FFN,
        "hidden_act": "silu",
        "norm_epsilon": 1e-5,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": 64,
        "use_parallel_embedding": embedding_axis is not None,
        "embedding_sharding_dim": embedding_axis or 0,
        "mapping": {"world_size": tp * pp, "tp_size": tp, "pp_size": pp},
        **config,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(words))
    for rank in range(tp * pp):
        stage, position = divmod(rank, tp)
        save_file(_rank(state, words, tp, pp, stage, position, embedding_axis), directory / f"rank{rank}.safetensors")
    return directory


def _rank(
    state: Mapping[str, torch.Tensor], words: Mapping[str, Any], tp: int, pp: int, stage: int, r: int, axis: int | None
) -> dict[str, torch.Tensor]:
    def cut(name: str, axis: int) -> torch.Tensor:
        return state[name].chunk(tp, axis)[r]

    def cut_kv(name: str) -> torch.Tensor:
        heads = state[name].reshape(KV_HEADS, HEAD_DIM, *state[name].shape[1:])
        return heads.repeat_interleave(max(1, tp // KV_HEADS), 0).flatten(0, 1).chunk(tp, 0)[r]

    out = {}
    embed, padding = state["model.embed_tokens.weight"], torch.zeros(-VOCAB % tp, HIDDEN)
    if stage == 0:
        out["transformer.vocab_embedding.weight"] = {
            None: embed,
            0: torch.cat([embed, padding]).chunk(tp, 0)[r],
            1: embed.chunk(tp, 1)[r],
        }[axis]
    for local, layer in enumerate(range(stage * LAYERS // pp, (stage + 1) * LAYERS // pp)):
        theirs, ours = f"model.layers.{layer}.", f"transformer.layers.{local}."
        for kind in ("weight", "bias"):
            if (q := f"{theirs}self_attn.q_proj.{kind}") in state:
                k, v = (cut_kv(f"{theirs}self_attn.{part}_proj.{kind}") for part in "kv")
                out[f"{ours}attention.qkv.{kind}"] = torch.cat([cut(q, 0), k, v])
            for their, our in {"gate": "fc", "up": "gate"}.items():
                if (name := f"{theirs}mlp.{their}_proj.{kind}") in state:
                    out[f"{ours}mlp.{our}.{kind}"] = cut(name, 0)
            for name, our in {"self_attn.o_proj": "attention.dense", "mlp.down_proj": "mlp.proj"}.items():
                if (full := f"{theirs}{name}.{kind}") in state:
                    out[f"{ours}{our}.{kind}"] = cut(full, 1) if kind == "weight" else state[full]
        out[f"{ours}input_layernorm.weight"] = state[f"{theirs}input_layernorm.weight"]
        out[f"{ours}post_layernorm.weight"] = state[f"{theirs}post_attention_layernorm.weight"]
    if stage == pp - 1:
        out["transformer.ln_f.weight"] = state["model.norm.weight"]
        if not words.get("share_embedding_table"):
            out["lm_head.weight"] = torch.cat([state["lm_head.weight"], padding]).chunk(tp, 0)[r]
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in out.items()}
