"""Mamba-2 as nodes: all positions of a step at once, in the dual form (arXiv:2405.21060, section 5).

With `sum` the running sum of -exp(a_log) dt, a step of the recurrence from the state before it is

    y_l = exp(sum_l) c_l S + sum over s <= l of exp(sum_l - sum_s) (c_l . b_s) dt_s x_s + d x_l

which is attention with a decaying mask, and costs as much memory: feed long prompts in pieces. In float32, as S is.
Padding leaves the state alone: tokens are turned so that the real ones stand last, behind what the convolution still
knows of the steps before, and the steps of padding are nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from onnx import TensorProto

from nemoport.exporters.dtypes import DTYPES
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.exporters.targets.onnx.layers import HIDDEN, linear
from nemoport.spec import Mamba, Mixer

_PARTS = ("x", "b", "c")


@dataclass(frozen=True)
class Turning:
    """How the tokens of a step are turned, the same in all layers. Shapes [batch, sequence] and scalars."""

    real: str
    """1.0 at real tokens."""
    order: str
    """Which token stands at each place: padding first."""
    back: str
    """At which place each token stands."""
    padding: str
    """[batch, 1]: how many are no tokens."""
    causal: str
    """[sequence, sequence]: places that come no later."""


def turning(graph: Graph, mixers: Sequence[Mixer]) -> Turning | None:
    """Needs the values of `mask` in the graph; None where no layer is of this kind."""
    if not any(isinstance(mixer, Mamba) for mixer in mixers):
        return None
    start = graph.add("Unsqueeze", "step.start", "mask.past", graph.constant(0))
    ended = graph.add("Shape", "step.end", "attention_mask", start=1, end=2)
    mask = graph.add("Slice", "step.mask", "attention_mask", start, ended, graph.constant(1))
    absent = graph.add("Sub", "step.absent", graph.constant(1), mask)
    padding = graph.add("ReduceSum", "step.padding", absent, graph.constant(1), keepdims=1)
    among_real = graph.add("Add", "step.real_places", _summed(graph, "step.reals", mask), padding)
    among_padding = _summed(graph, "step.padding_places", absent)
    is_real = graph.add("Cast", "step.is_real", mask, to=TensorProto.BOOL)
    places = graph.add("Where", "step.places_from_1", is_real, among_real, among_padding)
    back = graph.add("Sub", "step.back", places, graph.constant(1))
    numbers = graph.add("Range", "step.numbers", graph.scalar(0), "mask.sequence", graph.scalar(1))
    each = graph.add("Expand", "step.each", numbers, graph.add("Shape", "step.shape", mask))
    order = graph.add("ScatterElements", "step.order", each, back, each, axis=1)
    later = graph.add("Unsqueeze", "step.later", numbers, graph.constant(1))
    return Turning(
        real=graph.add("Cast", "step.real", mask, to=TensorProto.FLOAT),
        order=order,
        back=back,
        padding=padding,
        causal=graph.add("LessOrEqual", "step.causal", numbers, later),
    )


def _summed(graph: Graph, name: str, x: str) -> str:
    """Sums along positions of x [batch, sequence] of 0 and 1; by way of float32, in which TensorRT sums up."""
    numbers = graph.add("Cast", f"{name}.each", x, to=TensorProto.FLOAT)
    sums = graph.add("CumSum", f"{name}.float32", numbers, graph.scalar(1))
    return graph.add("Cast", name, sums, to=TensorProto.INT64)


def mamba(graph: Graph, mixer: Mamba, layer: int, x: str, turned: Turning, dtype: str) -> str:
    """x [batch, sequence, hidden] to the same shape."""
    name, inner = f"layers.{layer}.attn", mixer.heads * mixer.head_dim
    z, u, b, c, dt = (linear(graph, f"{name}.{part}", x, mixer.bias) for part in ("z", *_PARTS, "dt"))
    new = graph.add("Concat", f"{name}.new", u, b, c, axis=2)
    u, b, c = _convolved(graph, mixer, layer, new, turned, dtype)
    step = _steps(graph, name, dt, turned)
    mixed = _scanned(graph, mixer, layer, u, b, c, step, turned)
    y = graph.add("Add", f"{name}.y", mixed, _skipped(graph, mixer, name, u))
    y = graph.add("Reshape", f"{name}.y.joined", y, graph.constant(0, 0, inner))
    y = _gathered(graph, f"{name}.y.back", y, turned.back)
    z = graph.add("Cast", f"{name}.z.float32", z, to=TensorProto.FLOAT)
    y = graph.add("Mul", f"{name}.y.gated", y, _silu(graph, f"{name}.z.silu", z))
    return linear(graph, f"{name}.out", _grouped_norm(graph, mixer, name, y, dtype), mixer.bias)


def _convolved(graph: Graph, mixer: Mamba, layer: int, new: str, turned: Turning, dtype: str) -> tuple[str, str, str]:
    """x [batch, sequence, heads, head_dim], b and c [batch, groups, sequence, state_dims], float32, turned."""
    name, before, kept = f"layers.{layer}.attn", f"past_key_values.{layer}.conv", mixer.kernel - 1
    known = graph.add("Transpose", f"{name}.conv.before", before, perm=[0, 2, 1])
    joined = graph.add("Concat", f"{name}.conv.joined", known, new, axis=1)
    joined = _gathered(graph, f"{name}.conv.turned", joined, _joined_order(graph, turned, kept))
    joined = graph.add("Transpose", f"{name}.conv.channels_first", joined, perm=[0, 2, 1])
    ends, all_ = graph.constant(2**31 - 1), graph.constant(2)
    graph.add("Slice", f"present.{layer}.conv", joined, graph.constant(-kept), ends, all_)
    taps = graph.add("Concat", f"{name}.conv.weight", *(f"{name}.conv_{part}.weight" for part in _PARTS), axis=0)
    inputs = [joined, taps]
    if mixer.conv_bias:
        biases = (f"{name}.conv_{part}.bias" for part in _PARTS)
        inputs.append(graph.add("Concat", f"{name}.conv.bias", *biases, axis=0))
    x = graph.add("Conv", f"{name}.conv", *inputs, group=mixer.channels, kernel_shape=[mixer.kernel])
    x = graph.add("Cast", f"{name}.conv.float32", x, to=TensorProto.FLOAT)
    x = graph.add("Transpose", f"{name}.conv.sequence_first", _silu(graph, f"{name}.conv.silu", x), perm=[0, 2, 1])
    inner, of_group = mixer.heads * mixer.head_dim, mixer.groups * mixer.state_dims
    shapes = {"x": (mixer.heads, mixer.head_dim), "b": (mixer.groups, mixer.state_dims)}
    edges = {"x": (0, inner), "b": (inner, inner + of_group), "c": (inner + of_group, inner + 2 * of_group)}
    parts = []
    for part, (start, stop) in edges.items():
        cut = graph.add(
            "Slice", f"{name}.{part}.convolved", x, graph.constant(start), graph.constant(stop), graph.constant(2)
        )
        parts.append(
            graph.add("Reshape", f"{name}.{part}.parted", cut, graph.constant(0, 0, *shapes.get(part, shapes["b"])))
        )
    u, b, c = parts
    b, c = (graph.add("Transpose", f"{each}.groups_first", each, perm=[0, 2, 1, 3]) for each in (b, c))
    return u, b, c


def _joined_order(graph: Graph, turned: Turning, kept: int) -> str:
    """[batch, kept + sequence]: padding, the inputs kept from before, the real tokens. Made once for each kernel."""
    name = f"step.joined_{kept}"
    if graph.has(name):
        return name
    count = graph.add("Add", f"{name}.count", "mask.sequence", graph.scalar(kept))
    places = graph.add("Range", f"{name}.places", graph.scalar(0), count, graph.scalar(1))
    from_before = graph.add("Sub", f"{name}.before", places, turned.padding)
    from_before = graph.add("Max", f"{name}.before_or_first", from_before, graph.constant(0))
    own = graph.add("Add", f"{name}.own", turned.order, graph.constant(kept))
    own = graph.add("Pad", f"{name}.own_padded", own, graph.constant(0, kept, 0, 0))
    last_before = graph.add("Add", f"{name}.edge", turned.padding, graph.constant(kept))
    is_before = graph.add("Less", f"{name}.is_before", places, last_before)
    return graph.add("Where", name, is_before, from_before, own)


def _steps(graph: Graph, name: str, dt: str, turned: Turning) -> str:
    """softplus(dt + bias) [batch, sequence, heads], float32, turned; nothing at padding."""
    wide = (graph.add("Cast", f"{each}.float32", each, to=TensorProto.FLOAT) for each in (dt, f"{name}.dt_bias"))
    step = graph.add("Softplus", f"{name}.dt.positive", graph.add("Add", f"{name}.dt.biased", *wide))
    real = graph.add("Unsqueeze", f"{name}.real", turned.real, graph.constant(2))
    return _gathered(graph, f"{name}.dt.turned", graph.add("Mul", f"{name}.dt.real", step, real), turned.order)


def _scanned(graph: Graph, mixer: Mamba, layer: int, u: str, b: str, c: str, step: str, turned: Turning) -> str:
    """[batch, sequence, heads, head_dim] without `d x`, and the state after. [b g r l ...]: batch, groups, heads of a
    group, positions."""
    name, group = f"layers.{layer}.attn", (mixer.groups, mixer.heads // mixer.groups)
    a = graph.add("Cast", f"{name}.a_log.float32", f"{name}.a_log", to=TensorProto.FLOAT)
    rate = graph.add("Neg", f"{name}.a", graph.add("Exp", f"{name}.a.positive", a))
    sums = graph.add("CumSum", f"{name}.sums", graph.add("Mul", f"{name}.decay", step, rate), graph.scalar(1))
    sums = graph.add("Transpose", f"{name}.sums.heads_first", sums, perm=[0, 2, 1])
    sums = graph.add("Reshape", f"{name}.sums.grouped", sums, graph.constant(0, *group, -1))
    column = graph.add("Unsqueeze", f"{name}.sums.column", sums, graph.constant(4))
    row = graph.add("Unsqueeze", f"{name}.sums.row", sums, graph.constant(3))
    between = graph.add("Sub", f"{name}.between", column, row)
    between = graph.add("Where", f"{name}.between.causal", turned.causal, between, graph.number(HIDDEN, "float32"))
    fades = graph.add("Exp", f"{name}.fades", between)

    leave = graph.add("Unsqueeze", f"{name}.c.grouped", c, graph.constant(2))
    entry = graph.add("Unsqueeze", f"{name}.b.grouped", b, graph.constant(2))
    entries = graph.add("Transpose", f"{name}.b.turned", entry, perm=[0, 1, 2, 4, 3])
    scores = graph.add("Mul", f"{name}.scores", graph.add("MatMul", f"{name}.c_b", leave, entries), fades)
    sized = graph.add("Unsqueeze", f"{name}.dt.sized", step, graph.constant(3))
    inputs = graph.add("Mul", f"{name}.x.stepped", u, sized)
    inputs = graph.add("Transpose", f"{name}.x.heads_first", inputs, perm=[0, 2, 1, 3])
    inputs = graph.add("Reshape", f"{name}.x.grouped", inputs, graph.constant(0, *group, -1, mixer.head_dim))
    of_step = graph.add("MatMul", f"{name}.of_step", scores, inputs)

    state = graph.add(
        "Reshape",
        f"{name}.state",
        f"past_key_values.{layer}.ssm",
        graph.constant(0, *group, mixer.head_dim, mixer.state_dims),
    )
    turned_state = graph.add("Transpose", f"{name}.state.turned", state, perm=[0, 1, 2, 4, 3])
    of_past = graph.add("MatMul", f"{name}.of_state", leave, turned_state)
    of_past = graph.add("Mul", f"{name}.of_past", of_past, graph.add("Exp", f"{name}.fade", column))
    _new_state(graph, mixer, layer, state, inputs, entry, column)
    y = graph.add("Add", f"{name}.mixed", of_step, of_past)
    y = graph.add("Reshape", f"{name}.mixed.by_head", y, graph.constant(0, mixer.heads, -1, mixer.head_dim))
    return graph.add("Transpose", f"{name}.mixed.sequence_first", y, perm=[0, 2, 1, 3])


def _new_state(graph: Graph, mixer: Mamba, layer: int, state: str, inputs: str, entry: str, sums: str) -> None:
    """S after the last position: what is left of S, and of what each position brought."""
    name = f"layers.{layer}.attn"
    last = graph.add(
        "Slice", f"{name}.sums.last", sums, graph.constant(-1), graph.constant(2**31 - 1), graph.constant(3)
    )
    left = graph.add("Exp", f"{name}.left", graph.add("Sub", f"{name}.until_last", last, sums))
    brought = graph.add("Mul", f"{name}.x.left", inputs, left)
    brought = graph.add("Transpose", f"{name}.x.left.turned", brought, perm=[0, 1, 2, 4, 3])
    brought = graph.add("MatMul", f"{name}.brought", brought, entry)
    old = graph.add("Mul", f"{name}.state.left", state, graph.add("Exp", f"{name}.last", last))
    new = graph.add("Add", f"{name}.state.new", old, brought)
    shape = graph.constant(0, mixer.heads, mixer.head_dim, mixer.state_dims)
    graph.add("Reshape", f"present.{layer}.ssm", new, shape)


def _skipped(graph: Graph, mixer: Mamba, name: str, u: str) -> str:
    d = graph.add("Cast", f"{name}.d.float32", f"{name}.d", to=TensorProto.FLOAT)
    return graph.add("Mul", f"{name}.skipped", u, graph.add("Unsqueeze", f"{name}.d.column", d, graph.constant(1)))


def _grouped_norm(graph: Graph, mixer: Mamba, name: str, x: str, dtype: str) -> str:
    """RMSNorm over the channels of each group; x is float32."""
    inner = mixer.heads * mixer.head_dim
    groups = graph.add("Reshape", f"{name}.norm.groups", x, graph.constant(0, 0, mixer.groups, inner // mixer.groups))
    squares = graph.add("Mul", f"{name}.norm.squares", groups, groups)
    mean = graph.add("ReduceMean", f"{name}.norm.mean", squares, graph.constant(-1), keepdims=1)
    size = graph.add(
        "Sqrt", f"{name}.norm.size", graph.add("Add", f"{name}.norm.eps", mean, graph.number(mixer.norm_eps, "float32"))
    )
    normed = graph.add("Div", f"{name}.norm.normed", groups, size)
    normed = graph.add("Reshape", f"{name}.norm.joined", normed, graph.constant(0, 0, inner))
    weight = graph.add("Cast", f"{name}.norm.weight.float32", f"{name}.norm.weight", to=TensorProto.FLOAT)
    normed = graph.add("Mul", f"{name}.norm.scaled", normed, weight)
    return graph.add("Cast", f"{name}.norm", normed, to=DTYPES[dtype].onnx)


def _silu(graph: Graph, name: str, x: str) -> str:
    return graph.add("Mul", name, x, graph.add("Sigmoid", f"{name}.sigmoid", x))


def _gathered(graph: Graph, name: str, x: str, order: str) -> str:
    """x [batch, positions, channels] with its positions in the order [batch, positions]."""
    index = graph.add("Unsqueeze", f"{name}.index", order, graph.constant(2))
    index = graph.add("Expand", f"{name}.index.each", index, graph.add("Shape", f"{name}.shape", x))
    return graph.add("GatherElements", name, x, index, axis=1)
