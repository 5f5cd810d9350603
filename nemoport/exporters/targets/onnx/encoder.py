"""A model that answers each text at once, as nodes of the same opset: with a vector, or with logits over labels.

    inputs     input_ids, attention_mask [batch, sequence]
               token_type_ids [batch, sequence] where the model knows more than one type
               dimensions [batch, 1] of a Matryoshka model: how much of each vector is asked for
    outputs    embeddings [batch, hidden] or logits [batch, labels], float32

Positions are counted from the mask, so padding may stand on either side. Tokens are pooled and vectors normalized in
float32; a classifier's linear maps are in the model's dtype. Beyond the asked dimensions a vector is 0, and is as wide
as ever: an answer must not depend on what else is in its batch.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import TensorProto

from nemoport.exporters.dtypes import DTYPES
from nemoport.exporters.targets.onnx.attention import attention
from nemoport.exporters.targets.onnx.blocks import layers
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.exporters.targets.onnx.layers import Tables, length, linear
from nemoport.exporters.targets.onnx.stages import Stage, mixers_of
from nemoport.spec import Attention, Classifier, Embedding, Mixer, ModelSpec, Pooling, Rope

LEAST = 1e-12
"""The length by which shorter vectors are divided, as torch's `normalize` has it."""


def encoder(
    graph: Graph, spec: ModelSpec, stage: Stage, head: Embedding | Classifier, tables: Mapping[Rope, Tables], dtype: str
) -> None:
    real, counted, mask = "mask.real", "positions.counted", _mask(graph, stage)
    places = stage.first or any(mixer.rope for mixer in mixers_of(spec, stage))
    if places or stage.last:
        _counted(graph, real, counted)
    if places:
        placed = graph.number(float(spec.first_position), "float32")
        graph.add("Cast", "position_ids", graph.add("Add", "positions.placed", counted, placed), to=TensorProto.INT64)

    def mix(layer: int, mixer: Mixer, x: str) -> str:
        assert isinstance(mixer, Attention), mixer
        assert not mixer.causal, "an encoder sees both ways"
        name = f"layers.{layer}.attn"
        return attention(graph, mixer, spec.norm, name, x, tables, mask, _these_alone, dtype)

    x = layers(graph, spec, stage, mix, dtype)
    if not stage.last:
        return
    pooled = _pooled(graph, head.pooling, graph.add("Cast", "hidden", x, to=TensorProto.FLOAT), real, counted)
    match head:
        case Embedding():
            _embeddings(graph, spec, head, pooled)
        case Classifier():
            _logits(graph, head, pooled, dtype)


def _counted(graph: Graph, real: str, counted: str) -> None:
    """[batch, sequence]: which tokens are real, and how many real ones stand before each, padding at 0; float32, in
    which TensorRT sums up."""
    graph.add("Cast", real, "attention_mask", to=TensorProto.FLOAT)
    upto = graph.add("CumSum", "positions.upto", real, graph.scalar(1))
    before = graph.add("Sub", "positions.before", upto, graph.number(1.0, "float32"))
    graph.add("Relu", counted, before)


def _mask(graph: Graph, stage: Stage) -> str:
    """[batch, 1, sequence, sequence], true where a query sees a key: every real one, and always its own, so that the
    row of padding that is nothing else is not empty, whose softmax would be NaN."""
    keys = graph.add(
        "Range", "mask.keys", graph.scalar(0), length(graph, "mask.sequence", stage.enters), graph.scalar(1)
    )
    own = graph.add("Equal", "mask.own", keys, graph.add("Unsqueeze", "mask.queries", keys, graph.constant(1)))
    seen = graph.add("Cast", "mask.seen", "attention_mask", to=TensorProto.BOOL)
    seen = graph.add("Unsqueeze", "mask.seen_keys", seen, graph.constant(1, 2))
    return graph.add("Or", "mask.seen_or_own", seen, own)


def _these_alone(keys: str, values: str) -> tuple[str, str]:
    """Of a text that is seen whole there is no past."""
    return keys, values


def _pooled(graph: Graph, pooling: Pooling, x: str, real: str, counted: str) -> str:
    """[batch, hidden]: the sum of the chosen tokens of x [batch, sequence, hidden], divided by how many they are."""
    count = graph.add("ReduceSum", "pool.count", real, graph.constant(1), keepdims=1)
    count = graph.add("Max", "pool.count_or_one", count, graph.number(1.0, "float32"))
    match pooling:
        case "avg":
            chosen = graph.add("Div", "pool.shares", real, count)
        case "cls":
            chosen = _at(graph, real, counted, graph.number(0.0, "float32"))
        case "last":
            last = graph.add("Sub", "pool.last", count, graph.number(1.0, "float32"))
            chosen = _at(graph, real, counted, last)
    chosen = graph.add("Unsqueeze", "pool.chosen", chosen, graph.constant(1))
    return graph.add("Squeeze", "pooled", graph.add("MatMul", "pool.sum", chosen, x), graph.constant(1))


def _at(graph: Graph, real: str, counted: str, place: str) -> str:
    """1 at the real token that stands at a place, 0 at the others."""
    found = graph.add("Cast", "pool.at", graph.add("Equal", "pool.found", counted, place), to=TensorProto.FLOAT)
    return graph.add("Mul", "pool.at_real", found, real)


def _embeddings(graph: Graph, spec: ModelSpec, head: Embedding, x: str) -> None:
    if head.matryoshka:
        places = graph.add("Range", "dimensions.all", graph.scalar(0), graph.scalar(spec.hidden_size), graph.scalar(1))
        kept = graph.add("Less", "dimensions.kept", places, "dimensions")
        x = graph.add("Mul", "pooled.cut", x, graph.add("Cast", "dimensions.float32", kept, to=TensorProto.FLOAT))
    if head.normalized:
        size = graph.add("ReduceL2", "pooled.length", x, graph.constant(1), keepdims=1)
        size = graph.add("Max", "pooled.length_or_least", size, graph.number(LEAST, "float32"))
        graph.add("Div", "embeddings", x, size)
    else:
        graph.add("Identity", "embeddings", x)


def _logits(graph: Graph, head: Classifier, x: str, dtype: str) -> None:
    x = graph.add("Cast", "pooled.cast", x, to=DTYPES[dtype].onnx)
    if head.pooler:
        x = graph.add("Tanh", "pooler.tanh", linear(graph, "pooler", x, bias=True))
    x = graph.add("Cast", "head.float32", linear(graph, "head", x, head.bias), to=TensorProto.FLOAT)
    graph.add("Div", "logits", x, graph.number(head.temperature, "float32"))
