"""What an exporter of encoders may get wrong, done to good artifacts and sealed again: none of it survives."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from onnx.helper import make_node
from validation.mutants import Change, Opened, exchange_tensors, fill, mutate, shift_rows

from nemoport import artifact
from nemoport.exporters import convert, stream
from nemoport.spec import Plan
from nemoport.validation import Report, Request, validate

from .encoders import CASES, save
from .test_mutants import MARGIN, attribute, bypassed, constant, in_model, say

PLANS = {"hf": Plan(), "onnx": Plan(dtype="float32"), "torchscript": Plan(dtype="float32")}


def instead(of: str, by: str, at: str, *nodes: onnx.NodeProto) -> Change:
    """Nodes whose name matches `at` take the value `by` instead of `of`; `nodes` make it."""

    def edit(graph: onnx.GraphProto) -> int:
        users = [number for number, node in enumerate(graph.node) if re.fullmatch(at, node.name)]
        taken = [(node, i) for node in map(graph.node.__getitem__, users) for i, x in enumerate(node.input) if x == of]
        for node, i in taken:
            node.input[i] = by
        for offset, node in enumerate(nodes):
            graph.node.insert(users[0] + offset, node)
        return len(taken)

    return in_model(edit)


def in_json(name: str, edit: Callable[[Any], Any]) -> Change:
    def change(opened: Opened) -> None:
        path = opened.directory / name
        path.write_bytes(artifact.json_bytes(edit(json.loads(path.read_bytes()))))

    return change


def pooled_by(mode: str) -> Change:
    return in_json("1_Pooling/config.json", lambda config: {key: key == f"pooling_mode_{mode}" for key in config})


def in_code(old: str, new: str) -> Change:
    """Other words in a script, which are no longer than those that they replace."""

    def change(opened: Opened) -> None:
        content = opened.files["model.pt"]
        code, places = bytes(content), 0
        for found in re.finditer(re.escape(old.encode()), code):
            content[slice(*found.span())] = np.frombuffer(new.ljust(len(old)).encode(), np.uint8)
            places += 1
        assert places

    return change


def slowed(opened: Opened) -> None:
    (frequencies,) = opened.named("frequencies0")
    frequencies /= 2


SEEN = """own = torch.unsqueeze(places, 0) == torch.unsqueeze(places, 1)
    visible = torch.unsqueeze(torch.unsqueeze(real, 1), 1) | own"""
NOT_NORMALIZED = in_json("modules.json", lambda modules: modules[:2])
POOLED_BY_FIRST = instead(
    "pool.shares",
    "first.real",
    "pool.chosen",
    make_node("Sub", ["pool.count", "pool.count"], ["zero"]),
    make_node("Equal", ["positions.counted", "zero"], ["first"]),
    make_node("Cast", ["first"], ["first.float32"], to=TensorProto.FLOAT),
    make_node("Mul", ["first.float32", "mask.real"], ["first.real"]),
)
PADDING_POOLED = instead(
    "mask.real",
    "ones",
    r"pool\.(count|shares)",
    make_node("Equal", ["mask.real", "mask.real"], ["all"]),
    make_node("Cast", ["all"], ["ones"], to=TensorProto.FLOAT),
)
ATTENTION = r"layers\.\d+\.attn\.mixed"
CAUSAL = instead(
    "mask.seen_or_own",
    "mask.causal",
    ATTENTION,
    make_node("LessOrEqual", ["mask.keys", "mask.queries"], ["mask.before"]),
    make_node("And", ["mask.seen_or_own", "mask.before"], ["mask.causal"]),
)
PADDING_SEEN = instead("mask.seen_or_own", "mask.all", ATTENTION, make_node("Equal", ["mask.own"] * 2, ["mask.all"]))
POSITIONS_WITH_PADDING = instead(
    "positions.counted",
    "places",
    r"positions\.placed",
    make_node("Cast", ["mask.keys"], ["keys.float32"], to=TensorProto.FLOAT),
    make_node("Mul", ["mask.real", "keys.float32"], ["places"]),
)

MUTANTS: dict[str, dict[str, dict[str, Change]]] = {
    "bert": {
        "hf": {
            "pooled by the first token": pooled_by("cls_token"),
            "pooled by the last token": pooled_by("lasttoken"),
            "not normalized": NOT_NORMALIZED,
            "gelu of the other kind": say("hidden_act", "gelu_new"),
            "norms exchanged": exchange_tensors("layers.1.attn_norm.weight", "layers.1.ffn_norm.weight"),
            "token types exchanged": shift_rows("token_types.weight"),
        },
        "onnx": {
            "pooled by the first token": POOLED_BY_FIRST,
            "padding pooled": PADDING_POOLED,
            "not normalized": bypassed("Div", "embeddings"),
            "token types ignored": bypassed("Add", "embed.typed"),
            "causal mask left on": CAUSAL,
            "padding seen": PADDING_SEEN,
            "positions count padding": POSITIONS_WITH_PADDING,
            "norms exchanged": exchange_tensors("layers.1.attn_norm.weight", "layers.1.ffn_norm.weight"),
            "a norm after attention missing": bypassed("LayerNormalization", "layers.1.attn_norm"),
            "norm of embeddings missing": bypassed("LayerNormalization", "embed_norm"),
            "gelu of the other kind": attribute("Gelu", "approximate", "tanh"),
        },
        "torchscript": {
            "pooled by the first token": in_code("torch.to(real, 6) / count", "torch.to(counted==0, 6)"),
            "padding pooled": in_code("torch.to(real, 6) / count", "(real == real) / count"),
            "not normalized": in_code("pooled / torch.clamp_min(torch.norm(pooled, 2, [1], True), 1e-12)", "pooled"),
            "token types ignored": in_code("torch.embedding(self.token_types.weight, token_type_ids)", "0"),
            "causal mask left on": in_code(
                SEEN,
                "visible = torch.tril((torch.diag(places + 1) > 0) | torch.unsqueeze(torch.unsqueeze(real, 1), 1))",
            ),
            "padding seen": in_code("torch.unsqueeze(torch.unsqueeze(real, 1), 1) | own", "own | ~own"),
            "positions count padding": in_code(
                "torch.clamp_min(torch.cumsum(real, 1) - 1, 0)", "torch.cumsum(real+1>0, 1)-1"
            ),
            "norms exchanged": exchange_tensors("layers.1.attn_norm.weight", "layers.1.ffn_norm.weight"),
            "norms of attention missing": in_code(
                "x = __torch__.normed(x, self.attn_norm.weight, self.attn_norm.bias)", "x = x"
            ),
            "norm of embeddings missing": in_code(
                "__torch__.normed(x, self.embed_norm.weight, self.embed_norm.bias)", "x"
            ),
            "a layer missing": in_code('(getattr(layers, "1")).forward(x, visible)', "x"),
        },
    },
    "roberta": {
        "onnx": {"positions from 1": constant(r"float32\.2\.0", 1.0)},
        "torchscript": {"positions from 1": in_code("counted + 2", "counted + 1")},
    },
    "bert classifier": {
        "onnx": {
            "labels in another order": shift_rows("head.weight"),
            "bias of labels zeroed": fill("head.bias", 0),
            "tanh of the pooler missing": bypassed("Tanh", "pooler.tanh"),
        },
        "torchscript": {
            "labels in another order": shift_rows("head.weight"),
            "bias of labels forgotten": in_code("self.head.weight, self.head.bias", "self.head.weight"),
            "tanh of the pooler missing": in_code("torch.tanh(", "("),
        },
    },
    "llama": {
        "hf": {"not normalized": NOT_NORMALIZED, "pooled by the last token": pooled_by("lasttoken")},
        "onnx": {"causal mask left on": CAUSAL, "padding pooled": PADDING_POOLED},
        "torchscript": {
            "turned the other way": in_code("first * cos - second * sin", "first * cos + second * sin"),
            "turned half as fast": slowed,
            "heads of keys in turns": in_code("torch.repeat_interleave(k, 3, 1)", "torch.tile(k, [1, 3, 1, 1])"),
            "up forgotten": in_code("* torch.linear(seen, ffn.up.weight)", ""),
        },
    },
    "llama reranker": {
        "hf": {"temperature missing": say("temperature", 1.0), "pooled by the first token": say("pooling", "cls")},
        "onnx": {"temperature missing": bypassed("Div", "logits"), "causal mask left on": CAUSAL},
        "torchscript": {"temperature missing": in_code("logits / 0.7", "logits")},
    },
    "matryoshka": {
        "onnx": {"dimensions ignored": bypassed("Mul", r"pooled\.cut")},
        "torchscript": {"dimensions ignored": in_code(") < dimensions)", ") < 999999)")},
    },
}
EVERY = {
    f"{case}, {target}: {name}": (case, target, change)
    for case, targets in MUTANTS.items()
    for target, changes in targets.items()
    for name, change in changes.items()
}
OPTIONS = {"matryoshka": ("bert", {"is_matryoshka": True})}


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The good artifacts, each made and seen to pass once."""
    root = tmp_path_factory.mktemp("clean")

    def artifact_of(case: str, target: str) -> Path:
        name, config = OPTIONS.get(case, (case, None))
        if not (source := root / name).exists():
            save(CASES[name], source)
        if not (made := root / f"{case} {target}").exists():
            stream.run(convert.plan(source, target, made, config=config, plan=PLANS[target]))
            report = validate(Request(subject=made))
            assert report.passed
            assert used(report) < 1
        return made

    return artifact_of


@pytest.mark.parametrize("mutant", EVERY)
def test_no_mutant_of_an_encoder_survives(mutant: str, clean: Callable[[str, str], Path], tmp_path: Path) -> None:
    case, target, change = EVERY[mutant]
    report = validate(Request(subject=mutate(clean(case, target), tmp_path / "mutant", change)))
    assert not report.passed
    assert "files match the manifest" not in [check.name for check in report.checks if not check.passed]
    assert used(report) > MARGIN, report.checks


def used(report: Report) -> float:
    """How much of its bound the farthest of the source's answers used up."""
    return max(check.used or 0 for check in report.checks if " of the source: " in check.name)
