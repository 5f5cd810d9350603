"""Attention over heads of queries, keys and values as nodes.

TensorRT takes Attention with four-dimensional inputs and an explicit mask only, so whatever a query may not see is said
by the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from onnx import TensorProto

from nemoport.exporters.dtypes import DTYPES
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.exporters.targets.onnx.layers import (
    HIDDEN,
    SWAP_HEADS_AND_SEQUENCE,
    Tables,
    capped,
    linear,
    norm,
    rotate,
)
from nemoport.spec import Attention, Norm, Rope

Extend = Callable[[str, str], tuple[str, str]]
"""Keys and values of these tokens to those of all that are looked at, [batch, kv_heads, total, head_dim]."""


def attention(
    graph: Graph,
    mixer: Attention,
    kind: Norm,
    name: str,
    x: str,
    tables: Mapping[Rope, Tables],
    mask: str,
    extend: Extend,
    dtype: str,
) -> str:
    """x [batch, sequence, hidden] to the same shape; `kind` is the model's norm."""
    q, k, v = (
        _heads(graph, mixer, kind, f"{name}.{part}", x, count, dtype)
        for part, count in (("q", mixer.heads), ("k", mixer.kv_heads), ("v", mixer.kv_heads))
    )
    if rope := mixer.rope:
        q = rotate(graph, rope, tables[rope], q, dtype, mixer.heads, mixer.head_dim)
        k = rotate(graph, rope, tables[rope], k, dtype, mixer.kv_heads, mixer.head_dim)
    k, v = extend(k, v)
    if mixer.softcap is None and not mixer.sinks:
        # No softmax_precision: CUDA kernels compute the softmax in float32 anyway, and their early releases refuse it.
        scale = {} if mixer.scale is None else {"scale": mixer.scale}
        x = graph.add("Attention", f"{name}.mixed", q, k, v, mask, **scale)
    else:
        x = _spelt_out(graph, mixer, name, q, k, v, mask, dtype)
    x = graph.add("Transpose", f"{name}.sequence_first", x, perm=SWAP_HEADS_AND_SEQUENCE)
    x = graph.add("Reshape", f"{name}.joined", x, graph.constant(0, 0, mixer.heads * mixer.head_dim))
    return linear(graph, f"{name}.o", x, mixer.out_bias)


def _heads(graph: Graph, mixer: Attention, kind: Norm, name: str, x: str, count: int, dtype: str) -> str:
    """Queries, keys or values, [batch, count, sequence, head_dim]."""
    x = linear(graph, name, x, mixer.qkv_bias)
    x = graph.add("Reshape", f"{name}.heads", x, graph.constant(0, 0, count, mixer.head_dim))
    if mixer.qk_norm and not name.endswith(".v"):
        x = norm(graph, replace(kind, kind="rms"), f"{name}_norm", x, dtype)
    return graph.add("Transpose", f"{name}.heads_first", x, perm=SWAP_HEADS_AND_SEQUENCE)


def _spelt_out(graph: Graph, mixer: Attention, name: str, q: str, k: str, v: str, mask: str, dtype: str) -> str:
    """Attention whose operator knows no sinks, and in TensorRT's parser no `softcap`; scores in float32. The queries
    of a KV head lie one below the other, [batch, kv_heads, queries * sequence, ...], so that keys and values are not
    repeated."""
    stacked = graph.constant(0, mixer.kv_heads, -1, mixer.head_dim)
    by_head = graph.constant(0, mixer.heads, -1, mixer.head_dim)
    total = graph.add("Shape", f"{name}.total", k, start=2, end=3)

    by_heads, by_kv_heads = (
        graph.add("Concat", f"{name}.by_{what}", graph.constant(0, count, -1), total, axis=0)
        for what, count in (("heads", mixer.heads), ("kv_heads", mixer.kv_heads))
    )
    scale = mixer.head_dim**-0.5 if mixer.scale is None else mixer.scale
    q = graph.add("Reshape", f"{name}.q.stacked", q, stacked)
    turned = graph.add("Transpose", f"{name}.k.turned", k, perm=[0, 1, 3, 2])
    x = graph.add("MatMul", f"{name}.products", q, turned)
    x = graph.add("Cast", f"{name}.products.float32", x, to=TensorProto.FLOAT)
    x = graph.add("Mul", f"{name}.scores", x, graph.number(scale, "float32"))
    if mixer.softcap is not None:
        x = capped(graph, f"{name}.capped", x, mixer.softcap)
    x = graph.add("Reshape", f"{name}.scores_by_head", x, by_heads)
    x = graph.add("Where", f"{name}.masked", mask, x, graph.number(HIDDEN, "float32"))
    shares = f"{name}.shares"
    x = _with_sinks(graph, mixer.heads, name, x) if mixer.sinks else graph.add("Softmax", shares, x, axis=-1)
    x = graph.add("Reshape", f"{name}.shares_stacked", x, by_kv_heads)
    x = graph.add("Cast", f"{name}.shares_cast", x, to=DTYPES[dtype].onnx)
    x = graph.add("MatMul", f"{name}.mixed_stacked", x, v)
    return graph.add("Reshape", f"{name}.mixed", x, by_head)


def _with_sinks(graph: Graph, heads: int, name: str, scores: str) -> str:
    """The softmax of [batch, heads, sequence, total] with one more score for each head, whose share goes nowhere."""
    sinks = graph.add("Cast", f"{name}.sinks.float32", f"{name}.sinks", to=TensorProto.FLOAT)
    sinks = graph.add("Reshape", f"{name}.sinks.by_head", sinks, graph.constant(heads, 1, 1))
    highest = graph.add("ReduceMax", f"{name}.highest", scores, graph.constant(-1), keepdims=1)
    highest = graph.add("Max", f"{name}.highest_of_all", highest, sinks)
    parts = graph.add("Exp", f"{name}.parts", graph.add("Sub", f"{name}.below", scores, highest))
    lost = graph.add("Exp", f"{name}.lost", graph.add("Sub", f"{name}.sinks.below", sinks, highest))
    total = graph.add("ReduceSum", f"{name}.kept", parts, graph.constant(-1), keepdims=1)
    total = graph.add("Add", f"{name}.kept_and_lost", total, lost)
    return graph.add("Div", f"{name}.shares", parts, total)
