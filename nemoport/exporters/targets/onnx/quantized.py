"""Quantized linears as nodes. The numbers lie in the data file as they were rounded, and no runtime need widen them.

    portable   DequantizeLinear, MatMul: ai.onnx. ONNX Runtime makes one MatMulNBits of both when it loads, which keeps
               the numbers packed: of INT4 only as [in, out] (a Transpose between hides it), of INT8 also through one.
               Dynamic INT8 as [in, out] in MatMulInteger, the input rounded by nodes before it.
    ort        MatMulNBits of com.microsoft, as ONNX Runtime keeps it: nothing is repacked at load.

`accuracy_level` 4 rounds the input to INT8 in each block as well, as ONNX Runtime does where it fuses. Its kernel for
8 bits knows no other level: it would widen the weight to float32 in memory (seen in 1.31).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import TensorProto

from nemoport import plugins
from nemoport.errors import UnsupportedInput, UsageError
from nemoport.exporters.checkpoint import Slot
from nemoport.exporters.dequantized import QUANTIZERS
from nemoport.exporters.derived import transpose, viewed
from nemoport.exporters.encoding import FLOATS, NUMBERS, Encoded
from nemoport.exporters.targets.onnx.graph import MICROSOFT, Graph
from nemoport.exporters.targets.onnx.layers import turned
from nemoport.exporters.targets.onnx.packed import Agreed, Blocked, Flipped, Repeated, along_inputs, along_rows, joined
from nemoport.exporters.tensor import LazyTensor, cast
from nemoport.spec import Profile

DIALECT = "onnx"
BLOCKS = (128, 64, 32, 16)
"""The blocks of MatMulNBits that are tried for rows with one scale: the fewer scales the better."""
BESIDE = ("pre_scale", "sum")
"""Fields that some encodings have, and lie there as they are."""
EXPERTS = ".experts."
LEVEL = 4
STEPS, LEAST = 255.0, 1e-30
"""Steps from the least number of a token to its largest, and what one of a token is that has only one number."""
_SIGN, _SIGNS = 0x80, 0x88
Fields = dict[str, LazyTensor]


@dataclass(frozen=True)
class Linear:
    """A quantized weight in a graph, [rows, inputs]."""

    name: str
    shape: tuple[int, ...]
    block: int
    """Inputs that share a scale."""
    layout: Layout
    fields: frozenset[str]

    def initializer(self, field: str) -> str:
        return self.name.removesuffix(NUMBERS) + field

    def product(self, graph: Graph, name: str, x: str) -> str:
        if "pre_scale" in self.fields:
            x = graph.add("Mul", f"{name}.input", x, self.initializer("pre_scale"))
        return self.layout.product(self, graph, name, x)

    def whole(self, graph: Graph) -> str:
        w = self.layout.whole(self, graph)
        if "pre_scale" in self.fields:
            w = graph.add("Mul", f"{self.name}.whole", w, self.initializer("pre_scale"))
        return w


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How an encoding lies in the data file, and the nodes that use it."""

    kind: int
    """Of the numbers, in TensorProto.DataType."""
    place: Callable[[Fields, int], Fields]
    """Weight and scale as they are stored, for a size of blocks."""
    read: Callable[[str, LazyTensor, LazyTensor], Fields]
    """The inverse, of the weight of that name."""
    product: Callable[[Linear, Graph, str, str], str]
    whole: Callable[[Linear, Graph], str]
    """The weight itself, [rows, inputs]."""
    dtypes: tuple[str, ...] = FLOATS
    """Those that its nodes compute in."""
    needs_tokens: bool = False
    """It cannot be of an expert, which may see no token: of those, ONNX Runtime reduces an axis to its own length and
    not to 1 (seen in 1.31)."""


def place(graph: Graph, name: str, tensor: Encoded, dtype: str, profile: Profile) -> None:
    """Its fields as slots, and what then stands for it. Scales have the dtype of the computation."""
    method = tensor.encoding.method
    if (layout := LAYOUTS.get((method, profile))) is None:
        raise UsageError(f"--quantize {method} is written in ONNX's own operators alone; leave --profile {profile} out")
    if dtype not in layout.dtypes:
        only = layout.dtypes[0]
        raise UsageError(f"--quantize {method} computes in {only}, and the graph would in {dtype}; use --dtype {only}")
    if layout.needs_tokens and EXPERTS in name:
        raise UnsupportedInput(
            f"{name} is of an expert, which may see no token, and ONNX Runtime finds no range of none; use --quantize "
            f"int8, or leave experts plain with --exclude '*{EXPERTS}*'"
        )
    said = {each.name for each, _ in tensor.encoding.in_dialect(DIALECT)}
    if lost := sorted(set(tensor.fields) - said):
        raise UnsupportedInput(f"{name} has a {lost[0]}, for which the graph has no place; use --to hf")
    block = tensor.encoding.group or (_block(name, tensor.shape[1]) if profile == "ort" else tensor.shape[1])
    stored = {**tensor.fields, **layout.place(dict(tensor.fields), block)}
    linear = Linear(name, tensor.shape, block, layout, frozenset(stored))
    for field, found in stored.items():
        if field == NUMBERS:
            dims = tensor.shape[::-1] if layout.kind == TensorProto.INT4 else found.shape
            graph.weight(Slot(name, found, (name,)), layout.kind, dims)
        else:
            transform = "" if found.dtype == dtype else f"{field} cast to {dtype}"
            graph.weight(Slot(linear.initializer(field), cast(found, dtype), (name,), transform))
    graph.pack(name, linear)


def _block(name: str, inputs: int) -> int:
    if (found := next((size for size in BLOCKS if inputs % size == 0), None)) is None:
        raise UnsupportedInput(
            f"{name} has {inputs} inputs, and MatMulNBits has blocks of {BLOCKS[-1]} at least; use --profile portable"
        )
    return found


def stored(name: str, shape: tuple[int, ...], kind: int, load: Callable[[str], LazyTensor | None]) -> Encoded | None:
    """A canonical weight read back; None where it is plain. `load` gives the initializer of a name."""
    numbers, linear = load(name), name.removesuffix(NUMBERS)
    scale = load(f"{linear}scale")
    beside = {each: found for each in BESIDE if (found := load(linear + each)) is not None}
    if numbers is None or scale is None or (key := _key(kind, numbers.shape, shape, "sum" in beside)) is None:
        return None
    fields = LAYOUTS[key].read(name, numbers, scale) | beside
    scales = fields["scale"].shape
    group = shape[1] // scales[1] if len(scales) > 1 else None
    return Encoded(name, shape, plugins.load(QUANTIZERS, key[0]).encoding(group), fields)


def _key(kind: int, dims: tuple[int, ...], shape: tuple[int, ...], summed: bool) -> tuple[str, Profile] | None:
    if kind == TensorProto.INT8 and summed:
        return "int8_dynamic", "portable"
    if kind == TensorProto.UINT8 and len(dims) == 3:
        return ("int8", "ort") if dims[1] * dims[2] == shape[1] else ("int4_awq", "ort")
    kinds: dict[int, tuple[str, Profile]] = {
        TensorProto.INT4: ("int4_awq", "portable"),
        TensorProto.INT8: ("int8", "portable"),
    }
    return kinds.get(kind)


def _widened_int4(linear: Linear, graph: Graph) -> str:
    """[inputs, rows]."""
    inputs = linear.name, linear.initializer("scale")
    return graph.add("DequantizeLinear", f"{linear.name}.widened", *inputs, axis=0, block_size=linear.block)


def _widened_int8(linear: Linear, graph: Graph) -> str:
    """[rows, inputs]."""
    return graph.add("DequantizeLinear", f"{linear.name}.widened", linear.name, linear.initializer("scale"), axis=0)


def _widened_columns(linear: Linear, graph: Graph) -> str:
    """[inputs, rows]."""
    return graph.add("DequantizeLinear", f"{linear.name}.widened", linear.name, linear.initializer("scale"), axis=1)


def _dynamic(linear: Linear, graph: Graph, name: str, x: str) -> str:
    """scale (step (codes weight) + least sum), step and least of each token. Linears that read one input have its codes
    in common."""
    codes, step, least = _rounded(graph, x)
    y = graph.add("MatMulInteger", f"{name}.integers", codes, linear.name)
    y = graph.add("Cast", f"{name}.integers.float32", y, to=TensorProto.FLOAT)
    y = graph.add("Mul", f"{name}.integers.stepped", y, step)
    moved = graph.add("Mul", f"{name}.integers.moved", least, linear.initializer("sum"))
    return graph.add("Mul", name, graph.add("Add", f"{name}.integers.unscaled", y, moved), linear.initializer("scale"))


def _rounded(graph: Graph, x: str) -> tuple[str, str, str]:
    """Codes, step and least number of each token."""
    codes, step, least = (f"{x}.rounding.{each}" for each in ("codes", "step", "least"))
    if graph.has(codes):
        return codes, step, least
    last, one, zero = graph.constant(-1), graph.number(1.0, "float32"), graph.byte(0)
    most = graph.add("ReduceMax", f"{x}.rounding.most", x, last, keepdims=1)
    graph.add("ReduceMin", least, x, last, keepdims=1)
    steps = graph.add("Sub", f"{x}.rounding.range", most, least)
    steps = graph.add("Div", f"{x}.rounding.steps", steps, graph.number(STEPS, "float32"))
    graph.add("Max", step, steps, graph.number(LEAST, "float32"))
    above = graph.add("Div", f"{x}.rounding.in_steps", graph.add("Sub", f"{x}.rounding.above", x, least), step)
    return graph.add("QuantizeLinear", codes, above, one, zero), step, least


def _turned(linear: Linear, graph: Graph, w: str) -> str:
    return graph.add("Transpose", turned(linear.name), w, perm=[1, 0])


def _nbits(bits: int) -> Callable[[Linear, Graph, str, str], str]:
    def product(linear: Linear, graph: Graph, name: str, x: str) -> str:
        rows, inputs = linear.shape
        shape = {"K": inputs, "N": rows, "bits": bits, "block_size": linear.block, "accuracy_level": LEVEL}
        return graph.add("MatMulNBits", name, x, linear.name, linear.initializer("scale"), domain=MICROSOFT, **shape)

    return product


def _no_whole(linear: Linear, graph: Graph) -> str:
    raise AssertionError(f"{linear.name} is not only multiplied with: it is placed as portable")


LAYOUTS: dict[tuple[str, Profile], Layout] = {
    ("int4_awq", "portable"): Layout(
        kind=TensorProto.INT4,
        place=lambda fields, _: {"weight": transpose(fields["weight"]), "scale": transpose(fields["scale"])},
        read=lambda _, weight, scale: {"weight": transpose(weight), "scale": transpose(scale)},
        product=lambda linear, graph, name, x: graph.add("MatMul", name, x, _widened_int4(linear, graph)),
        whole=lambda linear, graph: _turned(linear, graph, _widened_int4(linear, graph)),
    ),
    ("int8", "portable"): Layout(
        kind=TensorProto.INT8,
        place=lambda fields, _: {"weight": fields["weight"], "scale": fields["scale"]},
        read=lambda _, weight, scale: {"weight": weight, "scale": scale},
        product=lambda linear, graph, name, x: graph.add(
            "MatMul", name, x, _turned(linear, graph, _widened_int8(linear, graph))
        ),
        whole=_widened_int8,
    ),
    ("int8_dynamic", "portable"): Layout(
        kind=TensorProto.INT8,
        place=lambda fields, _: {"weight": transpose(fields["weight"])},
        read=lambda _, weight, scale: {"weight": transpose(weight), "scale": scale},
        product=_dynamic,
        whole=lambda linear, graph: _turned(linear, graph, _widened_columns(linear, graph)),
        dtypes=("float32",),
        needs_tokens=True,
    ),
    ("int4_awq", "ort"): Layout(
        kind=TensorProto.UINT8,
        place=lambda fields, block: {
            "weight": Blocked(Flipped(along_inputs(fields["weight"]), _SIGNS, "uint8"), block // 2),
            "scale": fields["scale"],
        },
        read=lambda _, weight, scale: {"weight": along_rows(Flipped(joined(weight), _SIGNS, "uint8")), "scale": scale},
        product=_nbits(4),
        whole=_no_whole,
    ),
    ("int8", "ort"): Layout(
        kind=TensorProto.UINT8,
        place=lambda fields, block: {
            "weight": Blocked(Flipped(viewed(fields["weight"], "uint8"), _SIGN, "uint8"), block),
            "scale": Repeated(fields["scale"], fields["weight"].shape[1] // block),
        },
        read=lambda name, weight, scale: {
            "weight": Flipped(joined(weight), _SIGN, "int8"),
            "scale": Agreed(scale, name),
        },
        product=_nbits(8),
        whole=_no_whole,
    ),
}
"""By what the encoding is of, and the profile."""
