"""Every family against transformers: a random model of its own class, through everything that nemoport writes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from nemoport import reference
from nemoport.errors import UnsupportedInput
from nemoport.exporters import convert, source, stream
from nemoport.spec import ModelSpec, Plan, attention_windows
from nemoport.validation import Request, validate

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

Array = NDArray[Any]
torch.set_num_threads(1)
LAYERS, VOCAB, LENGTH = 4, 131, 17
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 52,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
HEADS_OF_10 = SIZES | {"head_dim": 10}
GPT2 = {"n_embd": 48, "n_head": 6, "n_layer": LAYERS, "vocab_size": VOCAB, "n_positions": 128}


def rope(**words: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default"} | words}


EXPERTS = {"num_experts_per_tok": 2}
QWEN_EXPERTS = EXPERTS | {"num_experts": 5, "moe_intermediate_size": 28}
RANKED_EXPERTS = ({"tp": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "pp": 2, "ep": 2})


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 4.0}
LATENT = SIZES | {
    "num_key_value_heads": 6,
    "q_lora_rank": 22,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "moe_intermediate_size": 20,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


HYBRID = HEADS_OF_10 | {
    "ssm_state_size": 7,
    "mamba_num_heads": 6,
    "mamba_head_dim": 5,
    "n_groups": 3,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "linear_attention"],
}


@dataclass(frozen=True)
class Case:
    kind: str
    """Of `transformers.{kind}Config` and `{kind}ForCausalLM`."""
    words: dict[str, Any]
    family: str
    ranks: tuple[dict[str, int], ...] = ({"tp": 1}, {"tp": 2}, {"tp": 2, "pp": 2})
    """The plans that TensorRT-LLM has for it."""


LOCAL, FULL = "sliding_attention", "full_attention"
CASES = {
    "gpt2": Case("GPT2", GPT2, "gpt"),
    "gpt2 untied, n_inner": Case("GPT2", GPT2 | {"n_inner": 52, "tie_word_embeddings": False}, "gpt"),
    "gpt2, exact gelu": Case("GPT2", GPT2 | {"activation_function": "gelu"}, "gpt", ()),
    "nemotron": Case("Nemotron", HEADS_OF_10 | rope(rope_theta=500.0, partial_rotary_factor=0.4), "nemotron"),
    "nemotron, biases": Case(
        "Nemotron",
        HEADS_OF_10 | {"attention_bias": True, "mlp_bias": True} | rope(rope_theta=500.0, partial_rotary_factor=1.0),
        "nemotron",
    ),
    "gemma": Case("Gemma", HEADS_OF_10 | rope(rope_theta=500.0), "gemma", ({"tp": 1}, {"tp": 2})),
    "gemma2": Case(
        "Gemma2",
        HEADS_OF_10
        | {"query_pre_attn_scalar": 24, "sliding_window": 5}
        | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
        | rope(rope_theta=500.0),
        "gemma2",
        ({"tp": 1}, {"tp": 2}),
    ),
    "gemma3": Case(
        "Gemma3Text",
        HEADS_OF_10
        | {"query_pre_attn_scalar": 24, "sliding_window": 5, "layer_types": [LOCAL, LOCAL, FULL, LOCAL]}
        | {
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                LOCAL: {"rope_type": "default", "rope_theta": 100.0},
            }
        },
        "gemma2",
        (),
    ),
    "phi3": Case("Phi3", SIZES | {"sliding_window": 6} | rope(rope_theta=500.0, partial_rotary_factor=0.5), "phi3", ()),
    "starcoder2": Case("Starcoder2", SIZES | {"sliding_window": 6} | rope(rope_theta=500.0), "starcoder2"),
    "mixtral": Case(
        "Mixtral", HEADS_OF_10 | EXPERTS | {"num_local_experts": 4} | rope(rope_theta=500.0), "mixtral", RANKED_EXPERTS
    ),
    "mixtral, window, top 1": Case(
        "Mixtral",
        HEADS_OF_10 | {"num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5} | rope(rope_theta=500.0),
        "mixtral",
    ),
    "qwen3 moe": Case(
        "Qwen3Moe", HEADS_OF_10 | QWEN_EXPERTS | {"norm_topk_prob": True} | rope(rope_theta=500.0), "qwen3_moe", ()
    ),
    "qwen3 moe, dense layers": Case(
        "Qwen3Moe",
        HEADS_OF_10 | QWEN_EXPERTS | {"mlp_only_layers": [0, 2], "attention_bias": True} | rope(rope_theta=500.0),
        "qwen3_moe",
        (),
    ),
    "qwen2 moe": Case(
        "Qwen2Moe",
        SIZES | QWEN_EXPERTS | {"shared_expert_intermediate_size": 40} | rope(rope_theta=500.0),
        "qwen3_moe",
        (),
    ),
    "gpt oss": Case(
        "GptOss",
        HEADS_OF_10
        | {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": 5, "swiglu_limit": 0.5}
        | rope(
            rope_theta=500.0,
            rope_type="yarn",
            factor=8.0,
            original_max_position_embeddings=16,
            beta_fast=8.0,
            beta_slow=1.0,
            truncate=False,
        ),
        "gpt_oss",
        (),
    ),
    "starcoder2 without bias": Case(
        "Starcoder2", SIZES | {"use_bias": False, "tie_word_embeddings": False} | rope(rope_theta=500.0), "starcoder2"
    ),
    "qwen3, yarn": Case("Qwen3", HEADS_OF_10 | rope(rope_theta=500.0, **YARN, truncate=False), "llama", ()),
    "deepseek v3": Case(
        "DeepseekV3",
        LATENT
        | {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
        | rope(rope_theta=500.0, **YARN, mscale=0.7, mscale_all_dim=0.9),
        "deepseek",
        (),
    ),
    "moonlight": Case(
        "DeepseekV3",
        LATENT
        | {"q_lora_rank": None, "n_routed_experts": 5, "n_group": 1, "topk_group": 1, "n_shared_experts": 2}
        | {"num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "routed_scaling_factor": 2.446, "rope_interleave": False}
        | rope(rope_theta=500.0),
        "deepseek",
        (),
    ),
    "deepseek v2": Case(
        "DeepseekV2",
        LATENT
        | {"n_routed_experts": 6, "num_experts_per_tok": 3, "topk_method": "group_limited_greedy"}
        | {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 16.0}
        | rope(rope_theta=500.0, **YARN),
        "deepseek",
        (),
    ),
    "deepseek v2 lite": Case(
        "DeepseekV2",
        LATENT
        | {"q_lora_rank": None, "n_routed_experts": 5, "num_experts_per_tok": 3, "n_shared_experts": 2}
        | rope(rope_theta=500.0, **YARN, mscale=0.707, mscale_all_dim=0.707),
        "deepseek",
        (),
    ),
    "deepseek, dense": Case("DeepseekV3", LATENT | {"first_k_dense_replace": LAYERS} | rope(), "deepseek", ()),
    "nemotron h": Case("NemotronH", HYBRID, "nemotron_h", ()),
    "nemotron h, experts": Case(
        "NemotronH",
        HYBRID
        | {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"], "n_routed_experts": 6}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 28}
        | {"n_group": 3, "topk_group": 2, "routed_scaling_factor": 2.5},
        "nemotron_h",
        (),
    ),
    "nemotron h, biases, two taps, one group": Case(
        "NemotronH",
        HYBRID
        | {"use_bias": True, "mlp_bias": True, "conv_kernel": 2, "n_groups": 1}
        | {"layers_block_type": ["mlp", "linear_attention", "linear_attention", "full_attention"]},
        "nemotron_h",
        (),
    ),
}
CLASSES = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}


@dataclass(frozen=True)
class Saved:
    case: Case
    path: Path
    ids: Array
    logits: Array

    @property
    def scale(self) -> float:
        return float(np.abs(self.logits).max())


def answers(path: Path, ids: Array) -> Array:
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
        logits: Array = model(torch.from_numpy(ids), use_cache=False).logits.float().numpy()
    return logits


def save(case: Case, path: Path) -> Saved:
    torch.manual_seed(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{case.kind}Config")(**case.words, attn_implementation="eager")
        model = getattr(transformers, CLASSES.get(case.kind, f"{case.kind}ForCausalLM"))(config).eval().float()
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim > 1 else parameter.normal_(mean=0.2, std=0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # of experts, beside the weights
                buffer.normal_(std=0.2)
        model.save_pretrained(path)
    ids = np.random.default_rng(5).integers(0, VOCAB, (2, LENGTH))
    return Saved(case, path, ids, answers(path, ids))


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(request.param, tmp_path_factory.mktemp("saved") / "model")


def converted(saved: Saved, to: str, out: Path, **plan: Any) -> Path:
    stream.run(convert.plan(saved.path, to, out, plan=Plan(**plan)))
    return out


def close(found: Array, saved: Saved) -> None:
    np.testing.assert_allclose(found, saved.logits, rtol=0, atol=min(1e-4, 1e-5 * saved.scale))


def test_the_reference_answers_as_transformers_does(saved: Saved) -> None:
    model = source.model(saved.path)
    assert model.spec.family == saved.case.family
    close(reference.logits(model.spec, model.tensors, saved.ids), saved)


def test_transformers_loads_what_is_written_and_answers_the_same(saved: Saved, tmp_path: Path) -> None:
    np.testing.assert_array_equal(answers(converted(saved, "hf", tmp_path / "out"), saved.ids), saved.logits)


def run(path: Path, spec: ModelSpec, ids: Array, steps: tuple[int, ...]) -> Array:
    """Logits of a graph, fed in pieces through its cache."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    past = {
        f"past_key_values.{i}.{state.name}": np.zeros((len(ids), *(size or 0 for size in state.shape)), np.float32)
        for i, block in enumerate(spec.blocks)
        if block.mixer
        for state in block.mixer.state
    }
    start, found = 0, []
    for stop in steps:
        given = {
            "input_ids": ids[:, start:stop],
            "attention_mask": np.ones((len(ids), stop), np.int64),
            "position_ids": np.tile(np.arange(start, stop), (len(ids), 1)),
        }
        logits, *present = session.run(None, given | past)
        past = dict(zip(past, present, strict=True))
        found.append(logits)
        start = stop
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("steps", [(LENGTH,), (6, 7, *range(8, LENGTH + 1))], ids=["at once", "token by token"])
def test_the_graph_answers_as_transformers_does(saved: Saved, steps: tuple[int, ...], tmp_path: Path) -> None:
    made = converted(saved, "onnx", tmp_path / "out", dtype="float32")
    close(run(made, source.model(saved.path).spec, saved.ids, steps), saved)


def test_ranks_answer_as_transformers_does(saved: Saved, tmp_path: Path) -> None:
    if not saved.case.ranks:
        with pytest.raises(UnsupportedInput, match="--to hf"):
            converted(saved, "trtllm", tmp_path / "out")
    windows = attention_windows(source.model(saved.path).spec) or None
    for number, plan in enumerate(saved.case.ranks):
        made = converted(saved, "trtllm", tmp_path / str(number), **plan)
        close(reference.rank_logits(made, saved.ids, max_attention_window=windows), saved)


@pytest.mark.parametrize("to, dtype", [("hf", None), ("onnx", "float32"), ("onnx", "float16"), ("trtllm", "bfloat16")])
def test_everything_written_is_proven(saved: Saved, to: str, dtype: str | None, tmp_path: Path) -> None:
    if to == "trtllm" and not saved.case.ranks:
        pytest.skip("refused, as seen above")
    report = validate(Request(subject=converted(saved, to, tmp_path / "out", dtype=dtype)))
    assert report.passed, [check for check in report.checks if not check.passed]
