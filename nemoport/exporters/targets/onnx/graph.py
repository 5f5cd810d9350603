"""A graph in the making: nodes in order, small constants inside, and weights as slots of the data file beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper

from nemoport.artifact import Signature, Tensor
from nemoport.exporters.checkpoint import Slot, TensorFile
from nemoport.exporters.dtypes import DTYPES
from nemoport.exporters.tensor import nbytes

OPSET = 23
IR_VERSION = 11
"""The oldest that may carry opset 23."""

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
VERSIONS = {"": OPSET, MICROSOFT: 1}

PAGE = 4096
"""Weights begin at a page, so that a runtime can map them instead of reading them."""


class Packed(Protocol):
    """A weight whose numbers are packed: nodes make of it what is wanted."""

    def product(self, graph: Graph, name: str, x: str) -> str:
        """`x` times the weight turned around."""
        ...

    def whole(self, graph: Graph) -> str:
        """The weight itself, [out, in]."""
        ...


class Graph:
    """Every value is named by its place in the model, and a node has the name of the value it makes."""

    def __init__(self, data: str) -> None:
        self._data, self._end = data, 0
        self._slots: list[Slot] = []
        self._offsets: list[int] = []
        self._initializers: dict[str, TensorProto] = {}
        self._nodes: list[NodeProto] = []
        self._made: set[str] = set()
        self._told: dict[str, str] = {}
        self._packed: dict[str, Packed] = {}

    def add(self, op: str, name: str, *inputs: str, **attributes: int | float | str | list[int]) -> str:
        self._nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        self._made.add(name)
        return name

    def top(self, name: str, x: str, count: int) -> tuple[str, str]:
        """The highest values along the last axis, the highest first, and their places."""
        made = f"{name}.values", name
        self._nodes.append(helper.make_node("TopK", [x, self.constant(count)], made, name=name, axis=-1))
        return made

    def has(self, name: str) -> bool:
        """Whether a node makes this value already."""
        return name in self._made

    def reads(self) -> set[str]:
        """Every value that some node takes."""
        return {name for node in self._nodes for name in node.input}

    def tell(self, key: str, value: str) -> None:
        """A line of the graph's metadata."""
        self._told[key] = value

    def constant(self, *values: int) -> str:
        """A list of integers, kept inside the graph and written once."""
        return self._constant("ints." + ".".join(map(str, values)), [len(values)], values)

    def scalar(self, value: int) -> str:
        """A true scalar, of rank 0: Range takes nothing else."""
        return self._constant(f"int.{value}", [], [value])

    def integers(self, name: str, values: Iterable[int], shape: tuple[int, ...]) -> str:
        """A named table of integers, kept inside the graph."""
        return self._constant(f"ints.{name}", list(shape), values)

    def number(self, value: float, dtype: str) -> str:
        """A scalar of a floating-point dtype."""
        name = f"{dtype}.{value!r}"
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, DTYPES[dtype].onnx, [], [value])
        return name

    def byte(self, value: int) -> str:
        """A scalar of uint8: the zero point that says what is rounded to."""
        name = f"uint8.{value}"
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, TensorProto.UINT8, [], [value])
        return name

    def weight(self, slot: Slot, kind: int | None = None, dims: Sequence[int] | None = None) -> str:
        """A tensor in the data file, at the next page; `kind` and `dims` are ONNX's words for what is packed there."""
        tensor, offset = slot.tensor, -(-self._end // PAGE) * PAGE
        length = nbytes(tensor)
        proto = TensorProto(
            name=slot.name,
            data_type=DTYPES[tensor.dtype].onnx if kind is None else kind,
            dims=tensor.shape if dims is None else dims,
            data_location=TensorProto.EXTERNAL,
        )
        for key, value in (("location", self._data), ("offset", str(offset)), ("length", str(length))):
            proto.external_data.add(key=key, value=value)
        self._initializers[slot.name] = proto
        self._slots.append(slot)
        self._offsets.append(offset)
        self._end = offset + length
        return slot.name

    def pack(self, weight: str, packed: Packed) -> None:
        """What stands for a weight that is no plain initializer."""
        self._packed[weight] = packed

    def packed(self, weight: str) -> Packed | None:
        return self._packed.get(weight)

    def file(self, place: str) -> TensorFile:
        """The data file, in the directory of the graph's own."""
        return TensorFile(
            path=f"{place}{self._data}", header=b"", slots=tuple(self._slots), offsets=tuple(self._offsets)
        )

    def serialize(self, signature: Signature) -> bytes:
        graph = GraphProto(
            name="nemoport",
            node=self._nodes,
            initializer=self._initializers.values(),
            input=_values(signature.inputs),
            output=_values(signature.outputs),
        )
        used = [
            helper.make_opsetid(domain, VERSIONS[domain]) for domain in sorted({node.domain for node in self._nodes})
        ]
        model = helper.make_model(graph, ir_version=IR_VERSION, opset_imports=used, producer_name="nemoport")
        helper.set_model_props(model, self._told)
        content: bytes = model.SerializeToString(deterministic=True)
        return content

    def _constant(self, name: str, shape: list[int], values: Iterable[int]) -> str:
        if name not in self._initializers:
            self._initializers[name] = helper.make_tensor(name, TensorProto.INT64, shape, values)
        return name


def _values(tensors: tuple[Tensor, ...]) -> list[ValueInfoProto]:
    return [helper.make_tensor_value_info(tensor.name, DTYPES[tensor.dtype].onnx, tensor.shape) for tensor in tensors]
