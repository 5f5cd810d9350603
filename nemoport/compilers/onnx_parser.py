"""What TensorRT's ONNX parser takes, as far as graphs of nemoport use it: a row an operator.

From docs/operators.md of onnx/onnx-tensorrt, 10.1-GA; for NonZero of booleans from its importer in onnxOpImporters.cpp;
for Attention, RMSNormalization and RotaryEmbedding from the same page of 10.14 and 10.15.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from onnx import GraphProto, ModelProto, NodeProto, TensorProto, shape_inference

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16})
_NUMBERS = _FLOATS | {TensorProto.INT32, TensorProto.INT64}
_ALL = _NUMBERS | {TensorProto.BOOL}
_BOOL = frozenset({TensorProto.BOOL})
_PACKED = frozenset({TensorProto.INT8, TensorProto.INT4, TensorProto.FLOAT8E4M3FN})


@dataclass(frozen=True, kw_only=True)
class Operator:
    types: frozenset[int]
    """Of what `typed` numbers among the inputs."""
    typed: int = 0
    initializers: tuple[int, ...] = ()
    """Inputs that must be known when the graph is parsed."""
    inputs: int | None = None
    """As many as it takes at most, where ONNX knows more."""
    attributes: frozenset[str] | None = None
    """Those that it may have, where ONNX knows more."""
    since: tuple[int, int] = (10, 0)
    """The release of TensorRT."""


FLOATS, NUMBERS, ALL, BOOL = (Operator(types=types) for types in (_FLOATS, _NUMBERS, _ALL, _BOOL))
REDUCES = Operator(types=_NUMBERS, initializers=(1,))
SHAPES = Operator(types=_ALL, initializers=(1,))

OPERATORS = {
    **dict.fromkeys(("MatMul", "Exp", "Sigmoid", "Softmax", "Softplus", "Sqrt", "Tanh", "Erf", "Conv"), FLOATS),
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Neg", "Min", "Max", "Relu", "Range"), NUMBERS),
    **dict.fromkeys(("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"), NUMBERS),
    **dict.fromkeys(("And", "Or", "Not"), BOOL),
    **dict.fromkeys(("Cast", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "Identity"), ALL),
    **dict.fromkeys(("Reshape", "Shape", "Transpose"), ALL),
    **dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), REDUCES),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), SHAPES),
    "Attention": Operator(types=_FLOATS, inputs=4, attributes=frozenset({"scale", "is_causal"}), since=(10, 14)),
    "CumSum": Operator(types=_FLOATS, initializers=(1,)),
    "DequantizeLinear": Operator(types=_PACKED, inputs=2),
    "Gelu": NUMBERS,
    "LayerNormalization": FLOATS,
    "NonZero": Operator(types=_ALL),
    "Pad": Operator(types=_NUMBERS, initializers=(3,)),
    "RMSNormalization": Operator(types=_FLOATS, since=(10, 15)),
    "RotaryEmbedding": Operator(types=_FLOATS, since=(10, 15)),
    "ScatterElements": NUMBERS,
    "ScatterND": Operator(types=_NUMBERS, attributes=frozenset()),
    "Slice": Operator(types=_ALL, initializers=(3,)),
    "TopK": Operator(types=_NUMBERS, initializers=(1,), attributes=frozenset({"axis", "largest"})),
    "Where": Operator(types=_ALL, typed=1),
}


def refusals(model: ModelProto) -> Iterator[str]:
    """What of a graph the parser would refuse, each in a clause."""
    graph = shape_inference.infer_shapes(model).graph
    types, constant = _types(graph), {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.domain or node.op_type not in OPERATORS:
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            yield f"{node.name} is {operator}, for which it has no importer"
            continue
        yield from _of_node(node, OPERATORS[node.op_type], types, constant)


def _of_node(node: NodeProto, row: Operator, types: dict[str, int], constant: set[str]) -> Iterator[str]:
    name, given = f"{node.name} ({node.op_type})", list(node.input)
    found = types.get(given[row.typed])
    if found not in row.types:
        kind = "unknown type" if found is None else TensorProto.DataType.Name(found)
        yield f"{name} takes {given[row.typed]} in {kind}"
    for number in row.initializers:
        if number < len(given) and given[number] and given[number] not in constant:
            yield f"{name} takes {given[number]}, which is not known before it runs"
    if row.inputs is not None and len(given) > row.inputs:
        yield f"{name} has {len(given)} inputs, of which it takes {row.inputs}"
    if row.attributes is not None and (more := {each.name for each in node.attribute} - row.attributes):
        yield f"{name} says {min(more)}"


def _types(graph: GraphProto) -> dict[str, int]:
    values = (*graph.input, *graph.value_info, *graph.output)
    known = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    return known | {tensor.name: int(tensor.data_type) for tensor in graph.initializer}
