"""A decoder as nodes of ai.onnx, opset 23, kept to the part of it that TensorRT's parser takes.

Past keys and values are joined by Concat, and causality is a mask. Weights are initializers under their canonical
names; they stay [out, in], and a Transpose stands before each MatMul: runtimes fold it when they load, and writing the
file stays a copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from onnx import TensorProto

from nemoport.exporters.targets.onnx.attention import attention
from nemoport.exporters.targets.onnx.blocks import layers
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.exporters.targets.onnx.latent import latent_attention
from nemoport.exporters.targets.onnx.layers import Tables, capped, length, matmul
from nemoport.exporters.targets.onnx.mamba import mamba, turning
from nemoport.exporters.targets.onnx.stages import Stage, mixers_of
from nemoport.spec import Attention, LatentAttention, Mamba, Mixer, ModelSpec, Rope


def decoder(graph: Graph, spec: ModelSpec, stage: Stage, tables: Mapping[Rope, Tables], dtype: str) -> None:
    """From `input_ids` to `logits`, or a stage of that, in `dtype` but for the logits."""
    mixers, head = mixers_of(spec, stage), spec.language_model
    masks, turned = _masks(graph, stage, mixers), turning(graph, mixers)

    def mix(layer: int, mixer: Mixer, x: str) -> str:
        mask = masks[mixer.window]
        match mixer:
            case Attention():
                name = f"layers.{layer}.attn"
                return attention(graph, mixer, spec.norm, name, x, tables, mask, partial(_cached, graph, layer), dtype)
            case LatentAttention():
                return latent_attention(graph, mixer, layer, x, tables[mixer.rope], mask, dtype)
            case Mamba():
                assert turned
                return mamba(graph, mixer, layer, x, turned, dtype)

    x = layers(graph, spec, stage, mix, dtype)
    if not stage.last:
        return
    x = matmul(graph, "head", x, "embed.weight" if head.tied else "head.weight")
    if head.softcap is None:
        graph.add("Cast", "logits", x, to=TensorProto.FLOAT)
    else:
        x = graph.add("Cast", "head.float32", x, to=TensorProto.FLOAT)
        capped(graph, "logits", x, head.softcap)


def _cached(graph: Graph, layer: int, keys: str, values: str) -> tuple[str, str]:
    return (
        graph.add("Concat", f"present.{layer}.key", f"past_key_values.{layer}.key", keys, axis=2),
        graph.add("Concat", f"present.{layer}.value", f"past_key_values.{layer}.value", values, axis=2),
    )


def _masks(graph: Graph, stage: Stage, mixers: Sequence[Mixer]) -> dict[int | None, str]:
    """[batch, 1, sequence, total], true where a query sees a key: one mask for each distinct window.

    Query s stands at key past + s. It sees the keys up to its own that `attention_mask` allows, and always its own,
    so that no row is empty: a padded query attends to itself instead of to nothing, whose softmax is NaN.
    """
    total = length(graph, "mask.total", "attention_mask")
    new = length(graph, "mask.sequence", stage.enters)
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
    for window in dict.fromkeys(mixer.window for mixer in mixers):
        masks[window] = causal
        if window is not None:
            name = f"mask.window_{window}"
            edge = graph.add("Sub", f"{name}.edge", queries, graph.scalar(window))
            near = graph.add("Greater", f"{name}.near", keys, edge)
            masks[window] = graph.add("And", name, causal, near)
    return masks
