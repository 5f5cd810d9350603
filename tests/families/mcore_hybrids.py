"""As mcore_models.py, with Megatron-core's MambaModel. The kernels that it takes from mamba_ssm run on GPUs only;
transformers' plain ones of the same arithmetic stand in for them, so what Megatron-core decides (names, orders, splits)
is its own.

    python tests/families/mcore_hybrids.py DIRECTORY

`{name}, in pieces` is the same model as it is sharded into a distributed checkpoint.
"""

from __future__ import annotations

import json
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

LENGTH, VOCAB, POSITIONS = 17, 131, 64
SIZES: dict[str, Any] = {
    "num_layers": 5,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_query_groups": 2,
    "kv_channels": 10,
    "ffn_hidden_size": 52,
    "normalization": "RMSNorm",
    "add_bias_linear": False,
    "activation_func": "squared_relu",
    "mamba_state_dim": 7,
    "mamba_head_dim": 5,
    "mamba_num_groups": 3,
    "mamba_num_heads": 6,
}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 6,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 20,
    "moe_shared_expert_intermediate_size": 28,
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 2.5,
}
UNTIED, TIED = ({"share_embeddings_and_output_weights": tied} for tied in (False, True))
HYBRIDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nemotron_h": ({}, UNTIED | {"hybrid_override_pattern": "M-*MM"}),
    "nemotron_h, one group, tied": ({"mamba_num_groups": 1}, TIED | {"hybrid_override_pattern": "*M--M"}),
    "nemotron_h, experts": (EXPERTS, UNTIED | {"hybrid_override_pattern": "ME*-E"}),
}
"""The words of TransformerConfig, and those of MambaModel."""


def main(directory: Path) -> None:
    kernels()
    from megatron.core import parallel_state
    from megatron.core.ssm import mamba_block
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from safetensors.torch import save_file

    mamba_block.TENorm = WrappedTorchNorm
    moe_utils.te_general_gemm = None
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    random.initialize_rng_tracker()
    random.CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/hybrids", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1)
    for name, (config, words) in HYBRIDS.items():
        model = _model(config, words)
        answers = _answers(model)
        save_file(_state(model) | answers, directory / f"{name}.safetensors")
        save_file(_pieces(model) | answers, directory / f"{name}, in pieces.safetensors")
        said = SIZES | config | words | {"vocab_size": VOCAB, "max_sequence_length": POSITIONS}
        (directory / f"{name}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


def _model(config: dict[str, Any], words: dict[str, Any]) -> Any:
    """In evaluation, with numbers in every parameter."""
    from megatron.core.activations import squared_relu
    from megatron.core.models.mamba import MambaModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    made = TransformerConfig(
        **SIZES | config | {"activation_func": squared_relu},
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        masked_softmax_fusion=False,
        params_dtype=torch.float32,
        use_mamba_mem_eff_path=False,
    )
    torch.manual_seed(1)
    spec = stack(config.get("num_moe_experts"))
    model = MambaModel(made, spec, vocab_size=VOCAB, max_sequence_length=POSITIONS, **words).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.normal_(mean=0.3, std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(std=0.2)
    return model


def _answers(model: Any) -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB, (2, LENGTH)))
    unseen = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)
    with torch.no_grad():
        logits = model(tokens, torch.arange(LENGTH).expand(2, LENGTH), unseen)
    return {"tokens": tokens, "logits": logits.detach().clone()}


def _state(model: Any) -> dict[str, torch.Tensor]:
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    kept = {name: value for name, value in state.items() if "_extra_state" not in name}
    return {name: value.detach().clone() for name, value in kept.items() if not name.endswith("tokens_per_expert")}


def _pieces(model: Any) -> dict[str, torch.Tensor]:
    """Each piece whole, since there is one rank: experts are pieces of one tensor along a new axis."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    sharded = model.sharded_state_dict()
    apply_factories(sharded)
    whole: dict[str, torch.Tensor] = {}
    for each in nested_values(sharded):
        if isinstance(each, ShardedTensor):
            shape = _local(each)
            place = tuple(map(slice, each.global_offset, map(sum, zip(each.global_offset, shape, strict=True))))
            whole.setdefault(each.key, torch.empty(each.global_shape, dtype=each.dtype))[place] = each.data.view(shape)
    return whole


def _local(each: Any) -> tuple[int, ...]:
    """With the axes that sharding puts before those of the module."""
    shape: tuple[int, ...] = (1,) * each.prepend_axis_num + tuple(each.local_shape)
    return shape


_IN_TRITON = "megatron.core.inference.contexts.attention_context.triton.tensor_ops"


def kernels() -> None:
    """Before Megatron-core is imported."""
    from transformers.models.nemotron_h import modeling_nemotron_h as plain

    class GatedNorm(plain.NemotronHRMSNormGated):  # type: ignore[misc]
        def __init__(self, size: int, *, eps: float, group_size: int, **_: Any) -> None:
            super().__init__(size, group_size, eps)

    def scan(*tensors: torch.Tensor, z: None, **options: Any) -> torch.Tensor:
        names = ("seq_idx", "cu_seqlens", "return_varlen_states")
        kept = {name: each for name, each in options.items() if name not in names}
        mixed: torch.Tensor = plain.mamba2_chunk_scan(*tensors, **kept)
        return mixed

    def unused(*_: Any, **__: Any) -> None:
        raise AssertionError("no model here is asked step by step")

    places: dict[str, dict[str, Any]] = {
        "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": GatedNorm},
        "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": unused},
        "mamba_ssm.ops.triton.ssd_combined": {
            "mamba_chunk_scan_combined": scan,
            "mamba_split_conv1d_scan_combined": unused,
        },
    }
    in_triton = dict.fromkeys(("tensor_get_slice_after", "tensor_masked_update", "tensor_merge"), unused)
    sys.modules[_IN_TRITON] = ModuleType(_IN_TRITON)
    vars(sys.modules[_IN_TRITON]).update(in_triton)
    for place, given in places.items():
        parts = place.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        for name, each in given.items():
            setattr(sys.modules[place], name, each)


def stack(experts: int | None) -> Any:
    """Of local layers: those of `mamba_layer_specs` need Transformer Engine."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import (
        MoETransformerLayer,
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    whole = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    mixer = MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    return ModuleSpec(
        module=MambaStack,
        submodules=MambaStackSubmodules(
            mamba_layer=ModuleSpec(
                module=MambaLayer,
                submodules=MambaLayerSubmodules(
                    norm=whole.input_layernorm,
                    mixer=ModuleSpec(module=MambaMixer, submodules=mixer),
                    mamba_bda=get_bias_dropout_add,
                ),
            ),
            attention_layer=ModuleSpec(
                module=TransformerLayer,
                submodules=TransformerLayerSubmodules(
                    input_layernorm=whole.input_layernorm,
                    self_attention=whole.self_attention,
                    self_attn_bda=get_bias_dropout_add,
                    mlp=IdentityOp,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=MLPLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=whole.pre_mlp_layernorm, mlp=whole.mlp, mlp_bda=get_bias_dropout_add
                ),
            ),
            moe_layer=ModuleSpec(
                module=MoETransformerLayer,
                submodules=TransformerLayerSubmodules(
                    pre_mlp_layernorm=whole.pre_mlp_layernorm,
                    mlp=get_moe_module_spec(use_te=False, num_experts=experts or 1, moe_grouped_gemm=False),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
        ),
    )


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
