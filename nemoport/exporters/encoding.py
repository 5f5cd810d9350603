"""Encodings: how a quantized weight is stored, as data. A quantized linear is one canonical weight with fields.

    int4_awq    weight     uint8 [out / 2, in]       two rows in a byte
                scale      float32 [out, in / 128]
                pre_scale  [in]                      what the input is multiplied with

Every axis of a field follows an axis of the weight, `step` of the weight's elements to one of the field's. So a weight
is cut, split and joined by doing the same to its fields, and rules, layouts and sharding know of no quantization. A
field that does not follow the rows is one for all of them: weights whose rows are joined must agree on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd, prod

import numpy as np

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.derived import closed, single, spaced, squeezed, viewed
from nemoport.exporters.dtypes import DTYPES, Words, itemsize, words
from nemoport.exporters.layouts import WHOLE, Layout
from nemoport.exporters.packing import Packing, repacked
from nemoport.exporters.tensor import Held, LazyTensor, Span, read
from nemoport.spec import Axis, TensorSpec

Follows = tuple[tuple[int, int], ...]
"""For each axis of a field: the weight's axis, and how many of its elements one of the field's stands for."""
EVERY: Follows = ((0, 1), (1, 1))
SCALAR: Follows = ()
NUMBERS = "weight"
"""The field that holds the numbers themselves; every encoding has it, and it has every axis."""
FP8_ON_CPU = "ONNX Runtime keeps no fp8 packed on CPUs: it would widen every weight anew for every token"
"""Why it is not written as ONNX; seen in 1.31, 12 times slower than float32."""
FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Form:
    """How a dialect stores a field."""

    suffix: str
    """After the name of the linear."""
    dtype: str = ""
    """The same bytes under another name; the field's own when empty."""
    single: bool = False
    """A scalar is stored as a vector of one."""
    always: bool = False
    """Where the field is absent, what it then stands for is written out."""
    apart: bool = False
    """Every axis is stored with one of length one behind it."""
    dtypes: tuple[str, ...] = ()
    """Those that it may have there; the field's own when empty."""
    above: tuple[str, ...] = ()
    """The linears whose it is, where it is named after the module that they are in."""
    packing: Packing | None = None
    """Its numbers lie otherwise there."""

    def name(self, linear: str) -> str:
        """That of the stored tensor, for the name of a linear with its dot."""
        return (linear[:-1].rpartition(".")[0] + "." if self.above else linear) + self.suffix

    def may_be_of(self, linear: str) -> bool:
        return not self.above or linear[:-1].rpartition(".")[2] in self.above

    def stored(self, tensor: LazyTensor, field: Field, weight: tuple[int, ...]) -> LazyTensor:
        if self.packing:
            to = self.packing
            return repacked(tensor, field.follows, to.follows, weight, to.dtype, to.pack)
        tensor = viewed(tensor, self.dtype or tensor.dtype)
        return single(tensor) if self.single else spaced(tensor) if self.apart else tensor

    def loaded(self, tensor: LazyTensor, field: Field, weight: tuple[int, ...]) -> LazyTensor:
        """The inverse of `stored`, but for the name of the dtype."""
        if self.packing:
            return repacked(tensor, self.packing.follows, field.follows, weight, field.dtypes[0], self.packing.unpack)
        if self.apart:
            return closed(tensor)
        return squeezed(tensor) if self.single and tensor.shape else tensor

    def shape(self, field: Field, weight: tuple[int, ...]) -> tuple[int, ...]:
        """That of a field as it is stored."""
        if self.packing:
            return self.packing.shape(weight)
        shape = field.shape(weight)
        if self.apart:
            return tuple(size for axis in shape for size in (axis, 1))
        return (1,) if self.single else shape

    def kinds(self, field: Field) -> tuple[str, ...]:
        if self.packing:
            return (self.packing.dtype,)
        return self.dtypes or ((self.dtype,) if self.dtype else field.dtypes)


@dataclass(frozen=True)
class Field:
    name: str
    dtypes: tuple[str, ...]
    follows: Follows
    forms: Mapping[str, Form]
    """By dialect: `modelopt` is that of Hugging Face directories, `trtllm` that of rank files."""
    neutral: float | None = None
    """What an absent field stands for; None where every weight must have it."""
    optional: bool = False
    """It may be absent and stands for nothing then: only some linears of a module have it, the keys' for example."""
    of_shape: bool = False
    """It says the shape of the weight: worked out where it is stored, and held against the weight where it is read."""

    def shape(self, weight: Sequence[int]) -> tuple[int, ...]:
        """Its shape, rounded up, for a weight's."""
        return tuple(-(-weight[axis] // step) for axis, step in self.follows)

    @property
    def has_rows(self) -> bool:
        return bool(self.follows) and self.follows[0][0] == 0


@dataclass(frozen=True)
class Encoding:
    method: str
    """The module in `quantizers/`."""
    fields: tuple[Field, ...]
    group: int | None = None
    """Inputs that share a scale; None where all do."""
    loads: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By dialect: who loads it."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """By dialect: why it cannot be said there."""

    @property
    def bits(self) -> int:
        """Of a weight, its scales apart."""
        numbers = next(each for each in self.fields if each.name == NUMBERS)
        return DTYPES[numbers.dtypes[0]].bits // prod(step for _, step in numbers.follows)

    def in_dialect(self, dialect: str) -> tuple[tuple[Field, Form], ...]:
        return tuple((each, each.forms[dialect]) for each in self.fields if dialect in each.forms)


@dataclass(frozen=True)
class Encoded:
    """A quantized weight: a lazy tensor with the shape of the numbers it stands for, which only its fields store.
    Whatever treats it as plain numbers is refused: nothing undoes a quantization on the way."""

    name: str
    """As stored, for errors."""
    shape: tuple[int, ...]
    encoding: Encoding
    fields: Mapping[str, LazyTensor]
    dtype: str = "float32"

    def cut(self, spans: tuple[Span, ...]) -> Encoded:
        cut = {each.name: self._cut(each, spans) for each in self.encoding.fields if each.name in self.fields}
        return replace(self, shape=tuple(stop - start for start, stop in spans), fields=cut)

    def fill(self, out: Words) -> None:
        raise UnsupportedInput(f"{self.name} is quantized ({self.encoding.method}), and nemoport does not undo that")

    def field(self, each: Field, dtype: str) -> LazyTensor | None:
        """A field, or where it is absent what that stands for; None where it stands for nothing."""
        if each.name in self.fields:
            return self.fields[each.name]
        if each.neutral is None:
            return None
        return constant(each.neutral, each.shape(self.shape), dtype)

    def _cut(self, each: Field, spans: Sequence[Span]) -> LazyTensor:
        tensor, inner = self.fields[each.name], []
        for axis, step in each.follows:
            start, stop = spans[axis]
            if start % step or (stop % step and stop != self.shape[axis]):
                what = "rows" if axis == 0 else "inputs"
                raise UnsupportedInput(
                    f"{self.name} is quantized ({self.encoding.method}) with {step} {what} to an element of its "
                    f"{each.name}, and cannot be cut at {what} {start} to {stop}; use a smaller tp"
                )
            inner.append((start // step, -(-stop // step)))
        whole = inner == [(0, size) for size in tensor.shape]
        return tensor if whole else tensor.cut(tuple(inner))


def constant(number: float, shape: tuple[int, ...], dtype: str) -> LazyTensor:
    """An array of one number that bfloat16 holds exactly."""
    bits = np.full(shape, number, np.float32).view(np.uint32)
    if dtype == "bfloat16":
        return Held((bits >> 16).astype(np.uint16), dtype)
    return Held(np.full(shape, number, dtype), dtype)


def split(layout: Layout, stored: LazyTensor, parts: Sequence[TensorSpec]) -> tuple[LazyTensor, ...]:
    """`layout.split`, of a quantized tensor field by field."""
    if not isinstance(stored, Encoded):
        return layout.split(stored, parts)
    if layout is WHOLE:
        return (stored,)
    _check_rows(layout, stored)
    pieces: list[dict[str, LazyTensor]] = [{} for _ in parts]
    for each in stored.encoding.fields:
        if (tensor := stored.fields.get(each.name)) is None:
            continue
        found = (tensor,) * len(parts)
        if each.has_rows:
            found = layout.split(tensor, [_followed(part, each, stored) for part in parts])
        for piece, share in zip(pieces, found, strict=True):
            piece[each.name] = share
    return tuple(replace(stored, shape=part.shape, fields=each) for part, each in zip(parts, pieces, strict=True))


def join(layout: Layout, tensors: Sequence[LazyTensor], parts: Sequence[TensorSpec]) -> LazyTensor:
    """`layout.join`, of quantized tensors field by field; what has no rows must be the same in all."""
    encoded = [tensor for tensor in tensors if isinstance(tensor, Encoded)]
    if not encoded:
        return layout.join(tensors, parts)
    first = encoded[0]
    if len(encoded) < len(tensors) or any(each.encoding != first.encoding for each in encoded):
        raise UnsupportedInput(f"{first.name} is quantized, and what it is to be joined with is not, or otherwise")
    if layout is WHOLE:
        return first
    _check_rows(layout, first)
    joined = {}
    for each in first.encoding.fields:
        if not (found := _held(each, encoded)):
            continue
        if each.has_rows:
            joined[each.name] = layout.join(found, [_followed(part, each, first) for part in parts])
        else:
            _check_same(each, encoded, found)
            joined[each.name] = found[0]
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    return replace(first, shape=shape, fields=joined)


def check_shared(each: Field, encoded: Sequence[Encoded]) -> None:
    """Refuse weights that are to share a field and do not. Where it is not one tensor, it is read, which is small."""
    _check_same(each, encoded, _held(each, encoded))


def _check_same(each: Field, encoded: Sequence[Encoded], found: Sequence[LazyTensor]) -> None:
    if any(tensor is not found[0] for tensor in found) and len({bits(tensor) for tensor in found}) > 1:
        raise UnsupportedInput(
            f"{', '.join(one.name for one in encoded)} have each a {each.name} of their own where one for all is "
            "stored; that takes rounding them anew, which nemoport does not do to a quantized checkpoint; use --to hf"
        )


def bits(tensor: LazyTensor) -> bytes:
    """The bytes of a small tensor."""
    out: Words = np.empty(tensor.shape, words(tensor.dtype))
    tensor.fill(out)
    return tensor.dtype.encode() + out.tobytes()


def spread(stored: str, tensor: Encoded, dialect: str, dtype: str) -> Iterator[tuple[str, LazyTensor, str]]:
    """The names and tensors that store a quantized weight in a dialect, and what was made up; `stored` is the name it
    would have plain, `dtype` that of what has to be made up."""
    linear = stored.removesuffix(NUMBERS)
    for each, form in tensor.encoding.in_dialect(dialect):
        if each.of_shape:
            yield form.name(linear), Held(np.array(tensor.shape, np.int64), "int64"), ""
            continue
        found = tensor.field(each, dtype) if form.always else tensor.fields.get(each.name)
        if found is not None:
            made = "" if each.name in tensor.fields else f"{each.neutral} throughout, its {each.name} being absent"
            yield form.name(linear), form.stored(found, each, tensor.shape), made


@dataclass(frozen=True)
class Gathered:
    """Stored tensors with their quantized weights put together."""

    tensors: Mapping[str, LazyTensor]
    members: Mapping[str, tuple[str, ...]]
    """The name of a quantized weight -> the stored tensors that are its fields."""


def gather(stored: Mapping[str, LazyTensor], encoding: Encoding, dialect: str) -> Gathered:
    """The inverse of `spread`: every weight whose dtype is that of the encoding, with the fields beside it."""
    tensors, members = dict(stored), {}
    ((numbers, how),) = [(each, form) for each, form in encoding.in_dialect(dialect) if each.name == NUMBERS]
    kinds, follows = how.kinds(numbers), how.packing.follows if how.packing else numbers.follows
    for name, tensor in stored.items():
        if not name.endswith(f".{how.suffix}") or tensor.dtype not in kinds or len(tensor.shape) != 2:
            continue
        linear = name.removesuffix(how.suffix)
        shape = tuple(size * step for size, (_, step) in zip(tensor.shape, follows, strict=True))
        names = {each.name: form.name(linear) for each, form in encoding.in_dialect(dialect)}
        fields = {
            each.name: _field(each, form, name, names[each.name], stored, shape)
            for each, form in encoding.in_dialect(dialect)
            if (names[each.name] in stored and form.may_be_of(linear))
            or form.always
            or not (each.optional or each.neutral is not None)
        }
        weight = linear + NUMBERS
        members[weight] = tuple(names[field] for field in fields)
        for each in members[weight]:
            tensors.pop(each)
        for said in (each.name for each in encoding.fields if each.of_shape and each.name in fields):
            _check_shape(names[said], fields.pop(said), shape)
        tensors[weight] = Encoded(weight, shape, encoding, fields)
    others = (form.suffix for each, form in encoding.in_dialect(dialect) if each.name != NUMBERS or how.packing)
    strays = tuple(f".{suffix}" for suffix in others)
    if alone := [name for name in tensors if name.endswith(strays)]:
        raise DamagedInput(
            f"{len(alone)} scales have no weight quantized by {encoding.method} beside them, the first is {alone[0]}; "
            "copy the checkpoint again"
        )
    return Gathered(tensors, members)


def _check_shape(name: str, stored: LazyTensor, weight: tuple[int, ...]) -> None:
    if (said := tuple(int(size) for size in read(stored))) != weight:
        raise DamagedInput(f"{name} says {list(said)}, and the weight has {list(weight)}; copy the checkpoint again")


def _field(
    each: Field, form: Form, weight: str, name: str, stored: Mapping[str, LazyTensor], shape: tuple[int, ...]
) -> LazyTensor:
    """One field of a weight, checked."""
    if name not in stored:
        raise DamagedInput(f"{weight} is quantized, and its {name} is missing; copy the checkpoint again")
    tensor, kinds = stored[name], form.kinds(each)
    needed = (2,) if each.of_shape else form.shape(each, shape)
    found = (1,) if form.single and not tensor.shape else tensor.shape
    if found != needed or tensor.dtype not in kinds:
        raise DamagedInput(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, {' or '.join(kinds)} {list(needed)} needed beside a "
            f"weight of {list(shape)}; copy the checkpoint again"
        )
    if form.packing and any(shape[axis] % step for axis, step in each.follows):
        raise UnsupportedInput(f"{weight} has an odd number of rows, and nemoport has two of them in a byte")
    tensor = form.loaded(tensor, each, shape)
    if form.dtypes:
        return tensor
    own = tensor.dtype if tensor.dtype in each.dtypes else each.dtypes[0]
    assert itemsize(own) == itemsize(tensor.dtype), (own, tensor.dtype)
    return viewed(tensor, own)


def _held(each: Field, encoded: Sequence[Encoded]) -> list[LazyTensor]:
    """A field of weights that are joined: of all of them, or of none. An optional one is of what they make together,
    whichever has it."""
    have = [tensor for tensor in encoded if each.name in tensor.fields]
    if not have or each.optional:
        return [tensor.fields[each.name] for tensor in have]
    found = [tensor.field(each, have[0].fields[each.name].dtype) for tensor in encoded]
    if lacking := [one.name for one, tensor in zip(encoded, found, strict=True) if tensor is None]:
        raise UnsupportedInput(f"{have[0].name} has a {each.name}, and {lacking[0]}, joined with it, has none")
    return [tensor for tensor in found if tensor is not None]


def _check_rows(layout: Layout, tensor: Encoded) -> None:
    if not layout.whole_rows:
        raise UnsupportedInput(
            f"{tensor.name} is quantized, and cannot be stored {layout.name}, as it is there; use another target"
        )


def _followed(part: TensorSpec, each: Field, tensor: Encoded) -> TensorSpec:
    """The spec of a weight's field."""
    axes = []
    for index, step in each.follows:
        axis = part.axes[index]
        size = -(-axis.size // step)
        if index == 0 and (axis.size % step or (axis.units < axis.size and size % axis.units)):
            raise UnsupportedInput(
                f"{tensor.name} is quantized with {step} rows to an element of its {each.name}, which {axis.units} "
                f"x {axis.size // axis.units} rows do not divide by; use --to hf"
            )
        axes.append(Axis(axis.name, size, gcd(axis.units, size)))
    return TensorSpec(part.name, tuple(axes))
