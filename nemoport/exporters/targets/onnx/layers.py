"""Pieces that every graph is made of: norm, rotation, linear maps, a soft cap, a length."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from nemoport.exporters.dtypes import DTYPES
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.spec import Norm, Rope

SWAP_HEADS_AND_SEQUENCE = [0, 2, 1, 3]
HIDDEN = -3.0e38
"""The score of a key that a query does not see."""


@dataclass(frozen=True)
class Tables:
    """The initializers that hold a rope's cosines and sines."""

    cos: str
    sin: str


def norm(graph: Graph, spec: Norm, name: str, x: str, dtype: str) -> str:
    """Computed in float32 whatever the dtype: that is what `stash_type` says. One plus a zero-centred weight is taken
    in float32 too, since 16 bits would round it."""
    wide = spec.zero_centered and dtype != "float32"
    x = graph.add("Cast", f"{name}.input", x, to=TensorProto.FLOAT) if wide else x
    weights = [_factor(graph, spec, f"{name}.weight", wide)]
    if spec.kind == "layer":
        bias = f"{name}.bias"
        weights.append(graph.add("Cast", f"{bias}.float32", bias, to=TensorProto.FLOAT) if wide else bias)
    op = {"rms": "RMSNormalization", "layer": "LayerNormalization"}[spec.kind]
    made = f"{name}.output" if wide else name
    x = graph.add(op, made, x, *weights, axis=-1, epsilon=spec.eps, stash_type=TensorProto.FLOAT)
    return graph.add("Cast", name, x, to=DTYPES[dtype].onnx) if wide else x


def _factor(graph: Graph, spec: Norm, weight: str, wide: bool) -> str:
    if not spec.zero_centered:
        return weight
    stored = graph.add("Cast", f"{weight}.float32", weight, to=TensorProto.FLOAT) if wide else weight
    return graph.add("Add", f"{weight}.plus_one", stored, graph.number(1.0, "float32"))


def rotate(graph: Graph, rope: Rope, tables: Tables, x: str, dtype: str, heads: int, head_dim: int) -> str:
    """Rotation in float32 whatever the dtype: cosines rounded to 16 bits would add an error as large as that of
    rounding the result, and both runtimes take the two casts, which fuse with their neighbours on a GPU."""
    attributes = {"interleaved": 1} if rope.interleaved else {}
    if rope.dims != head_dim:
        # ONNX Runtime 1.23 wants num_heads here, although four dimensions tell.
        attributes |= {"rotary_embedding_dim": rope.dims, "num_heads": heads}
    inputs = (tables.cos, tables.sin, "position_ids")
    if dtype == "float32":
        return graph.add("RotaryEmbedding", f"{x}.rotated", x, *inputs, **attributes)
    wide = graph.add("Cast", f"{x}.float32", x, to=TensorProto.FLOAT)
    turned = graph.add("RotaryEmbedding", f"{x}.rotated_float32", wide, *inputs, **attributes)
    return graph.add("Cast", f"{x}.rotated", turned, to=DTYPES[dtype].onnx)


def linear(graph: Graph, name: str, x: str, bias: bool) -> str:
    if not bias:
        return matmul(graph, name, x, f"{name}.weight")
    return graph.add("Add", name, matmul(graph, f"{name}.product", x, f"{name}.weight"), f"{name}.bias")


def matmul(graph: Graph, name: str, x: str, weight: str) -> str:
    if packed := graph.packed(weight):
        return packed.product(graph, name, x)
    return graph.add("MatMul", name, x, graph.add("Transpose", turned(weight), weight, perm=[1, 0]))


def turned(weight: str) -> str:
    """[in, out], as a runtime that folds the Transpose keeps it."""
    return f"{weight}.transposed"


def capped(graph: Graph, name: str, x: str, softcap: float) -> str:
    """softcap * tanh(x / softcap), in float32."""
    bound = graph.number(softcap, "float32")
    x = graph.add("Tanh", f"{name}.tanh", graph.add("Div", f"{name}.by_cap", x, bound))
    return graph.add("Mul", name, x, bound)


def length(graph: Graph, name: str, x: str) -> str:
    """The second axis of [batch, length], as a scalar."""
    shape = graph.add("Shape", f"{name}.axis", x, start=1, end=2)
    return graph.add("Squeeze", name, shape, graph.constant(0))


def whole(graph: Graph, weight: str) -> str:
    """A matrix [out, in] that is not only multiplied with."""
    packed = graph.packed(weight)
    return packed.whole(graph) if packed else weight
