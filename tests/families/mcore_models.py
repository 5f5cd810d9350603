"""A process of its own that builds models with Megatron-core and saves what they hold and answer.

    python tests/families/mcore_models.py DIRECTORY

Each model is a `{name}.safetensors` of its state and of `tokens` and `logits`, and a `{name}.json` of its config.
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

LENGTH, VOCAB, POSITIONS = 17, 131, 64
SIZES: dict[str, Any] = {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "ffn_hidden_size": 52}
GROUPS: dict[str, Any] = {"num_query_groups": 2, "kv_channels": 10}
GPT = {"normalization": "LayerNorm", "add_bias_linear": True, "activation_func": "gelu"}
LLAMA = {"normalization": "RMSNorm", "add_bias_linear": False, "activation_func": "silu", "gated_linear_unit": True}
LEARNED, ROPE = {"position_embedding_type": "learned_absolute"}, {"position_embedding_type": "rope", "rotary_base": 500}
LATENT = LLAMA | {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "q_lora_rank": 22,
    "kv_lora_rank": 14,
    "qk_head_dim": 10,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "layernorm_epsilon": 1e-6,
    "rotary_base": 500,
}
LATENT_YARN = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
TIED, UNTIED = ({"share_embeddings_and_output_weights": tied} for tied in (True, False))
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 6,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 28,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "allgather",
}
SIGMOIDS = {
    "moe_router_topk": 4,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 3,
    "moe_router_group_topk": 2,
    "moe_router_topk_scaling_factor": 1.5,
    "moe_shared_expert_intermediate_size": 36,
}
OSS = {
    "add_bias_linear": True,
    "softmax_type": "learnable",
    "activation_func": "quick_gelu",
    "activation_func_clamp_value": 0.5,
    "glu_linear_offset": 1.0,
    "bias_activation_fusion": False,
}
YARN = {
    "yarn_rotary_scaling_factor": 8.0,
    "yarn_original_max_position_embeddings": 16,
    "yarn_beta_fast": 8.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": None,
    "yarn_mscale_all_dim": None,
    "yarn_correction_range_round_to_int": False,
}

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt": (GPT, LEARNED | TIED),
    "gpt, fused gelu, groups": (GPT | GROUPS | {"bias_activation_fusion": True}, LEARNED | UNTIED),
    "starcoder2": (GPT | GROUPS, ROPE | TIED | {"rotary_percent": 0.4}),
    "mixtral": (LLAMA | GROUPS | EXPERTS, ROPE | UNTIED),
    "mixtral, softmax before the choice, scaled": (
        LLAMA | GROUPS | EXPERTS | {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
        ROPE | UNTIED,
    ),
    "mixtral, sigmoids, bias, groups, shared expert": (LLAMA | GROUPS | EXPERTS | SIGMOIDS, ROPE | UNTIED),
    "mixtral, one sigmoid": (
        LLAMA | EXPERTS | {"moe_router_topk": 1, "moe_router_score_function": "sigmoid"},
        ROPE | UNTIED,
    ),
    "mixtral, dense layers": (LLAMA | EXPERTS | {"moe_layer_freq": [0, 1, 0]}, ROPE | UNTIED),
    "mixtral, every other layer dense": (LLAMA | EXPERTS | {"moe_layer_freq": 2}, ROPE | TIED),
    "qwen3_moe": (LLAMA | GROUPS | EXPERTS | {"qk_layernorm": True}, ROPE | UNTIED),
    "qwen3_moe, gated shared expert": (
        LLAMA
        | GROUPS
        | EXPERTS
        | {"add_qkv_bias": True, "moe_router_pre_softmax": True}
        | {"moe_shared_expert_intermediate_size": 36, "moe_shared_expert_gate": True},
        ROPE | UNTIED,
    ),
    "gpt_oss": (LLAMA | GROUPS | EXPERTS | OSS, UNTIED | {"position_embedding_type": "yarn", "rotary_base": 500}),
    "llama": (LLAMA | GROUPS | {"qk_layernorm": True, "softmax_scale": 0.2}, ROPE | UNTIED),
    "deepseek": (
        LATENT
        | LATENT_YARN
        | {"mscale": 1.0, "mscale_all_dim": 1.0}
        | EXPERTS
        | SIGMOIDS
        | {"moe_layer_freq": [0, 1, 1]},
        ROPE | UNTIED,
    ),
    "deepseek, softmax before the choice": (
        LATENT
        | {"rope_type": "rope"}
        | EXPERTS
        | {"moe_router_pre_softmax": True, "moe_router_topk": 3, "moe_shared_expert_intermediate_size": 36},
        ROPE | UNTIED,
    ),
    "deepseek, dense": (LATENT | {"rope_type": "rope"}, ROPE | UNTIED),
    "deepseek, dense, whole queries, yarn": (
        LATENT | LATENT_YARN | {"q_lora_rank": None, "mscale": 0.7, "mscale_all_dim": 0.9},
        ROPE | UNTIED,
    ),
    "deepseek, dense, yarn, one mscale": (LATENT | LATENT_YARN | {"mscale": 0.7}, ROPE | UNTIED),
}
"""The words of TransformerConfig, and those of GPTModel."""
SEES_BOTH_WAYS = {
    "transformer_layer_spec": {
        "_target_": "nemo.collections.llm.gpt.model.llama_embedding.get_nv_embedding_layer_spec",
        "_call_": False,
    }
}
ENCODERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama_bidirectional": (LLAMA | GROUPS, ROPE | UNTIED, SEES_BOTH_WAYS),
    "llama_bidirectional_classifier": (
        LLAMA | GROUPS,
        ROPE | TIED,
        SEES_BOTH_WAYS | {"pool_type": "last", "temperature": 0.7},
    ),
}
"""And what NeMo's config says more: `LlamaEmbeddingModel` and `ReRankerModel`, whose own code follows below."""


def main(directory: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import moe_utils
    from safetensors.torch import save_file

    moe_utils.te_general_gemm = None  # Transformer Engine is not here, and its absence was forgotten there
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    multi_latent_attention.HAVE_TE = False  # or it asks for classes that are not there without Transformer Engine
    random.initialize_rng_tracker()
    random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()  # there is no dropout to draw for
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/init", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1)
    for name, (config, model) in MODELS.items():
        save_file(_saved(config, model), directory / f"{name}.safetensors")
        yarn = YARN if model["position_embedding_type"] == "yarn" else {}
        words = SIZES | config | model | yarn | {"vocab_size": VOCAB, "max_sequence_length": POSITIONS}
        (directory / f"{name}.json").write_text(json.dumps(words))
    for name, (config, model, said) in ENCODERS.items():
        save_file(_encoder(config, model, said), directory / f"{name}.safetensors")
        words = SIZES | config | model | said | {"vocab_size": VOCAB, "seq_length": POSITIONS}
        (directory / f"{name}.json").write_text(json.dumps(words))
    torch.distributed.destroy_process_group()


class Softmax(torch.nn.Module):
    """What Transformer Engine does between keys and values of different sizes, which Megatron-core's own has no room
    for. Queries, keys and values are [length, batch, heads, size]."""

    def __init__(self, *, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, unseen: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        scores = torch.einsum("sbhd,tbhd->bhst", query, key) * self.scale
        shares = scores.masked_fill(unseen, float("-inf")).softmax(-1)
        return torch.einsum("bhst,tbhd->sbhd", shares, value).flatten(2)


def _encoder(config: dict[str, Any], words: dict[str, Any], said: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Padded on the right; averaged and divided by its length, or the last token scored, without the score's bias."""
    from megatron.core.transformer.enums import AttnMaskType

    model = _made(config, words, attn_mask_type=AttnMaskType.padding)
    model.post_process = False
    tokens = torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB, (2, LENGTH)))
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [6]])
    with torch.no_grad():
        hidden = model(tokens, torch.arange(LENGTH).expand(2, LENGTH), ~mask[:, None, None]).transpose(0, 1)
        score = {"score.weight": torch.randn(1, hidden.shape[-1]), "score.bias": torch.ones(1)}
        if "pool_type" in said:
            last = hidden[torch.arange(2), mask.sum(1) - 1]
            answer = last @ score["score.weight"].T / said["temperature"]
        else:
            mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
            answer, score = torch.nn.functional.normalize(mean, dim=1), {}
    return _state(model) | score | {"tokens": tokens, "mask": mask, "answer": answer}


def _saved(config: dict[str, Any], words: dict[str, Any]) -> dict[str, torch.Tensor]:
    model = _made(config, words)
    tokens = torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB, (2, LENGTH)))
    unseen = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)
    with torch.no_grad():
        logits = model(tokens, torch.arange(LENGTH).expand(2, LENGTH), unseen)
    return _state(model) | {"tokens": tokens, "logits": logits.detach().clone()}


def _made(config: dict[str, Any], words: dict[str, Any], **attention: Any) -> Any:
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    name = config["activation_func"]
    activation = quick_gelu if name == "quick_gelu" else getattr(torch.nn.functional, name)
    latent = config.get("multi_latent_attention", False)
    made = (MLATransformerConfig if latent else TransformerConfig)(
        **SIZES | config | {"activation_func": activation},
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        params_dtype=torch.float32,
    )
    if words["position_embedding_type"] == "yarn":  # whose words are no fields, and change any rope once they are there
        for word, value in YARN.items():
            setattr(made, word, value)
    norm = config["normalization"]
    if made.num_moe_experts:
        spec = get_gpt_decoder_block_spec(made, use_transformer_engine=False, normalization=norm)
    else:
        spec = get_gpt_layer_local_spec(
            normalization=norm, qk_layernorm=made.qk_layernorm, multi_latent_attention=latent
        )
        spec.submodules.self_attention.params |= attention
    for layer in getattr(spec, "layer_specs", [spec]) if latent else ():
        layer.submodules.self_attention.submodules.core_attention = Softmax
    torch.manual_seed(1)
    model = GPTModel(made, spec, vocab_size=VOCAB, max_sequence_length=POSITIONS, **words).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.normal_(mean=0.3, std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(std=0.2)
    return model


def _state(model: Any) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    return {name: value.detach().clone() for name, value in state.items() if "_extra_state" not in name}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
