"""What decoders and encoders share: embeddings, layers, the last norm, and where a stage begins and ends. What mixes
tokens is given."""

from __future__ import annotations

from collections.abc import Callable

from nemoport.exporters.targets.onnx.experts import mixture
from nemoport.exporters.targets.onnx.feed_forward import feed_forward
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.exporters.targets.onnx.layers import norm
from nemoport.exporters.targets.onnx.stages import Stage, hidden
from nemoport.spec import Dense, FeedForward, Mixer, Mixture, ModelSpec

Mix = Callable[[int, Mixer, str], str]
"""The mixer of a layer, by its number: x [batch, sequence, hidden] to the same shape."""


def layers(graph: Graph, spec: ModelSpec, stage: Stage, mix: Mix, dtype: str) -> str:
    """A stage from what enters it to what leaves it, [batch, sequence, hidden]; of the last one after the last norm."""
    x = _embedding(graph, spec, dtype) if stage.first else stage.enters
    for i in stage.layers:
        x = _layer(graph, spec, i, x, mix, dtype)
    if not stage.last:
        return graph.add("Identity", hidden(stage.layers.stop), x)
    return norm(graph, spec.norm, "norm", x, dtype) if spec.final_norm else x


def _embedding(graph: Graph, spec: ModelSpec, dtype: str) -> str:
    x = graph.add("Gather", "embed", "embed.weight", "input_ids")
    if spec.embedding_scale is not None:
        x = graph.add("Mul", "embed.scaled", x, graph.number(spec.embedding_scale, dtype))
    if spec.learned_positions:
        rows = graph.add("Gather", "positions", "positions.weight", "position_ids")
        x = graph.add("Add", "embed.placed", x, rows)
    if spec.token_types > 1:
        rows = graph.add("Gather", "token_types", "token_types.weight", "token_type_ids")
        x = graph.add("Add", "embed.typed", x, rows)
    elif spec.token_types:
        x = graph.add("Add", "embed.typed", x, "token_types.weight")
    return norm(graph, spec.norm, "embed_norm", x, dtype) if spec.embedding_norm else x


def _layer(graph: Graph, spec: ModelSpec, i: int, x: str, mix: Mix, dtype: str) -> str:
    block, layer = spec.blocks[i], f"layers.{i}"
    if mixer := block.mixer:
        seen = x if block.norm_after else norm(graph, spec.norm, f"{layer}.attn_norm", x, dtype)
        mixed = mix(i, mixer, seen)
        if block.post_norms:
            mixed = norm(graph, spec.norm, f"{layer}.attn_post_norm", mixed, dtype)
        x = graph.add("Add", f"{layer}.attn_residual", x, mixed)
        x = norm(graph, spec.norm, f"{layer}.attn_norm", x, dtype) if block.norm_after else x
    if block.ffn:
        seen = x if block.norm_after else norm(graph, spec.norm, f"{layer}.ffn_norm", x, dtype)
        fed = _feed(graph, block.ffn, f"{layer}.ffn", seen, dtype)
        if block.post_norms:
            fed = norm(graph, spec.norm, f"{layer}.ffn_post_norm", fed, dtype)
        x = graph.add("Add", f"{layer}.ffn_residual", x, fed)
        x = norm(graph, spec.norm, f"{layer}.ffn_norm", x, dtype) if block.norm_after else x
    return x


def _feed(graph: Graph, ffn: FeedForward, name: str, x: str, dtype: str) -> str:
    match ffn:
        case Dense():
            return feed_forward(graph, ffn, name, x, dtype)
        case Mixture():
            return mixture(graph, ffn, name, x, dtype)
