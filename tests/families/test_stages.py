"""Pipeline stages of ONNX graphs: whatever a config can say, a row of stages answers what the whole graph answers, bit
for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import validation.small
from numpy.typing import NDArray

from nemoport.artifact import Signature, stage_place
from nemoport.errors import UsageError
from nemoport.exporters import convert, stream
from nemoport.exporters.checkpoint import Output
from nemoport.exporters.targets import onnx as target
from nemoport.exporters.targets.onnx.stages import cut
from nemoport.exporters.tensor import read
from nemoport.repository.ensemble import Member, wired
from nemoport.spec import LanguageModel, ModelSpec, Plan, Profile, Recipe, tensors

from .models import LAYERS
from .test_conformance import MODELS, unwritten
from .test_encoder_graphs import saying_something_new

Values = Mapping[str, NDArray[Any]]

SPECS = saying_something_new({name: spec for name, (_, _, spec) in MODELS.items()})
every_kind_of_model = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
PLAIN = next(iter(SPECS.values()))
PP = 3
"""Which the four layers do not divide by: stages of 2, 1 and 1."""


@dataclass(frozen=True)
class Graph:
    session: onnxruntime.InferenceSession
    signature: Signature

    def __call__(self, values: Values) -> dict[str, NDArray[Any]]:
        names = [tensor.name for tensor in self.signature.outputs]
        given = {each.name: values[each.name] for each in self.session.get_inputs()}
        return dict(zip(names, self.session.run(names, given), strict=True))


def write(output: Output, directory: Path) -> None:
    for file in output.files:
        (directory / file.path).parent.mkdir(parents=True, exist_ok=True)
        with (directory / file.path).open("wb") as stream:
            for slot, offset in zip(file.slots, file.offsets, strict=True):
                stream.seek(offset)
                stream.write(read(slot.tensor).tobytes())
    for path, content in output.sidecars.items():
        (directory / path).write_bytes(content)


def places(output: Output) -> list[tuple[str, Signature]]:
    assert output.signature
    rows = [(stage_place(number), signature) for number, signature in enumerate(output.stages)]
    return rows or [("", output.signature)]


def opened(output: Output, directory: Path) -> tuple[Graph, ...]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    cpu = ["CPUExecutionProvider"]
    return tuple(
        Graph(onnxruntime.InferenceSession(directory / place / target.GRAPH, options, providers=cpu), signature)
        for place, signature in places(output)
    )


def loaded(output: Output, directory: Path) -> tuple[Graph, ...]:
    write(output, directory)
    return opened(output, directory)


def chained(row: tuple[Graph, ...], given: Values) -> dict[str, NDArray[Any]]:
    """As an ensemble does: values go by their names."""
    made: dict[str, NDArray[Any]] = {}
    for graph in row:
        made |= graph({**given, **made})
    return made


def first(spec: ModelSpec, signature: Signature) -> dict[str, NDArray[Any]]:
    """A request whose second row is padded; to a decoder the first of a conversation."""
    ids: NDArray[np.int64] = np.random.default_rng(1).integers(0, spec.vocab_size, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    sizes = {"batch": 2, "past": 0}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.maximum(mask.cumsum(axis=1) - 1, 0),
        "token_type_ids": np.where(np.arange(9) < 4, 0, max(spec.token_types - 1, 0)) * np.ones_like(ids),
        "dimensions": np.array([[3], [spec.hidden_size]]),
    } | {
        each.name: np.zeros([sizes[dim] if isinstance(dim, str) else dim for dim in each.shape], each.dtype)
        for each in signature.inputs
        if each.name.startswith("past_key_values.")
    }


def following(spec: ModelSpec, given: Values, answers: Values, new: int) -> dict[str, NDArray[Any]]:
    """The next request of the same conversation."""
    mask = np.concatenate([given["attention_mask"], np.ones((2, new), np.int64)], axis=1)
    ids = np.random.default_rng(new).integers(0, spec.vocab_size, (2, new))
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, -new:]
    past = {name.replace("present.", "past_key_values."): x for name, x in answers.items() if "present." in name}
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **past}


def same(found: Values, wanted: Values) -> None:
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name, strict=True)


@every_kind_of_model
def test_a_row_of_stages_is_the_whole_graph_bit_for_bit(spec: ModelSpec, tmp_path: Path) -> None:
    model = unwritten(spec, tmp_path)
    (whole,) = loaded(target.output(model, Plan(dtype="float32")), tmp_path / "whole")
    row = loaded(target.output(model, Plan(dtype="float32", pp=PP)), tmp_path / "stages")
    assert len(row) == PP
    given = first(spec, whole.signature)
    answers = whole(given)
    same(chained(row, given), answers)
    for new in (1, 4, 1) if isinstance(spec.head, LanguageModel) else ():
        given = following(spec, given, answers, new)
        answers = whole(given)
        same(chained(row, given), answers)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@every_kind_of_model
def test_every_stage_is_a_model_of_its_own(spec: ModelSpec, dtype: str, tmp_path: Path) -> None:
    """The checker, shapes known everywhere, and a signature that wires: in a row it is that of the whole."""
    model = unwritten(spec, tmp_path)
    output = target.output(model, Plan(dtype=dtype, pp=PP))
    write(output, tmp_path)
    for place, signature in places(output):
        path = tmp_path / place / target.GRAPH
        onnx.checker.check_model(path, full_check=True)
        graph = onnx.load(path, load_external_data=False).graph
        assert [each.name for each in graph.input] == [each.name for each in signature.inputs]
        assert [each.name for each in graph.output] == [each.name for each in signature.outputs]
        read_here = {name for node in graph.node for name in node.input}
        assert {tensor.name for tensor in graph.initializer} <= read_here
    whole = target.output(model, Plan(dtype=dtype)).signature
    assert whole == output.signature
    assert whole
    members = [Member(place, signature) for place, signature in places(output)]
    joined = wired("row", members, {tensor.name for tensor in whole.outputs})
    assert set(joined.inputs) == set(whole.inputs)
    assert set(joined.outputs) == set(whole.outputs)


@every_kind_of_model
def test_every_weight_is_in_one_stage_but_a_tied_embedding_at_both_ends(spec: ModelSpec, tmp_path: Path) -> None:
    output = target.output(unwritten(spec, tmp_path), Plan(dtype="float32", pp=PP))
    placed = Counter(part for file in output.files for slot in file.slots for part in slot.parts)
    tied = isinstance(spec.head, LanguageModel) and spec.head.tied
    assert {name for name in tensors(spec) if placed[name] != 1} == ({"embed.weight"} if tied else set())


@pytest.mark.parametrize("pp", range(1, LAYERS + 1))
def test_stages_share_the_layers_as_evenly_as_they_divide(pp: int) -> None:
    stages = cut(PLAIN, pp)
    counts = [len(stage.layers) for stage in stages]
    assert [layer for stage in stages for layer in stage.layers] == list(range(LAYERS))
    assert counts == sorted(counts, reverse=True)
    assert max(counts) - min(counts) <= 1
    assert [stage.first for stage in stages] == [True] + [False] * (pp - 1)
    assert [stage.last for stage in stages] == [False] * (pp - 1) + [True]


@pytest.mark.parametrize("profile, group", [("portable", 32), ("ort", 16)])
def test_quantized_stages_are_the_whole_graph_bit_for_bit(profile: Profile, group: int, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": LAYERS, "hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    source = validation.small.write(tmp_path / "source", **sizes)
    rows = []
    for name, pp in (("whole", 1), ("stages", PP)):
        plan = Plan(dtype="float32", pp=pp, recipe=Recipe(method="int4", group=group), profile=profile)
        job = convert.plan(source, "onnx", tmp_path / name, plan=plan)
        stream.run(job)
        rows.append(opened(job.output, tmp_path / name))
    (whole,), row = rows
    given = first(job.model.spec, whole.signature)
    same(chained(row, given), whole(given))


def test_what_cannot_be_cut_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = unwritten(PLAIN, tmp_path)
    with pytest.raises(UsageError, match="the model has 4; use pp 4 or less"):
        target.output(model, Plan(pp=5))
    with pytest.raises(UsageError, match=r"tp=2 does not exist for ONNX.*use tp 1, with --pp.*--to trtllm.*vllm"):
        target.output(model, Plan(tp=2, pp=2))
