"""Low-rank adapters (LoRA, arXiv:2106.09685): W' = W + alpha / rank * B @ A, merged while the base streams.

A linear map's adapter is two factors, A [rank, in] and B [out, rank]. B's rows lie as the rows of the weight that it
adapts, so the layout of the weight's rule splits B, and A is the same for every part:

    linear_qkv [q q k v | q q k v]  ->  q: (A, rows of B for q)   k: (A, rows of B for k)   v: (A, rows of B for v)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.checkpoint import Checkpoint, Model
from nemoport.exporters.dtypes import Words
from nemoport.exporters.layouts import STACKED, TRANSPOSED, WHOLE
from nemoport.exporters.rules import Binding, Column, bindings
from nemoport.exporters.tensor import LazyTensor, Span, cast, cut, read
from nemoport.spec import Axis, TensorSpec

OWN = "adapter/"
"""Before an adapter's stored names, where they stand among the base's."""
_WRAPPED, _BARE = ".to_wrap.", "."
_MARK = ".adapter."
Number = TypeVar("Number", int, float)
_TILE = 512
"""Rows and columns computed at a time, so that a worker holds little beside its block."""


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What an adapter's config says of all its pairs."""

    rank: int | None
    """None where only the factors know."""
    alpha: float
    root: bool = False
    """Divide by the root of the rank (rsLoRA, arXiv:2312.03732)."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Of linears that differ, by the end of their names; and so the alphas."""
    alphas: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, linear: str) -> int | None:
        return next((rank for end, rank in self.ranks.items() if _ends(linear, end)), self.rank)

    def alpha_of(self, linear: str) -> float:
        return next((alpha for end, alpha in self.alphas.items() if _ends(linear, end)), self.alpha)


def finite(value: Any) -> float:
    """A number as a config says it, ValueError if it is none."""
    if isinstance(value, bool) or not isfinite(number := float(value)):
        raise ValueError(value)
    return number


@dataclass(frozen=True, kw_only=True)
class Pair:
    linear: str
    """The adapted linear, as the base's naming has it: its weight's name without `.weight`."""
    part: str = ""
    """`q`, `gate`...: the one canonical part that it adapts of a linear that fuses several."""
    names: tuple[str, str]
    """As A and B are stored."""
    a: LazyTensor
    b: LazyTensor
    alpha: float
    root: bool

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / (sqrt(self.rank) if self.root else self.rank)

    def __str__(self) -> str:
        return f"r {self.rank}, alpha {self.alpha:g}{', rslora' if self.root else ''}"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter as stored, unread."""

    path: Path
    format: str
    """The reader's name."""
    writer: str
    naming: str
    """Whose words the names of its linears are in: `megatron` or `huggingface`."""
    scaling: Scaling
    tensors: Mapping[str, LazyTensor]
    pairs: tuple[Pair, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    """What is stored beside it and is no adapter: the base itself, or a kind of adapter that is not known."""


class Reader(Protocol):
    """A module in `adapters/`."""

    def recognises(self, path: Path) -> bool:
        """From names and small files only; never an error."""
        ...

    def read(self, path: Path) -> Adapter: ...


@dataclass(frozen=True, kw_only=True)
class Bound:
    """An adapter whose every tensor is explained: canonical name -> its pair, B cut to its rows."""

    adapter: Adapter
    pairs: Mapping[str, Pair]

    def facts(self, mode: str) -> dict[str, Any]:
        """For the manifest. No paths."""
        return {
            "mode": mode,
            "format": self.adapter.format,
            "writer": self.adapter.writer,
            "tensors": len(self.adapter.tensors),
            "scaling": sorted({str(pair) for pair in self.pairs.values()}),
        }


@dataclass(frozen=True)
class Factor:
    """One stored tensor of an adapter, as its name was understood."""

    name: str
    linear: str
    part: str
    side: str
    """`a` or `b`."""


def paired(
    factors: Iterable[Factor], tensors: Mapping[str, LazyTensor], scaling: Scaling, said: str
) -> tuple[Pair, ...]:
    """The pairs of an adapter; `said` is where its scaling stands."""
    sides: dict[tuple[str, str], dict[str, str]] = {}
    for factor in factors:
        names = sides.setdefault((factor.linear, factor.part), {})
        if (other := names.setdefault(factor.side, factor.name)) != factor.name:
            raise DamagedInput(f"{other} and {factor.name} are the same factor; the file holds several adapters")
    pairs = []
    for (linear, part), names in sides.items():
        if lost := {"a", "b"} - names.keys():
            name, missing = next(iter(names.values())), lost.pop().upper()
            raise DamagedInput(f"{name} has no {missing} beside it; copy the adapter again")
        a, b = (tensors[names[side]] for side in "ab")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or a.shape[0] < 1:
            raise DamagedInput(
                f"{names['a']} is {list(a.shape)} and {names['b']} {list(b.shape)}, no [r, in], [out, r]"
            )
        if (rank := scaling.rank_of(linear)) not in (None, a.shape[0]):
            raise DamagedInput(f"{names['a']} has rank {a.shape[0]}, {said} says {rank}; they belong to two adapters")
        for name, tensor in ((names["a"], a), (names["b"], b)):
            if "float" not in tensor.dtype:
                raise UnsupportedInput(f"{name} has dtype {tensor.dtype}, weights are floating-point numbers")
        pairs.append(
            Pair(
                linear=linear,
                part=part,
                names=(names["a"], names["b"]),
                a=a,
                b=b,
                alpha=scaling.alpha_of(linear),
                root=scaling.root,
            )
        )
    return tuple(pairs)


def bind(adapter: Adapter, column: Column, specs: Mapping[str, TensorSpec]) -> Bound:
    """Prove that the adapter fits the base, and split it: every tensor of it is used, none twice for one weight."""
    by_name = {binding.stored: binding for binding in bindings(column.rules, specs)}
    found: dict[str, Pair] = {}
    unknown: list[str] = []
    for pair in adapter.pairs:
        if (binding := _adapted(pair, by_name.get(f"{pair.linear}.weight"))) is None:
            unknown.extend(pair.names)
            continue
        _check(pair, binding)
        rank = Axis("rank", pair.rank, pair.rank)
        factors = [TensorSpec(part.name, (part.axes[0], rank)) for part in binding.parts]
        for part, b in zip(binding.parts, binding.layout.split(pair.b, factors), strict=True):
            if part.name in found:
                raise DamagedInput(f"{part.name} is adapted twice, by {found[part.name].names[0]} and {pair.names[0]}")
            found[part.name] = replace(pair, b=b)
    if unknown:
        raise UnsupportedInput(
            f"{len(unknown)} of {len(adapter.tensors)} adapter tensors fit no linear of the base, the first is "
            f"{unknown[0]}; the adapter was trained on another model"
        )
    if not found:
        raise UnsupportedInput(f"{adapter.path} holds no adapter tensors; give the directory of a LoRA")
    return Bound(adapter=adapter, pairs={name: found[name] for name in specs if name in found})


def merged(model: Model, bound: Bound) -> Model:
    """The transform: the same model with the adapter in its weights."""
    tensors, sources, transforms = dict(model.tensors), dict(model.sources), dict(model.transforms)
    for name, pair in bound.pairs.items():
        base = tensors[name]
        tensors[name] = cast(Merged(base, pair.a, pair.b, pair.scale), base.dtype)
        sources[name] = (*sources[name], *(OWN + stored for stored in pair.names))
        transforms[name] = ", ".join([*filter(None, [transforms.get(name)]), f"merge adapter ({pair})"])
    return replace(
        beside(model, bound, "merge"),
        tensors=tensors,
        sources=sources,
        transforms=transforms,
    )


def beside(model: Model, bound: Bound, mode: str) -> Model:
    """The same model, with the adapter's tensors among its stored ones."""
    stored, adapter = model.checkpoint, bound.adapter
    checkpoint = replace(
        stored,
        tensors={**stored.tensors, **{OWN + name: tensor for name, tensor in adapter.tensors.items()}},
        skipped={**stored.skipped, **{OWN + name: rule for name, rule in adapter.skipped.items()}},
    )
    return replace(model, checkpoint=checkpoint, adapter=bound.facts(mode))


def without(stored: Checkpoint) -> Checkpoint:
    """The base in a checkpoint that holds its adapter too."""
    return replace(
        stored,
        tensors={
            name.replace(_WRAPPED, _BARE): tensor for name, tensor in stored.tensors.items() if not is_adapter(name)
        },
        skipped={**stored.skipped, **{name: "adapter, read apart" for name in stored.tensors if is_adapter(name)}},
    )


def is_adapter(name: str) -> bool:
    """Whether Megatron stores an adapter's tensor under this name."""
    return _MARK in name


@dataclass(frozen=True)
class Merged:
    """base + scale * b @ a, in float64. There no order of summation, which BLAS chooses by shape, shows in what is
    rounded from it: a tensor has the same bytes however it was cut."""

    base: LazyTensor
    a: LazyTensor
    b: LazyTensor
    scale: float
    dtype: str = "float64"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def cut(self, spans: tuple[Span, ...]) -> LazyTensor:
        rows, columns = spans
        a, b = cut(self.a, 1, *columns), cut(self.b, 0, *rows)
        return Merged(self.base.cut(spans), a, b, self.scale)

    def fill(self, out: Words) -> None:
        numbers, (rows, columns) = out.view(np.float64), self.shape
        for left in range(0, columns, _TILE):
            right = min(left + _TILE, columns)
            a = self.scale * _numbers(cut(self.a, 1, left, right))
            for top in range(0, rows, _TILE):
                bottom = min(top + _TILE, rows)
                tile = numbers[top:bottom, left:right]
                np.matmul(_numbers(cut(self.b, 0, top, bottom)), a, out=tile)
                tile += _numbers(cut(cut(self.base, 0, top, bottom), 1, left, right))


def _numbers(tensor: LazyTensor) -> NDArray[np.float64]:
    return read(tensor).astype(np.float64)


def _adapted(pair: Pair, binding: Binding | None) -> Binding | None:
    """What of the base a pair adapts: a whole linear, or one part of it; None where it is no linear."""
    if binding is None or any(len(part.shape) != 2 or part.name == "embed.weight" for part in binding.parts):
        return None
    if not pair.part:  # factors are never transposed, whatever the weight is
        return replace(binding, layout=STACKED) if binding.layout is TRANSPOSED else binding
    parts = tuple(part for part in binding.parts if part.name.endswith(f".{pair.part}.weight"))
    return Binding(binding.stored, parts, WHOLE) if len(parts) == 1 else None


def _check(pair: Pair, binding: Binding) -> None:
    rows, columns = binding.shape
    enough = pair.b.shape[0] >= rows if binding.layout.padded else pair.b.shape[0] == rows
    if not enough or pair.a.shape[1] != columns:
        raise DamagedInput(
            f"{pair.names[1]} @ {pair.names[0]} is {[pair.b.shape[0], pair.a.shape[1]]}, {binding.stored} of the base "
            f"{[rows, columns]}; the adapter was trained on another model"
        )


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def shared(values: Sequence[Number]) -> Number:
    """The value that most have, the smallest of those."""
    return max(sorted(set(values)), key=values.count)
