"""What a family's own bugs would write, sealed again with the digests of the changed bytes: none of it survives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from validation.mutants import (
    Change,
    Opened,
    exchange_experts,
    exchange_ranks,
    exchange_tensors,
    fill,
    mutate,
    shift_rows,
    untransposed,
)

from nemoport import artifact
from nemoport.exporters import convert, stream
from nemoport.spec import LatentAttention, Plan, Rope, YarnScaling
from nemoport.validation import Report, Request, validate

from .test_transformers import CASES, LAYERS, save

TARGETS = {
    "hf": ("hf", Plan()),
    "trtllm tp 2": ("trtllm", Plan(tp=2)),
    "trtllm tp 2 ep 2": ("trtllm", Plan(tp=2, ep=2)),
    "onnx": ("onnx", Plan(dtype="float32")),
}
MARGIN = 3
"""How far beyond the gate each of them lands at least."""


def say(key: str, value: Any) -> Change:
    """Another word in config.json."""

    def change(opened: Opened) -> None:
        path = opened.directory / "config.json"
        config = json.loads(path.read_bytes())
        assert config.get(key, value) != value or key not in config
        path.write_bytes(artifact.json_bytes(config | {key: value}))

    return change


def say_of_experts(key: str, value: Any) -> Change:
    """Another word in TensorRT-LLM's `moe`."""

    def change(opened: Opened) -> None:
        path = opened.directory / "config.json"
        config = json.loads(path.read_bytes())
        assert config["moe"][key] != value
        config["moe"][key] = value
        path.write_bytes(artifact.json_bytes(config))

    return change


def halves_not_in_turns(name: str) -> Change:
    """[gate up gate up] written as [gate gate up up]."""

    def change(opened: Opened) -> None:
        (array,) = opened.named(name)
        array[...] = np.concatenate([array[..., ::2], array[..., 1::2]], axis=-1)

    return change


def in_model(edit: Callable[[onnx.GraphProto], int]) -> Change:
    """Something else in the graph; `edit` counts what it changed."""

    def change(opened: Opened) -> None:
        path = opened.directory / "model.onnx"
        model = onnx.load_model(path, load_external_data=False)
        assert edit(model.graph)
        path.write_bytes(model.SerializeToString(deterministic=True))

    return change


def constant(pattern: str, value: float) -> Change:
    """Another number where the graph has one inside."""

    def edit(graph: onnx.GraphProto) -> int:
        found = [each for each in graph.initializer if re.fullmatch(pattern, each.name)]
        for each in found:
            each.CopyFrom(onnx.helper.make_tensor(each.name, each.data_type, each.dims, [value]))
        return len(found)

    return in_model(edit)


def attribute(op: str, name: str, value: str | int) -> Change:
    def edit(graph: onnx.GraphProto) -> int:
        found = [each for node in graph.node if node.op_type == op for each in node.attribute if each.name == name]
        for each in found:
            each.CopyFrom(onnx.helper.make_attribute(name, value))
        return len(found)

    return in_model(edit)


def bypassed(op: str, pattern: str, kept: int = 0) -> Change:
    """Nodes that hand on one of their inputs."""

    def edit(graph: onnx.GraphProto) -> int:
        found = [node for node in graph.node if node.op_type == op and re.fullmatch(pattern, node.name)]
        for node in found:
            node.CopyFrom(onnx.helper.make_node("Identity", [node.input[kept]], node.output, name=node.name))
        return len(found)

    return in_model(edit)


def less_one(pattern: str) -> Change:
    """The one that a zero-centred norm is written with, forgotten."""

    def change(opened: Opened) -> None:
        found = [each for each in opened.stored if re.fullmatch(pattern, each.name)]
        assert found
        for each in found:
            each.array[...] -= 1

    return change


def say_of_rope(**words: Any) -> Change:
    """Other words in `rope_scaling`; None for one that is gone."""

    def change(opened: Opened) -> None:
        path = opened.directory / "config.json"
        config = json.loads(path.read_bytes())
        said = config["rope_scaling"] | words
        config["rope_scaling"] = {key: value for key, value in said.items() if value is not None}
        path.write_bytes(artifact.json_bytes(config))

    return change


def in_halves(name: str) -> Change:
    """Rows of a key whose pairs lie side by side, as for a rope that turns (j, j + dims / 2)."""

    def change(opened: Opened) -> None:
        for piece in opened.pieces(name):
            piece[...] = np.concatenate([piece[0::2], piece[1::2]])

    return change


def heads_apart(name: str, first: int, second: int) -> Change:
    """[k v | k v | ...] of the heads written as [k k ... v v ...]; `name` is the file's."""

    def change(opened: Opened) -> None:
        (stored,) = opened.named(name)
        heads = stored.reshape(-1, first + second, stored.shape[-1]).copy()
        stored[...] = np.concatenate([part.reshape(-1, stored.shape[-1]) for part in np.split(heads, [first], axis=1)])

    return change


def late_by_one(name: str) -> Change:
    """The taps of a convolution, each of which now meets the token before its own."""

    def change(opened: Opened) -> None:
        for each in opened.pieces(name):
            each[...] = np.roll(each, -1, axis=-1)

    return change


NORMS_EXCHANGED = exchange_tensors("layers.1.ffn_norm.weight", "layers.1.ffn_post_norm.weight")
SCALE = LatentAttention(
    heads=6,
    q_rank=22,
    kv_rank=14,
    nope_dims=10,
    v_dims=12,
    rope=Rope(dims=8, scaling=YarnScaling(factor=4.0, original_max_positions=32, mscale_all_dim=0.9)),
).scale
"""Of the scores of "deepseek v3"."""
ALTERNATING = ["sliding_attention", "full_attention"] * (LAYERS // 2)
MUTANTS: dict[str, dict[str, dict[str, Change]]] = {
    "gpt2": {
        "hf": {
            "position table shifted": shift_rows("positions.weight"),
            "gelu of the other kind": say("activation_function", "gelu"),
        },
        "trtllm tp 2": {
            "position table shifted": shift_rows("positions.weight"),
            "a norm's bias zeroed": fill("layers.1.attn_norm.bias", 0),
        },
        "onnx": {
            "position table shifted": shift_rows("positions.weight"),
            "positions not added": bypassed("Add", "embed.placed"),
            "gelu of the other kind": attribute("Gelu", "approximate", "none"),
        },
    },
    "nemotron": {
        "hf": {"rope on other dimensions": say("partial_rotary_factor", 0.6)},
        "trtllm tp 2": {
            "plus one dropped": less_one(".*layernorm.weight"),
            "plus one of the last norm dropped": less_one(r"transformer\.ln_f\.weight"),
            "rope on other dimensions": say("rotary_pct", 0.6),
        },
        "onnx": {"plus one dropped": constant(r"float32\.1\.0", 0.0), "square dropped": bypassed("Mul", ".*relu2")},
    },
    "gemma": {
        "hf": {"rope base": say("rope_theta", 400.0)},
        "trtllm tp 2": {"plus one dropped": less_one(".*layernorm.weight")},
        "onnx": {
            "plus one dropped": constant(r"float32\.1\.0", 0.0),
            "embedding scale missing": bypassed("Mul", "embed.scaled"),
        },
    },
    "gemma2": {
        "hf": {
            "soft cap of scores missing": say("attn_logit_softcapping", None),
            "soft cap of logits missing": say("final_logit_softcapping", None),
            "window off by one": say("sliding_window", 6),
            "windows in the other layers": say("layer_types", ALTERNATING[::-1]),
            "scores scaled by the size of a head": say("query_pre_attn_scalar", 10),
            "norms before and after exchanged": NORMS_EXCHANGED,
        },
        "trtllm tp 2": {
            "soft cap of scores missing": say("attn_logit_softcapping", None),
            "soft cap of logits missing": say("final_logit_softcapping", None),
            "scores scaled by the size of a head": say("query_pre_attn_scalar", 10),
            "plus one dropped": less_one(".*layernorm.weight"),
            "norms before and after exchanged": NORMS_EXCHANGED,
        },
        "onnx": {
            "soft cap of scores missing": bypassed("Tanh", ".*attn.capped.tanh"),
            "soft cap of logits missing": bypassed("Tanh", "logits.tanh"),
            "window off by one": constant(r"int\.5", 6),
            "embedding scale missing": bypassed("Mul", "embed.scaled"),
            "a norm after attention missing": bypassed("RMSNormalization", "layers.2.attn_post_norm"),
        },
    },
    "gemma3": {
        "hf": {
            "window off by one": say("sliding_window", 4),
            "one rope for all": say("rope_local_base_freq", 5000.0),
            "scaling of far layers missing": say("rope_scaling", None),
        },
        "onnx": {
            "window off by one": constant(r"int\.5", 4),
            "norm of keys missing": bypassed("RMSNormalization", ".*k_norm"),
        },
    },
    "mixtral": {
        "hf": {
            "expert transposed": untransposed("layers.1.ffn.experts.2.down.weight"),
            "two experts exchanged": exchange_experts("layers.1.ffn.experts", 0, 3),
            "router's rows shifted": shift_rows("layers.2.ffn.router.weight"),
            "one more expert chosen": say("num_experts_per_tok", 3),
        },
        "trtllm tp 2": {
            "expert transposed": untransposed("layers.1.ffn.experts.2.down.weight"),
            "two experts exchanged": exchange_experts("layers.1.ffn.experts", 0, 3),
            "gate before up": exchange_tensors(
                "layers.1.ffn.experts.1.gate.weight", "layers.1.ffn.experts.1.up.weight"
            ),
            "normalization dropped": say_of_experts("normalization_mode", 0),
            "halves of the experts on the wrong ranks": exchange_ranks("transformer.layers.1.mlp.fc.weight"),
        },
        "trtllm tp 2 ep 2": {
            "experts on the wrong ranks": exchange_ranks("transformer.layers.1.mlp.fc.weight"),
            "two experts of a rank exchanged": exchange_experts("layers.1.ffn.experts", 2, 3),
        },
        "onnx": {
            "expert transposed": untransposed("layers.1.ffn.experts.2.down.weight"),
            "two experts exchanged": exchange_experts("layers.1.ffn.experts", 0, 3),
            "normalization dropped": bypassed("Div", r".*router\.normalized"),
            "not put back in order": bypassed("ScatterND", r"layers\.1\..*"),
        },
    },
    "qwen3 moe": {
        "hf": {"normalization dropped": say("norm_topk_prob", False)},
        "onnx": {"normalization dropped": bypassed("Div", r".*router\.normalized")},
    },
    "qwen2 moe": {
        "hf": {
            "normalized": say("norm_topk_prob", True),
            "gate of the shared expert zeroed": fill("layers.1.ffn.shared_gate.weight", 0),
        },
        "onnx": {
            "shared expert missing": bypassed("Add", r"layers\.1\..*with_shared"),
            "shared expert not gated": bypassed("Mul", r"layers\.1\..*gated_output"),
        },
    },
    "gpt oss": {
        "hf": {
            "router bias ignored": fill("layers.1.ffn.router.bias", 0),
            "sinks ignored": fill("layers.1.attn.sinks", -1e4),
            "experts not clamped": say("swiglu_limit", 700.0),
            "gate and up not in turns": halves_not_in_turns("model.layers.1.mlp.experts.gate_up_proj"),
            "windows in the other layers": say("layer_types", ALTERNATING[::-1]),
        },
        "onnx": {
            "router bias ignored": bypassed("Add", r".*router\.logits"),
            "sinks ignored": bypassed("Add", r".*kept_and_lost"),
            "experts not clamped": bypassed("Min", r".*gate\.clamped"),
            "plus one dropped": bypassed("Add", r".*up\.offset"),
            "another expert's bias": exchange_tensors(
                "layers.1.ffn.experts.1.down.bias", "layers.1.ffn.experts.2.down.bias"
            ),
        },
    },
    "deepseek v3": {
        "hf": {
            "key rotated in halves": in_halves("layers.1.attn.k_rope.weight"),
            "rope of halves": say("rope_interleave", False),
            "mscale missing": say_of_rope(mscale=None, mscale_all_dim=None),
            "yarn missing": say("rope_scaling", None),
            "norm of latents missing": fill("layers.1.attn.kv_norm.weight", 1),
            "norm of queries missing": fill("layers.1.attn.q_norm.weight", 1),
            "keys and values of heads apart": heads_apart("model.layers.1.self_attn.kv_b_proj.weight", 10, 12),
            "expert bias ignored": fill("layers.2.ffn.router.expert_bias", 0),
            "scaling factor dropped": say("routed_scaling_factor", 1.0),
            "shares not normalized": say("norm_topk_prob", False),
            "groups ignored": say("n_group", 1),
            "two experts exchanged": exchange_experts("layers.2.ffn.experts", 2, 3),
            "shared expert missing": fill("layers.3.ffn.shared.down.weight", 0),
        },
        "onnx": {
            "key rotated in halves": in_halves("layers.1.attn.k_rope.weight"),
            "rope of halves": attribute("RotaryEmbedding", "interleaved", 0),
            "key not rotated": bypassed("RotaryEmbedding", r".*k_rope\.as_head\.rotated"),
            "mscale missing": constant(rf"float32\.{SCALE!r}", 18**-0.5),
            "norm of latents missing": bypassed("RMSNormalization", r".*attn\.kv_norm"),
            "expert bias ignored": fill("layers.2.ffn.router.expert_bias", 0),
            "scaling factor dropped": constant(r"float32\.2\.5", 1.0),
            "groups ignored": bypassed("Where", r".*router\.groups\.kept", kept=1),
            "two experts exchanged": exchange_experts("layers.2.ffn.experts", 2, 3),
        },
    },
    "deepseek v2": {
        "hf": {
            "scaling factor dropped": say("routed_scaling_factor", 1.0),
            "groups ignored": say("topk_method", "greedy"),
            "attention factor missing": say_of_rope(attention_factor=1.0),
        },
    },
    "starcoder2": {
        "hf": {"window off by one": say("sliding_window", 7)},
        "trtllm tp 2": {"a bias of the feed-forward zeroed": fill("layers.2.ffn.down.bias", 0)},
        "onnx": {"window off by one": constant(r"int\.6", 7)},
    },
}
MUTANTS["nemotron h"] = {
    "hf": {
        "entry and exit exchanged": exchange_tensors("layers.0.attn.b.weight", "layers.0.attn.c.weight"),
        "gate and input exchanged": exchange_tensors("layers.3.attn.z.weight", "layers.3.attn.x.weight"),
        "steps without their bias": fill("layers.0.attn.dt_bias", 0),
        "rates of two heads exchanged": shift_rows("layers.0.attn.a_log"),
        "convolution late by one": late_by_one("layers.0.attn.conv_x.weight"),
        "skipping forgotten": fill("layers.3.attn.d", 0),
    },
    "onnx": {
        "convolution late by one": late_by_one("layers.0.attn.conv_x.weight"),
        "state that grows": bypassed("Neg", "layers.0.attn.a"),
        "padding steps": bypassed("Mul", ".*dt.real"),
        "groups normed as one": bypassed("Sqrt", ".*norm.size"),
    },
}
EVERY = {
    f"{case}, {target}: {name}": (case, target, change)
    for case, targets in MUTANTS.items()
    for target, changes in targets.items()
    for name, change in changes.items()
}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The good artifacts, each made and seen to pass once."""
    root, made = tmp_path_factory.mktemp("clean"), dict[tuple[str, str], Path]()

    def artifact_of(case: str, target: str) -> Path:
        source = root / case
        if not source.exists():
            save(CASES[case], source)
        if (case, target) not in made:
            kind, plan = TARGETS[target]
            made[case, target] = root / f"{case} {target}"
            stream.run(convert.plan(source, kind, made[case, target], plan=plan))
            report = validate(Request(subject=made[case, target]))
            assert report.passed
            assert used(report) < 1 / MARGIN
        return made[case, target]

    return artifact_of


@pytest.mark.parametrize("mutant", EVERY)
def test_no_mutant_of_a_family_survives(mutant: str, clean: Callable[[str, str], Path], tmp_path: Path) -> None:
    case, target, change = EVERY[mutant]
    report = validate(Request(subject=mutate(clean(case, target), tmp_path / "mutant", change)))
    assert not report.passed
    assert "files match the manifest" not in [check.name for check in report.checks if not check.passed]
    assert used(report) > MARGIN, report.checks


def used(report: Report) -> float:
    """How much of its bound the farthest of the source's logits used up."""
    return max(check.used or 0 for check in report.checks if check.name.startswith("logits of the source"))
