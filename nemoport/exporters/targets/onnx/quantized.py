"""Quantized linears as nodes. The numbers lie in the data file as they were rounded, and no runtime need widen them.

    portable   DequantizeLinear, MatMul: ai.onnx. ONNX Runtime makes one MatMulNBits of both when it loads, which keeps
               the numbers packed: of INT4 only as [in, out] (a Transpose between hides it), of INT8 also through one.
    ort        MatMulNBits of com.microsoft, as ONNX Runtime keeps it: nothing is repacked at load.

`accuracy_level` 4 rounds the input to INT8 in each block as well, as ONNX Runtime does where it fuses. Its kernel for
8 bits knows no other level: it would widen the weight to float32 in memory (seen in 1.31).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx import TensorProto

from nemoport import plugins
from nemoport.errors import UnsupportedInput
from nemoport.exporters.checkpoint import Slot
from nemoport.exporters.dequantized import QUANTIZERS
from nemoport.exporters.derived import transpose, viewed
from nemoport.exporters.encoding import NUMBERS, Encoded
from nemoport.exporters.targets.onnx.graph import MICROSOFT, Graph
from nemoport.exporters.targets.onnx.packed import Agreed, Blocked, Flipped, Repeated, along_inputs, along_rows, joined
from nemoport.exporters.tensor import LazyTensor, cast
from nemoport.spec import Profile

DIALECT = "onnx"
BLOCKS = (128, 64, 32, 16)
"""The blocks of MatMulNBits that are tried for rows with one scale: the fewer scales the better."""
LEVEL = 4
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


def place(graph: Graph, name: str, tensor: Encoded, dtype: str, profile: Profile) -> None:
    """Its fields as slots, and what then stands for it. Scales have the dtype of the computation."""
    layout = LAYOUTS[tensor.encoding.method, profile]
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
    if numbers is None or scale is None or (key := _key(kind, numbers.shape, shape)) is None:
        return None
    fields = LAYOUTS[key].read(name, numbers, scale)
    if (pre_scale := load(f"{linear}pre_scale")) is not None:
        fields["pre_scale"] = pre_scale
    scales = fields["scale"].shape
    group = shape[1] // scales[1] if len(scales) > 1 else None
    return Encoded(name, shape, plugins.load(QUANTIZERS, key[0]).encoding(group), fields)


def _key(kind: int, dims: tuple[int, ...], shape: tuple[int, ...]) -> tuple[str, Profile] | None:
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


def _turned(linear: Linear, graph: Graph, w: str) -> str:
    return graph.add("Transpose", f"{linear.name}.transposed", w, perm=[1, 0])


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
