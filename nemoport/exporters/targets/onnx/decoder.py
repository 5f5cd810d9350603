"""A decoder as nodes of ai.onnx, opset 23, kept to the part of it that TensorRT's parser takes.

TensorRT takes Attention with four-dimensional inputs and an explicit mask only, so past keys and values are joined by
Concat and causality is a mask. Weights are initializers under their canonical names; they stay [out, in], and a
Transpose stands before each MatMul: runtimes fold it when they load, and writing the file stays a copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnx import TensorProto

from nemoport.exporters.dtypes import DTYPES
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.spec import Attention, Dense, ModelSpec, Norm, Rope

SWAP_HEADS_AND_SEQUENCE = [0, 2, 1, 3]


@dataclass(frozen=True)
class Tables:
    """The initializers that hold a rope's cosines and sines."""

    cos: str
    sin: str


def decoder(graph: Graph, spec: ModelSpec, tables: Mapping[Rope, Tables], dtype: str) -> None:
    """From `input_ids` to `logits`, in `dtype` but for the logits."""
    masks = _masks(graph, spec)
    x = graph.add("Gather", "embed", "embed.weight", "input_ids")
    for i, block in enumerate(spec.blocks):
        layer, mixer = f"layers.{i}", block.mixer
        normed = _norm(graph, spec.norm, f"{layer}.attn_norm", x)
        q, k, v = (
            _heads(graph, mixer, spec.norm.eps, f"{layer}.attn.{part}", normed, count)
            for part, count in (("q", mixer.heads), ("k", mixer.kv_heads), ("v", mixer.kv_heads))
        )
        if mixer.rope:
            q = _rotate(graph, mixer.rope, tables[mixer.rope], q, dtype, mixer.heads, mixer.head_dim)
            k = _rotate(graph, mixer.rope, tables[mixer.rope], k, dtype, mixer.kv_heads, mixer.head_dim)
        k = graph.add("Concat", f"present.{i}.key", f"past_key_values.{i}.key", k, axis=2)
        v = graph.add("Concat", f"present.{i}.value", f"past_key_values.{i}.value", v, axis=2)
        mixed = _attention(graph, mixer, f"{layer}.attn", q, k, v, masks[mixer.window])
        x = graph.add("Add", f"{layer}.attn_residual", x, mixed)
        normed = _norm(graph, spec.norm, f"{layer}.ffn_norm", x)
        x = graph.add("Add", f"{layer}.ffn_residual", x, _ffn(graph, block.ffn, f"{layer}.ffn", normed))
    x = _norm(graph, spec.norm, "norm", x)
    x = _matmul(graph, "head", x, "embed.weight" if spec.head.tied else "head.weight")
    graph.add("Cast", "logits", x, to=TensorProto.FLOAT)


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
    for window in dict.fromkeys(block.mixer.window for block in spec.blocks):
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


def _norm(graph: Graph, norm: Norm, name: str, x: str) -> str:
    if norm.kind == "rms":
        return _rms(graph, norm.eps, name, x)
    weights = (f"{name}.weight", f"{name}.bias")
    return graph.add("LayerNormalization", name, x, *weights, axis=-1, epsilon=norm.eps, stash_type=TensorProto.FLOAT)


def _rms(graph: Graph, eps: float, name: str, x: str) -> str:
    """Computed in float32 whatever the dtype: that is what `stash_type` says."""
    return graph.add("RMSNormalization", name, x, f"{name}.weight", axis=-1, epsilon=eps, stash_type=TensorProto.FLOAT)


def _heads(graph: Graph, attention: Attention, eps: float, name: str, x: str, count: int) -> str:
    """Queries, keys or values, [batch, count, sequence, head_dim]."""
    x = _linear(graph, name, x, attention.qkv_bias)
    x = graph.add("Reshape", f"{name}.heads", x, graph.constant(0, 0, count, attention.head_dim))
    if attention.qk_norm and not name.endswith(".v"):
        x = _rms(graph, eps, f"{name}_norm", x)
    return graph.add("Transpose", f"{name}.heads_first", x, perm=SWAP_HEADS_AND_SEQUENCE)


def _rotate(graph: Graph, rope: Rope, tables: Tables, x: str, dtype: str, heads: int, head_dim: int) -> str:
    """Rotation in float32 whatever the dtype: cosines rounded to 16 bits would add an error as large as that of
    rounding the result, and both runtimes take the two casts, which fuse with their neighbours on a GPU."""
    attributes = {}
    if rope.dims != head_dim:
        # ONNX Runtime 1.23 wants num_heads here, although four dimensions tell.
        attributes = {"rotary_embedding_dim": rope.dims, "num_heads": heads}
    inputs = (tables.cos, tables.sin, "position_ids")
    if dtype == "float32":
        return graph.add("RotaryEmbedding", f"{x}.rotated", x, *inputs, **attributes)
    wide = graph.add("Cast", f"{x}.float32", x, to=TensorProto.FLOAT)
    turned = graph.add("RotaryEmbedding", f"{x}.rotated_float32", wide, *inputs, **attributes)
    return graph.add("Cast", f"{x}.rotated", turned, to=DTYPES[dtype].onnx)


def _attention(graph: Graph, attention: Attention, name: str, q: str, k: str, v: str, mask: str) -> str:
    # No softmax_precision: CUDA kernels compute the softmax in float32 anyway, and their early releases refuse it.
    x = graph.add("Attention", f"{name}.mixed", q, k, v, mask)
    x = graph.add("Transpose", f"{name}.sequence_first", x, perm=SWAP_HEADS_AND_SEQUENCE)
    x = graph.add("Reshape", f"{name}.joined", x, graph.constant(0, 0, attention.heads * attention.head_dim))
    return _linear(graph, f"{name}.o", x, attention.out_bias)


def _ffn(graph: Graph, ffn: Dense, name: str, x: str) -> str:
    up = _linear(graph, f"{name}.up", x, ffn.bias)
    gate = _linear(graph, f"{name}.gate", x, ffn.bias) if ffn.gated else up
    x = graph.add("Mul", f"{name}.silu", gate, graph.add("Sigmoid", f"{name}.sigmoid", gate))
    if ffn.gated:
        x = graph.add("Mul", f"{name}.gated", x, up)
    return _linear(graph, f"{name}.down", x, ffn.bias)


def _linear(graph: Graph, name: str, x: str, bias: bool) -> str:
    if not bias:
        return _matmul(graph, name, x, f"{name}.weight")
    return graph.add("Add", name, _matmul(graph, f"{name}.product", x, f"{name}.weight"), f"{name}.bias")


def _matmul(graph: Graph, name: str, x: str, weight: str) -> str:
    return graph.add("MatMul", name, x, graph.add("Transpose", f"{weight}.transposed", weight, perm=[1, 0]))
