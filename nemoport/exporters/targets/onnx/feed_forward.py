"""The dense half of a block as nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.exporters.targets.onnx.layers import linear
from nemoport.spec import Activation, Dense


def feed_forward(graph: Graph, ffn: Dense, name: str, x: str, dtype: str) -> str:
    """x [..., hidden] to the same shape."""
    up = linear(graph, f"{name}.up", x, ffn.bias)
    gate = linear(graph, f"{name}.gate", x, ffn.bias) if ffn.gated else up
    if ffn.limit is not None:
        least, most = graph.number(-ffn.limit, dtype), graph.number(ffn.limit, dtype)
        gate = graph.add("Min", f"{name}.gate.clamped", gate, most)
        up = graph.add("Max", f"{name}.up.clamped", graph.add("Min", f"{name}.up.at_most", up, most), least)
    if ffn.up_offset:
        up = graph.add("Add", f"{name}.up.offset", up, graph.number(ffn.up_offset, dtype))
    x = ACTIVATIONS[ffn.activation](graph, name, gate, dtype)
    if ffn.gated:
        x = graph.add("Mul", f"{name}.gated", x, up)
    return linear(graph, f"{name}.down", x, ffn.bias)


def _silu(graph: Graph, name: str, x: str, dtype: str) -> str:
    return graph.add("Mul", f"{name}.silu", x, graph.add("Sigmoid", f"{name}.sigmoid", x))


def _gelu(graph: Graph, name: str, x: str, dtype: str) -> str:
    return graph.add("Gelu", f"{name}.gelu", x, approximate="none")


def _gelu_tanh(graph: Graph, name: str, x: str, dtype: str) -> str:
    return graph.add("Gelu", f"{name}.gelu", x, approximate="tanh")


def _quick_gelu(graph: Graph, name: str, x: str, dtype: str) -> str:
    steeper = graph.add("Mul", f"{name}.steeper", x, graph.number(1.702, dtype))
    return graph.add("Mul", f"{name}.quick_gelu", x, graph.add("Sigmoid", f"{name}.sigmoid", steeper))


def _relu2(graph: Graph, name: str, x: str, dtype: str) -> str:
    x = graph.add("Relu", f"{name}.relu", x)
    return graph.add("Mul", f"{name}.relu2", x, x)


ACTIVATIONS: Mapping[Activation, Callable[[Graph, str, str, str], str]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu2": _relu2,
}
