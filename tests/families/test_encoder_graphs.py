"""The graphs of encoders, together all that a config can say, against the reference and against what runtimes take."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from nemoport import reference
from nemoport.exporters.checkpoint import Checkpoint, Model
from nemoport.exporters.targets import onnx as target
from nemoport.exporters.tensor import read
from nemoport.exporters.words import words_of
from nemoport.spec import LanguageModel, ModelSpec, Plan, tensors
from nemoport.validation.texts import texts

from .test_conformance import MODELS, numbers


def saying_something_new(specs: Mapping[str, ModelSpec]) -> Mapping[str, ModelSpec]:
    """Every value of every word once: the models that say what none before them has said."""
    said, kept = set[tuple[str, str]](), {}
    for name, spec in specs.items():
        new = {(word, repr(value)) for word, value in words_of(spec).items()} - said
        if new:
            kept[name] = spec
        said |= new
    return kept


ENCODERS = saying_something_new(
    {name: spec for name, (_, _, spec) in MODELS.items() if not isinstance(spec.head, LanguageModel)}
)
every_encoder = pytest.mark.parametrize("spec", ENCODERS.values(), ids=ENCODERS)


def written(spec: ModelSpec, directory: Path, **plan: Any) -> tuple[Model, Path]:
    held = numbers(spec)
    checkpoint = Checkpoint(path=directory, format="", writer="", naming="", config={}, tensors={})
    model = Model(checkpoint=checkpoint, spec=spec, tensors=held, sources={name: (name,) for name in held})
    output = target.output(model, Plan(**plan))
    for file in output.files:
        with (directory / file.path).open("wb") as stream:
            for slot, offset in zip(file.slots, file.offsets, strict=True):
                stream.seek(offset)
                stream.write(read(slot.tensor).tobytes())
    (directory / target.GRAPH).write_bytes(output.sidecars[target.GRAPH])
    return model, directory / target.GRAPH


@every_encoder
def test_the_graph_is_the_reference_s_model(spec: ModelSpec, tmp_path: Path) -> None:
    model, path = written(spec, tmp_path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    asked = {each.name for each in session.get_inputs()}
    for text in texts(spec, 3):
        given = {"input_ids": text.tokens, "attention_mask": text.mask, "token_type_ids": text.token_types}
        given |= {"dimensions": None if text.dimensions is None else text.dimensions[:, None]}
        said = {name: array for name, array in given.items() if array is not None}
        assert said.keys() == asked
        (found,) = session.run(None, said)
        wanted = reference.encode(
            spec,
            model.tensors,
            text.tokens,
            mask=text.mask,
            token_types=text.token_types,
            dimensions=text.dimensions,
        )
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@every_encoder
def test_the_graph_is_what_runtimes_take(spec: ModelSpec, dtype: str, tmp_path: Path) -> None:
    """The checker, shapes known everywhere, and of TensorRT's parser: no domain but the standard one, attention of
    four dimensions with its mask, every weight used."""
    _, path = written(spec, tmp_path, dtype=dtype)
    onnx.checker.check_model(path, full_check=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True).graph
    known = {value.name for value in (*graph.value_info, *graph.output)}
    assert {name for node in graph.node for name in node.output} <= known
    assert {node.domain for node in graph.node} == {""}
    assert all(len(node.input) == 4 for node in graph.node if node.op_type == "Attention")
    used = {name for node in graph.node for name in node.input}
    assert {tensor.name for tensor in graph.initializer} <= used
    assert tensors(spec).keys() <= used
    (answer,) = graph.output
    assert answer.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
