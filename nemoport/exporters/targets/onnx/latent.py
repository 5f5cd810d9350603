"""Latent attention as nodes, in the form that never makes the keys and values of the past (arXiv:2405.04434, section
2.1.2): a head's `k_up` is applied to its query instead, and its `v_up` to what it has mixed of the latents.

    scores = [q_i k_up_i; rope(q_i)] . [latent; k_rope]        mixed = v_up_i (shares latent)

So all heads look at one key, which is the state, and at one value, the state without its rotated part.
"""

from __future__ import annotations

from onnx import TensorProto

from nemoport.exporters.dtypes import DTYPES
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.exporters.targets.onnx.layers import HIDDEN, SWAP_HEADS_AND_SEQUENCE, Tables, linear, norm, rotate, whole
from nemoport.spec import LatentAttention, Norm

WHOLE = (".k_up.weight", ".v_up.weight")
"""How the weights are called that are cut into heads, not only multiplied with."""


def latent_attention(
    graph: Graph, mixer: LatentAttention, layer: int, x: str, tables: Tables, mask: str, dtype: str
) -> str:
    """x [batch, sequence, hidden] to the same shape. The state is [batch, 1, positions, kv_rank + rope.dims]."""
    name, heads = f"layers.{layer}.attn", mixer.heads
    q = _queries(graph, mixer, name, x, tables, dtype)
    new = _new_state(graph, mixer, name, x, tables, dtype)
    state = graph.add("Concat", f"present.{layer}.latent", f"past_key_values.{layer}.latent", new, axis=2)
    x = _mixed(graph, mixer, name, q, state, mask, dtype)
    v = whole(graph, f"{name}.v_up.weight")
    v = graph.add("Reshape", f"{name}.v_up.by_head", v, graph.constant(heads, mixer.v_dims, -1))
    v = graph.add("Transpose", f"{name}.v_up.turned", v, perm=[0, 2, 1])
    x = graph.add("MatMul", f"{name}.mixed", x, v)
    x = graph.add("Transpose", f"{name}.sequence_first", x, perm=SWAP_HEADS_AND_SEQUENCE)
    x = graph.add("Reshape", f"{name}.joined", x, graph.constant(0, 0, heads * mixer.v_dims))
    return linear(graph, f"{name}.o", x, False)


def _queries(graph: Graph, mixer: LatentAttention, name: str, x: str, tables: Tables, dtype: str) -> str:
    """[batch, heads, sequence, kv_rank + rope.dims]."""
    if mixer.q_rank is None:
        x = linear(graph, f"{name}.q", x, False)
    else:
        x = norm(graph, Norm(eps=mixer.norm_eps), f"{name}.q_norm", linear(graph, f"{name}.q_down", x, False), dtype)
        x = linear(graph, f"{name}.q_up", x, False)
    x = graph.add("Reshape", f"{name}.q.heads", x, graph.constant(0, 0, mixer.heads, mixer.q_dims))
    x = graph.add("Transpose", f"{name}.q.heads_first", x, perm=SWAP_HEADS_AND_SEQUENCE)
    still = _part(graph, f"{name}.q.still", x, 0, mixer.nope_dims)
    turned = _part(graph, f"{name}.q.rope", x, mixer.nope_dims, mixer.q_dims)
    k = whole(graph, f"{name}.k_up.weight")
    k = graph.add("Reshape", f"{name}.k_up.by_head", k, graph.constant(mixer.heads, mixer.nope_dims, -1))
    still = graph.add("MatMul", f"{name}.q.over_latent", still, k)
    turned = rotate(graph, mixer.rope, tables, turned, dtype, mixer.heads, mixer.rope.dims)
    return graph.add("Concat", f"{name}.q.whole", still, turned, axis=-1)


def _new_state(graph: Graph, mixer: LatentAttention, name: str, x: str, tables: Tables, dtype: str) -> str:
    down = linear(graph, f"{name}.kv_down", x, False)
    latent = norm(graph, Norm(eps=mixer.norm_eps), f"{name}.kv_norm", down, dtype)
    latent, key = (
        graph.add("Unsqueeze", f"{name}.{part}.as_head", each, graph.constant(1))
        for part, each in (("latent", latent), ("k_rope", linear(graph, f"{name}.k_rope", x, False)))
    )
    key = rotate(graph, mixer.rope, tables, key, dtype, 1, mixer.rope.dims)
    return graph.add("Concat", f"{name}.new", latent, key, axis=-1)


def _mixed(graph: Graph, mixer: LatentAttention, name: str, q: str, state: str, mask: str, dtype: str) -> str:
    """What each head mixes of the latents, [batch, heads, sequence, kv_rank]. Spelt out, since runtimes differ in
    whether Attention takes values that are narrower than keys; scores in float32. The queries of all heads lie one
    below the other, so that the state is read once."""
    size = mixer.kv_rank + mixer.rope.dims
    total = graph.add("Shape", f"{name}.total", state, start=2, end=3)
    by_head = graph.add("Concat", f"{name}.by_head", graph.constant(0, mixer.heads, -1), total, axis=0)
    as_one = graph.add("Concat", f"{name}.as_one", graph.constant(0, 1, -1), total, axis=0)
    q = graph.add("Reshape", f"{name}.q.as_one", q, graph.constant(0, 1, -1, size))
    keys = graph.add("Transpose", f"{name}.state.turned", state, perm=[0, 1, 3, 2])
    x = graph.add("MatMul", f"{name}.products", q, keys)
    x = graph.add("Cast", f"{name}.products.float32", x, to=TensorProto.FLOAT)
    x = graph.add("Mul", f"{name}.scores", x, graph.number(mixer.scale, "float32"))
    x = graph.add("Reshape", f"{name}.scores.by_head", x, by_head)
    x = graph.add("Where", f"{name}.masked", mask, x, graph.number(HIDDEN, "float32"))
    x = graph.add("Softmax", f"{name}.shares", x, axis=-1)
    x = graph.add("Cast", f"{name}.shares_cast", x, to=DTYPES[dtype].onnx)
    x = graph.add("Reshape", f"{name}.shares.as_one", x, as_one)
    latents = _part(graph, f"{name}.state.latents", state, 0, mixer.kv_rank)
    x = graph.add("MatMul", f"{name}.mixed_latents.as_one", x, latents)
    return graph.add("Reshape", f"{name}.mixed_latents", x, graph.constant(0, mixer.heads, -1, mixer.kv_rank))


def _part(graph: Graph, name: str, x: str, start: int, stop: int) -> str:
    """x[..., start:stop]."""
    return graph.add("Slice", name, x, graph.constant(start), graph.constant(stop), graph.constant(-1))
