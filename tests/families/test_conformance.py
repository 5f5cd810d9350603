"""What every family keeps, whichever it is: names and configs read both ways, and nothing left over."""

from __future__ import annotations

import json
from pathlib import Path
from zlib import crc32

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from nemoport import plugins, reference
from nemoport.exporters import configs, layouts, rules, source
from nemoport.exporters.checkpoint import Checkpoint, Model, Output
from nemoport.exporters.layouts import PLUS_ONE, Layout
from nemoport.exporters.targets import onnx, trtllm
from nemoport.exporters.tensor import Held, LazyTensor, read
from nemoport.exporters.words import spec_of, words_of
from nemoport.reference import rank_files
from nemoport.spec import Mixture, ModelSpec, Plan, spec_from_json, tensors, to_json
from nemoport.validation import weights

from .models import COLUMNS, models

ROUTERS = ("plain", "ffn", "router", "expert", "shared")
MODELS = {
    f"{family} {naming} {name}": (family, naming, spec)
    for family, naming in COLUMNS
    for name, spec in models(family, naming).items()
}
ROUTED = {
    name: spec
    for name, (family, naming, spec) in MODELS.items()
    if family == "mixtral" and naming == "megatron" and any(word in name for word in ROUTERS)
}
RANKED = {name: spec for name, (_, naming, spec) in MODELS.items() if naming == "trtllm"}
every_model = pytest.mark.parametrize("family, naming, spec", MODELS.values(), ids=MODELS)
torch.set_num_threads(1)


def numbers(spec: ModelSpec) -> dict[str, LazyTensor]:
    """bfloat16 numbers, seen as float32 where the cast is exact."""
    draw = np.random.default_rng(3)
    return {
        name: Held(draw.normal(size=tensor.shape).astype(np.float16).astype(np.float32) / 4, "float32")
        for name, tensor in tensors(spec).items()
    }


def floats(tensor: LazyTensor) -> NDArray[np.float32]:
    return read(tensor).astype(np.float32)


@every_model
def test_a_config_says_exactly_its_model(family: str, naming: str, spec: ModelSpec) -> None:
    dialects = source.column(family, naming, "give it one").dialects
    config = json.loads(json.dumps(configs.write(dialects, spec, "make another")))
    assert configs.read(family, dialects, config) == spec
    assert configs.write(dialects, configs.read(family, dialects, config), "make another") == config


@every_model
def test_a_config_is_that_of_one_family_and_dialect(family: str, naming: str, spec: ModelSpec) -> None:
    """One that two claim would mean what their order says."""
    config = configs.write(source.column(family, naming, "give it one").dialects, spec, "make another")
    claimed = [
        (name, number)
        for name, module in plugins.load_all(source.FAMILIES).items()
        for number, dialect in enumerate(module.COLUMNS[naming].dialects if naming in module.COLUMNS else ())
        if not dialect.mismatches(config)
    ]
    assert len(claimed) == 1, claimed


@every_model
def test_every_tensor_has_one_place_and_reads_back_from_it(family: str, naming: str, spec: ModelSpec) -> None:
    column, whole, specs = source.column(family, naming, "give it one"), numbers(spec), tensors(spec)
    bound = list(rules.written(column.rules, specs))
    stored = {each.stored: each.layout.join([whole[part.name] for part in each.parts], each.parts) for each in bound}
    assert len(stored) == len(bound)
    assert all(tensor.shape == each.shape for each, tensor in zip(bound, stored.values(), strict=True))
    found = rules.resolve(column, specs, stored)
    assert found.tensors.keys() == whole.keys()
    added = {part.name for each in bound if each.layout is PLUS_ONE for part in each.parts}
    for name, tensor in whole.items():
        np.testing.assert_allclose(
            floats(found.tensors[name]), floats(tensor), rtol=0, atol=1e-6 if name in added else 0, err_msg=name
        )


@every_model
def test_a_spec_survives_json_and_words(family: str, naming: str, spec: ModelSpec) -> None:
    assert spec_from_json(json.loads(json.dumps(to_json(spec)))) == spec
    assert spec_of(family, words_of(spec)) == spec


def test_every_layout_is_that_of_some_rule() -> None:
    known = {layout.name for layout in vars(layouts).values() if isinstance(layout, Layout)}
    used = {rule.layout.name for family, naming in COLUMNS for rule in source.column(family, naming, "").rules}
    assert used == known


def ranks(spec: ModelSpec, plan: Plan, directory: Path) -> tuple[Model, Path]:
    """The rank files of a model."""
    model = unwritten(spec, directory)
    write(trtllm.output(model, plan), directory)
    return model, directory


def unwritten(spec: ModelSpec, directory: Path) -> Model:
    held = numbers(spec)
    checkpoint = Checkpoint(path=directory, format="", writer="", naming="", config={}, tensors={})
    return Model(checkpoint=checkpoint, spec=spec, tensors=held, sources={name: (name,) for name in held})


def write(output: Output, directory: Path) -> None:
    """As it streams."""
    for file in output.files:
        with (directory / file.path).open("wb") as stream:
            stream.write(file.header)
            pieces = {
                offset: read(slot.tensor).tobytes() for slot, offset in zip(file.slots, file.offsets, strict=True)
            }
            sealed = file.seal([crc32(content) for content in pieces.values()]) if file.seal else {}
            for offset, content in {**pieces, **sealed}.items():
                stream.seek(offset)
                stream.write(content)
    for name, content in output.sidecars.items():
        (directory / name).write_bytes(content)


@pytest.mark.parametrize("spec", ROUTED.values(), ids=ROUTED)
def test_a_graph_routes_as_the_reference_does(spec: ModelSpec, tmp_path: Path) -> None:
    model = unwritten(spec, tmp_path)
    write(onnx.output(model, Plan(dtype="float32")), tmp_path)
    ids: NDArray[np.int64] = np.random.default_rng(1).integers(0, spec.vocab_size, (2, 9))
    given = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.tile(np.arange(ids.shape[1]), (2, 1)),
        **{
            f"past_key_values.{i}.{state.name}": np.zeros((2, *(size or 0 for size in state.shape)), np.float32)
            for i, mixer in enumerate(spec.mixers)
            for state in mixer.state
        },
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(tmp_path / onnx.GRAPH, options, providers=["CPUExecutionProvider"])
    whole = reference.logits(spec, model.tensors, ids)
    np.testing.assert_allclose(session.run(["logits"], given)[0], whole, atol=2e-5 * np.abs(whole).max())


def has(spec: ModelSpec, tp: int, pp: int, ep: int) -> bool:
    """Whether the format has such a plan for a model."""
    kv_heads, one_table = spec.mixers[0].kv_heads, not source.column(spec.family, "trtllm", "").own_head
    experts = any(isinstance(block.ffn, Mixture) for block in spec.blocks)
    return not ((kv_heads % tp and tp % kv_heads) or (pp > 1 and one_table) or ((ep > 1 or tp > 5) and not experts))


PLANS = [(1, 1, 1), (2, 1, 1), (5, 1, 1), (2, 2, 1), (2, 1, 2), (10, 1, 5), (10, 2, 2)]
"""tp, pp and ep."""


@pytest.mark.parametrize(
    "spec, tp, pp, ep",
    [
        pytest.param(spec, *plan, id=f"{name} {plan}")
        for name, spec in RANKED.items()
        for plan in PLANS
        if has(spec, *plan)
    ],
)
def test_gathered_ranks_are_the_model_whatever_the_plan(
    spec: ModelSpec, tp: int, pp: int, ep: int, tmp_path: Path
) -> None:
    model, directory = ranks(spec, Plan(tp=tp, pp=pp, ep=ep), tmp_path)
    assert weights.differences(model, weights.of_ranks(rank_files.read(directory), spec)) == ()
    ids: NDArray[np.int64] = np.random.default_rng(1).integers(0, spec.vocab_size, (2, 9))
    whole = reference.logits(spec, model.tensors, ids)
    np.testing.assert_allclose(reference.rank_logits(directory, ids), whole, atol=2e-5 * np.abs(whole).max())
