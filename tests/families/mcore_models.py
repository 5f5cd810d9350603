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
TIED, UNTIED = ({"share_embeddings_and_output_weights": tied} for tied in (True, False))

MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gpt": (GPT, LEARNED | TIED),
    "gpt, fused gelu, groups": (GPT | GROUPS | {"bias_activation_fusion": True}, LEARNED | UNTIED),
    "starcoder2": (GPT | GROUPS, ROPE | TIED | {"rotary_percent": 0.4}),
    "llama": (LLAMA | GROUPS | {"qk_layernorm": True, "softmax_scale": 0.2}, ROPE | UNTIED),
}
"""The words of TransformerConfig, and those of GPTModel."""


def main(directory: Path) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import random
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    random.initialize_rng_tracker()
    random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()  # there is no dropout to draw for
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/init", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1)
    for name, (config, model) in MODELS.items():
        save_file(_saved(config, model), directory / f"{name}.safetensors")
        words = SIZES | config | model | {"vocab_size": VOCAB, "max_sequence_length": POSITIONS}
        (directory / f"{name}.json").write_text(json.dumps(words))
    torch.distributed.destroy_process_group()


def _saved(config: dict[str, Any], words: dict[str, Any]) -> dict[str, torch.Tensor]:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    spec = get_gpt_layer_local_spec(
        normalization=config["normalization"], qk_layernorm=config.get("qk_layernorm", False)
    )
    made = TransformerConfig(
        **SIZES | config | {"activation_func": getattr(torch.nn.functional, config["activation_func"])},
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        params_dtype=torch.float32,
    )
    torch.manual_seed(1)
    model = GPTModel(made, spec, vocab_size=VOCAB, max_sequence_length=POSITIONS, **words).eval()
    tokens = torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB, (2, LENGTH)))
    unseen = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.normal_(mean=0.3, std=0.2)
        logits = model(tokens, torch.arange(LENGTH).expand(2, LENGTH), unseen)
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    kept = {name: value.detach().clone() for name, value in state.items() if "_extra_state" not in name}
    return kept | {"tokens": tokens, "logits": logits.detach().clone()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
