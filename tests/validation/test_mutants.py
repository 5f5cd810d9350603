"""A validator that was never seen to fail is not trusted: what real bugs would write, and that none of it survives.

Every mutant must fail by the logits of the source alone, far beyond the gate. What no prompt can show is at the
end: that the weights themselves tell, and what nothing tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from nemoport.artifact import read_manifest
from nemoport.exporters import convert, stream
from nemoport.spec import Plan
from nemoport.validation import Report, Request, validate
from nemoport.validation.prompts import prompts

from .mutants import (
    Change,
    add_to_one,
    exchange_files,
    exchange_layers,
    exchange_ranks,
    exchange_tensors,
    fill,
    in_config,
    in_graph,
    interleave_groups,
    join_in_another_order,
    mutate,
    pair_neighbours,
    shift_rows,
    tables_late_by_one,
    tables_of_base,
)

LLAMA = Path(__file__).parents[1] / "data" / "megatron" / "hf" / "llama"
DEMO = Path(__file__).parents[2] / "examples" / "demo" / "checkpoint"

TARGETS = {
    "hf": ("hf", Plan()),
    "trtllm tp 2": ("trtllm", Plan(tp=2)),
    "trtllm tp 2 pp 2": ("trtllm", Plan(tp=2, pp=2)),
    "onnx": ("onnx", Plan(dtype="float32")),
    "onnx float16": ("onnx", Plan(dtype="float16")),
}

ANY: dict[str, Change] = {
    "neighbouring layers swapped": exchange_layers(0, 1),
    "layers of two stages swapped": exchange_layers(1, 2),
    "q and k exchanged": join_in_another_order("layers.1.attn.q.weight", "layers.1.attn.k.weight"),
    "k and v exchanged": exchange_tensors("layers.2.attn.k.weight", "layers.2.attn.v.weight"),
    "gate and up exchanged": exchange_tensors("layers.3.ffn.gate.weight", "layers.3.ffn.up.weight"),
    "gate and up of layer 0 exchanged": exchange_tensors("layers.0.ffn.gate.weight", "layers.0.ffn.up.weight"),
    "norms of a layer exchanged": exchange_tensors("layers.1.attn_norm.weight", "layers.1.ffn_norm.weight"),
    "norm before attention zeroed": fill("layers.2.attn_norm.weight", 0),
    "norm before feed-forward zeroed": fill("layers.0.ffn_norm.weight", 0),
    "last norm zeroed": fill("norm.weight", 0),
    "norm minus one": fill("layers.3.ffn_norm.weight", 0.01),
    "q paired as neighbours": pair_neighbours("layers.0.attn.q.weight"),
    "query groups interleaved": interleave_groups("layers.3.attn.q.weight"),
    "rows of the head shifted": shift_rows("head.weight"),
    "rows of the embedding shifted": shift_rows("embed.weight"),
    "one element of q": add_to_one("layers.0.attn.q.weight", 5, 4.0),
    "one element of down": add_to_one("layers.2.ffn.down.weight", 5, 4.0),
    "one element of the head": add_to_one("head.weight", 5, 4.0),
}
RANKS: dict[str, Change] = {
    "rope base": in_config("rotary_base", 0.02),
    "norm eps x 10": in_config("norm_epsilon", 10),
    "qkv of two ranks exchanged": exchange_ranks("transformer.layers.0.attention.qkv.weight"),
    "dense of two ranks exchanged": exchange_ranks("transformer.layers.1.attention.dense.weight"),
    "fc of two ranks exchanged": exchange_ranks("transformer.layers.1.mlp.fc.weight"),
    "proj of two ranks exchanged": exchange_ranks("transformer.layers.0.mlp.proj.weight"),
    "head of two ranks exchanged": exchange_ranks("lm_head.weight"),
}
GRAPH: dict[str, Change] = {
    "rope base": tables_of_base(0.02),
    "rope tables wrong after position 110": tables_late_by_one(110),
    "norm eps x 10": in_graph(".*norm", "epsilon", lambda eps: 10 * eps),
}
OF_TARGET: Mapping[str, Mapping[str, Change]] = {
    "hf": {"rope base": in_config("rope_theta", 0.02), "norm eps x 10": in_config("rms_norm_eps", 10)},
    "trtllm tp 2": RANKS | {"files of two ranks exchanged": exchange_files("rank0.safetensors", "rank1.safetensors")},
    "trtllm tp 2 pp 2": RANKS
    | {"files of the last stage exchanged": exchange_files("rank2.safetensors", "rank3.safetensors")},
    "onnx": GRAPH,
}
IN_16_BITS = (
    "neighbouring layers swapped",
    "q and k exchanged",
    "gate and up exchanged",
    "norm before attention zeroed",
    "query groups interleaved",
    "one element of the head",
    "rope base",
    "rope tables wrong after position 110",
)
OF_DEMO = (
    "neighbouring layers swapped",
    "q and k exchanged",
    "gate and up exchanged",
    "norm before feed-forward zeroed",
    "one element of q",
    "rope base",
    "norm eps x 10",
)

MUTANTS = {
    f"{target}: {name}": (target, change)
    for target, special in OF_TARGET.items()
    for name, change in {**ANY, **special}.items()
} | {f"onnx float16: {name}": ("onnx float16", {**ANY, **GRAPH}[name]) for name in IN_16_BITS}
MARGIN = 3
"""How far beyond the gate each of them lands at least."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return {target: make(target, LLAMA, tmp_path_factory.mktemp("clean")) for target in TARGETS}


def make(target: str, source: Path, directory: Path) -> Path:
    kind, plan = TARGETS[target]
    stream.run(convert.plan(source, kind, directory / kind, plan=plan), lambda count: None)
    return directory / kind


@pytest.mark.parametrize("target", TARGETS)
def test_a_clean_artifact_passes(clean: Mapping[str, Path], target: str) -> None:
    report = validate(Request(subject=clean[target]))
    assert report.passed, failed(report)
    assert used(report) < (1 / MARGIN if "16" not in target else 1)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_no_mutant_survives(clean: Mapping[str, Path], tmp_path: Path, mutant: str) -> None:
    target, change = MUTANTS[mutant]
    report = validate(Request(subject=mutate(clean[target], tmp_path / "mutant", change)))
    assert "files match the manifest" not in failed(report)
    assert not report.passed
    assert used(report) > MARGIN, report.checks


@pytest.mark.parametrize("target", ["trtllm tp 2", "onnx"])
def test_the_demo_would_not_hide_a_mutant_either(tmp_path: Path, target: str) -> None:
    """Its model is small and trained, and its head is the embedding."""
    good = make(target, DEMO, tmp_path)
    assert validate(Request(subject=good)).passed
    mutants = {**ANY, **OF_TARGET[target]}
    for number, name in enumerate(OF_DEMO):
        report = validate(Request(subject=mutate(good, tmp_path / str(number), mutants[name])))
        assert not report.passed, name
        assert used(report) > MARGIN, name


@pytest.mark.parametrize("target", OF_TARGET)
def test_a_row_of_the_embedding_that_no_prompt_meets_is_told_by_the_weights(
    clean: Mapping[str, Path], tmp_path: Path, target: str
) -> None:
    spec = read_manifest(clean[target]).spec
    met = {int(token) for prompt in prompts(spec, 8) for token in prompt.tokens[prompt.real]}
    row = next(row for row in range(spec.vocab_size) if row not in met)
    report = validate(Request(subject=mutate(clean[target], tmp_path / "mutant", add_to_one("embed.weight", row, 4.0))))
    assert failed(report) == ["weights of the source"]


def test_ranks_of_a_first_stage_may_change_places_in_numbers_but_not_in_bytes(
    clean: Mapping[str, Path], tmp_path: Path
) -> None:
    """With the embedding whole on both, each rank is a summand of every all-reduce: only their order changes."""
    change = exchange_files("rank0.safetensors", "rank1.safetensors")
    report = validate(Request(subject=mutate(clean["trtllm tp 2 pp 2"], tmp_path / "mutant", change)))
    assert failed(report) == ["weights of the source"]


def test_an_eps_ten_times_too_large_is_lost_in_16_bits(clean: Mapping[str, Path], tmp_path: Path) -> None:
    """The limit of a numeric proof: it moves logits by half of what float16 itself does."""
    change = in_graph(".*norm", "epsilon", lambda eps: 10 * eps)
    report = validate(Request(subject=mutate(clean["onnx float16"], tmp_path / "mutant", change)))
    assert report.passed


def failed(report: Report) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


def used(report: Report) -> float:
    """How much of its bound the farthest of the source's logits used up."""
    return max(check.used or 0 for check in report.checks if check.name.startswith("logits of the source"))
