"""A decoder as nodes of ai.onnx, opset 23, kept to the part of it that TensorRT's parser takes.

TensorRT takes Attention with four-dimensional inputs and an explicit mask only, so past keys and values are joined by
Concat and causality is a mask. Weights are initializers under their canonical names; they stay [out, in], and a
Transpose stands before each MatMul: runtimes fold it when they load, and writing the file stays a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from onnx import TensorProto

from nemoport.exporters.dtypes import DTYPES
from nemoport.exporters.targets.onnx.experts import mixture
from nemoport.exporters.targets.onnx.feed_forward import feed_forward
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.exporters.targets.onnx.latent import latent_attention
from nemoport.exporters.targets.onnx.layers import (
    HIDDEN,
    SWAP_HEADS_AND_SEQUENCE,
    Tables,
    linear,
    matmul,
    norm,
    rotate,
)
from nemoport.exporters.targets.onnx.mamba import Turning, mamba, turning
from nemoport.spec import Attention, Dense, FeedForward, LatentAttention, Mamba, Mixer, Mixture, ModelSpec, Norm, Rope


def decoder(graph: Graph, spec: ModelSpec, tables: Mapping[Rope, Tables], dtype: str) -> None:
    """From `input_ids` to `logits`, in `dtype` but for the logits."""
    masks = _masks(graph, spec)
    turned = turning(graph, spec)
    x = _embedding(graph, spec, dtype)
    for i, block in enumerate(spec.blocks):
        layer = f"layers.{i}"
        if mixer := block.mixer:
            normed = norm(graph, spec.norm, f"{layer}.attn_norm", x, dtype)
            mixed = _mix(graph, mixer, spec.norm, i, normed, tables, masks[mixer.window], turned, dtype)
            if block.post_norms:
                mixed = norm(graph, spec.norm, f"{layer}.attn_post_norm", mixed, dtype)
            x = graph.add("Add", f"{layer}.attn_residual", x, mixed)
        if block.ffn:
            normed = norm(graph, spec.norm, f"{layer}.ffn_norm", x, dtype)
            fed = _feed(graph, block.ffn, f"{layer}.ffn", normed, dtype)
            if block.post_norms:
                fed = norm(graph, spec.norm, f"{layer}.ffn_post_norm", fed, dtype)
            x = graph.add("Add", f"{layer}.ffn_residual", x, fed)
    x = norm(graph, spec.norm, "norm", x, dtype)
    x = matmul(graph, "head", x, "embed.weight" if spec.head.tied else "head.weight")
    if spec.head.softcap is None:
        graph.add("Cast", "logits", x, to=TensorProto.FLOAT)
    else:
        x = graph.add("Cast", "head.float32", x, to=TensorProto.FLOAT)
        _capped(graph, "logits", x, spec.head.softcap)


def _mix(
    graph: Graph,
    mixer: Mixer,
    kind: Norm,
    layer: int,
    x: str,
    tables: Mapping[Rope, Tables],
    mask: str,
    turned: Turning | None,
    dtype: str,
) -> str:
    """x [batch, sequence, hidden] to the same shape; `kind` is the model's norm."""
    match mixer:
        case Attention():
            return _attention(graph, mixer, kind, layer, x, tables, mask, dtype)
        case LatentAttention():
            return latent_attention(graph, mixer, layer, x, tables[mixer.rope], mask, dtype)
        case Mamba():
            assert turned
            return mamba(graph, mixer, layer, x, turned, dtype)


def _embedding(graph: Graph, spec: ModelSpec, dtype: str) -> str:
    x = graph.add("Gather", "embed", "embed.weight", "input_ids")
    if spec.embedding_scale is not None:
        x = graph.add("Mul", "embed.scaled", x, graph.number(spec.embedding_scale, dtype))
    if spec.learned_positions:
        rows = graph.add("Gather", "positions", "positions.weight", "position_ids")
        x = graph.add("Add", "embed.placed", x, rows)
    return x


def _capped(graph: Graph, name: str, x: str, softcap: float) -> str:
    """softcap * tanh(x / softcap), in float32."""
    bound = graph.number(softcap, "float32")
    x = graph.add("Tanh", f"{name}.tanh", graph.add("Div", f"{name}.by_cap", x, bound))
    return graph.add("Mul", name, x, bound)


def _masks(graph: Graph, spec: ModelSpec) -> dict[int | None, str]:
    """[batch, 1, sequence, total], true where a query sees a key: one mask for each distinct window.

    Query s stands at key past + s. It sees the keys up to its own that `attention_mask` allows, and always its own,
    so that no row is empty: a padded query attends to itself instead of to nothing, whose softmax is NaN.
    """
    total = _length(graph, "mask.total", "attention_mask")
    new = _length(graph, "mask.sequence", "input_ids")
    past = graph.add("Sub", "mask.past", total, new)
    keys = graph.add("Range", "mask.keys", graph.scalar(0), total, graph.scalar(1))
    rows = graph.add("Range", "mask.rows", past, total, graph.scalar(1))
    queries = graph.add("Unsqueeze", "mask.queries", rows, graph.constant(1))
    real = graph.add("Cast", "mask.real", "attention_mask", to=TensorProto.BOOL)
    real = graph.add("Unsqueeze", "mask.real_keys", real, graph.constant(1, 2))
    own = graph.add("Equal", "mask.own", keys, queries)
    real_or_own = graph.add("Or", "mask.real_or_own", real, own)
    before = graph.add("LessOrEqual", "mask.before", keys, queries)
    causal = graph.add("And", "mask.causal", real_or_own, before)
    masks: dict[int | None, str] = {}
    for window in dict.fromkeys(mixer.window for mixer in spec.mixers):
        masks[window] = causal
        if window is not None:
            name = f"mask.window_{window}"
            edge = graph.add("Sub", f"{name}.edge", queries, graph.scalar(window))
            near = graph.add("Greater", f"{name}.near", keys, edge)
            masks[window] = graph.add("And", name, causal, near)
    return masks


def _length(graph: Graph, name: str, x: str) -> str:
    """The second axis of [batch, length], as a scalar."""
    shape = graph.add("Shape", f"{name}.axis", x, start=1, end=2)
    return graph.add("Squeeze", name, shape, graph.constant(0))


def _heads(graph: Graph, attention: Attention, kind: Norm, name: str, x: str, count: int, dtype: str) -> str:
    """Queries, keys or values, [batch, count, sequence, head_dim]."""
    x = linear(graph, name, x, attention.qkv_bias)
    x = graph.add("Reshape", f"{name}.heads", x, graph.constant(0, 0, count, attention.head_dim))
    if attention.qk_norm and not name.endswith(".v"):
        x = norm(graph, replace(kind, kind="rms"), f"{name}_norm", x, dtype)
    return graph.add("Transpose", f"{name}.heads_first", x, perm=SWAP_HEADS_AND_SEQUENCE)


def _attention(
    graph: Graph,
    attention: Attention,
    kind: Norm,
    layer: int,
    x: str,
    tables: Mapping[Rope, Tables],
    mask: str,
    dtype: str,
) -> str:
    name, rope = f"layers.{layer}.attn", attention.rope
    q, k, v = (
        _heads(graph, attention, kind, f"{name}.{part}", x, count, dtype)
        for part, count in (("q", attention.heads), ("k", attention.kv_heads), ("v", attention.kv_heads))
    )
    if rope:
        q = rotate(graph, rope, tables[rope], q, dtype, attention.heads, attention.head_dim)
        k = rotate(graph, rope, tables[rope], k, dtype, attention.kv_heads, attention.head_dim)
    k = graph.add("Concat", f"present.{layer}.key", f"past_key_values.{layer}.key", k, axis=2)
    v = graph.add("Concat", f"present.{layer}.value", f"past_key_values.{layer}.value", v, axis=2)
    if attention.softcap is None and not attention.sinks:
        # No softmax_precision: CUDA kernels compute the softmax in float32 anyway, and their early releases refuse it.
        scale = {} if attention.scale is None else {"scale": attention.scale}
        x = graph.add("Attention", f"{name}.mixed", q, k, v, mask, **scale)
    else:
        x = _spelt_out(graph, attention, name, q, k, v, mask, dtype)
    x = graph.add("Transpose", f"{name}.sequence_first", x, perm=SWAP_HEADS_AND_SEQUENCE)
    x = graph.add("Reshape", f"{name}.joined", x, graph.constant(0, 0, attention.heads * attention.head_dim))
    return linear(graph, f"{name}.o", x, attention.out_bias)


def _spelt_out(graph: Graph, attention: Attention, name: str, q: str, k: str, v: str, mask: str, dtype: str) -> str:
    """Attention whose operator knows no sinks, and in TensorRT's parser no `softcap`; scores in float32. The queries
    of a KV head lie one below the other, [batch, kv_heads, queries * sequence, ...], so that keys and values are not
    repeated."""
    stacked = graph.constant(0, attention.kv_heads, -1, attention.head_dim)
    by_head = graph.constant(0, attention.heads, -1, attention.head_dim)
    total = graph.add("Shape", f"{name}.total", k, start=2, end=3)

    by_heads, by_kv_heads = (
        graph.add("Concat", f"{name}.by_{what}", graph.constant(0, count, -1), total, axis=0)
        for what, count in (("heads", attention.heads), ("kv_heads", attention.kv_heads))
    )
    scale = attention.head_dim**-0.5 if attention.scale is None else attention.scale
    q = graph.add("Reshape", f"{name}.q.stacked", q, stacked)
    turned = graph.add("Transpose", f"{name}.k.turned", k, perm=[0, 1, 3, 2])
    x = graph.add("MatMul", f"{name}.products", q, turned)
    x = graph.add("Cast", f"{name}.products.float32", x, to=TensorProto.FLOAT)
    x = graph.add("Mul", f"{name}.scores", x, graph.number(scale, "float32"))
    if attention.softcap is not None:
        x = _capped(graph, f"{name}.capped", x, attention.softcap)
    x = graph.add("Reshape", f"{name}.scores_by_head", x, by_heads)
    x = graph.add("Where", f"{name}.masked", mask, x, graph.number(HIDDEN, "float32"))
    if attention.sinks:
        x = _with_sinks(graph, attention.heads, name, x)
    else:
        x = graph.add("Softmax", f"{name}.shares", x, axis=-1)
    x = graph.add("Reshape", f"{name}.shares_stacked", x, by_kv_heads)
    x = graph.add("Cast", f"{name}.shares_cast", x, to=DTYPES[dtype].onnx)
    x = graph.add("MatMul", f"{name}.mixed_stacked", x, v)
    return graph.add("Reshape", f"{name}.mixed", x, by_head)


def _feed(graph: Graph, ffn: FeedForward, name: str, x: str, dtype: str) -> str:
    match ffn:
        case Dense():
            return feed_forward(graph, ffn, name, x, dtype)
        case Mixture():
            return mixture(graph, ffn, name, x, dtype)


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
