"""Rules: one line of a table ties one stored tensor to the canonical tensors inside it.

    Rule("decoder.layers.{i}.mlp.linear_fc1.weight", (gate, up), STACKED)

A column is the table of one naming (Megatron, Hugging Face, TensorRT-LLM) of one family, with the dialects of its
config. It is read both ways: `resolve` splits stored tensors into canonical ones, `bindings` with `join` writes them.
Two rules may offer the same parts under different names; a checkpoint has one of them, and the first is written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import groupby

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters import encoding
from nemoport.exporters.configs import Dialect
from nemoport.exporters.layouts import WHOLE, Layout
from nemoport.exporters.tensor import LazyTensor, Zeros
from nemoport.spec import TensorSpec


@dataclass(frozen=True)
class Rule:
    """`{i}` stands for the number of a layer, `{e}` for that of an expert in it, and a part with `{every}` for one of
    each expert: those of the first, then those of the second."""

    stored: str
    parts: tuple[str, ...]
    layout: Layout = WHOLE
    dtype: str = ""
    """In which the format wants it, whatever the others have."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One naming of one family."""

    rules: tuple[Rule, ...]
    dialects: tuple[Dialect, ...]
    tied_copy: str = ""
    """Where a tied model may store its embedding a second time."""
    buffers: Mapping[str, str] = field(default_factory=dict)
    """Stored things that are no weights: a pattern of their names, and what they are."""
    modules: Mapping[str, str] = field(default_factory=dict)
    """Layers that are none of the model's: a pattern of a name that only such a layer has, `layers.*.eh_proj.weight`,
    and what it is. All that is stored below it is skipped."""
    loads: tuple[str, ...] = ()
    """What loads such an artifact, where that is not what loads other families."""
    own_head: bool = True
    """Whether an output matrix may be written; else the runtime takes the embedding for it, and nothing else."""


@dataclass(frozen=True)
class Binding:
    """A rule applied: one stored name, the canonical tensors in it."""

    stored: str
    parts: tuple[TensorSpec, ...]
    layout: Layout
    dtype: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.join([Zeros(part.shape, "uint8") for part in self.parts], self.parts).shape

    def split(self, stored: LazyTensor) -> tuple[LazyTensor, ...]:
        return encoding.split(self.layout, stored, self.parts)

    def join(self, tensors: Sequence[LazyTensor]) -> LazyTensor:
        return encoding.join(self.layout, tensors, self.parts)


@dataclass(frozen=True)
class Resolved:
    tensors: Mapping[str, LazyTensor]
    sources: Mapping[str, tuple[str, ...]]
    skipped: Mapping[str, str] = field(default_factory=dict)


def bindings(rules: Sequence[Rule], specs: Mapping[str, TensorSpec]) -> Iterator[Binding]:
    """Every rule at every layer and expert where the model has its parts, in the order of the rules."""
    places = _places(specs)
    for rule in rules:
        found = places.get(rule.parts[0].replace(_EVERY, _EXPERT), [])
        together = _of_layers(found) if _EVERY in rule.parts[0] else [[place] for place in found]
        for these in together:
            parts = [part.replace(_EVERY, _EXPERT).format(**place) for place in these for part in rule.parts]
            if all(part in specs for part in parts):
                stored = rule.stored.format(**these[0])
                yield Binding(stored, tuple(specs[part] for part in parts), rule.layout, rule.dtype)


Place = Mapping[str, str]
"""The numbers in a canonical name: of the layer, and of the expert in it."""
_EXPERT, _EVERY = "{e}", "{every}"


def _places(specs: Mapping[str, TensorSpec]) -> Mapping[str, list[Place]]:
    """Where the model has what: canonical names without their numbers -> the numbers."""
    found: dict[str, list[Place]] = defaultdict(list)
    for name in specs:
        match name.split("."):
            case ["layers", layer, half, "experts", expert, *rest]:
                found[".".join(["layers.{i}", half, "experts", _EXPERT, *rest])].append({"i": layer, "e": expert})
            case ["layers", layer, *rest]:
                found[".".join(["layers.{i}", *rest])].append({"i": layer})
            case _:
                found[name].append({})
    return found


def _of_layers(places: Sequence[Place]) -> list[list[Place]]:
    """The places of each layer's experts, which follow one another."""
    return [list(those) for _, those in groupby(places, lambda place: place["i"])]


def written(rules: Sequence[Rule], specs: Mapping[str, TensorSpec]) -> Iterator[Binding]:
    """`bindings` with each canonical tensor once: of several names, the first."""
    seen: set[str] = set()
    for binding in bindings(rules, specs):
        if not seen & (parts := {part.name for part in binding.parts}):
            seen |= parts
            yield binding


def resolve(column: Column, specs: Mapping[str, TensorSpec], stored: Mapping[str, LazyTensor]) -> Resolved:
    """Prove that names, shapes and rules match, and split. Every stored tensor is used once or skipped by a named
    rule; every canonical tensor is made once."""
    tensors: dict[str, LazyTensor] = {}
    sources: dict[str, tuple[str, ...]] = {}
    skipped = {name: what for name in stored for pattern, what in column.buffers.items() if fnmatchcase(name, pattern)}
    skipped |= _of_modules(column, stored)
    if "head.weight" not in specs and column.tied_copy in stored:
        skipped[column.tied_copy] = "tied head"
    unexplained = {name: None for name in stored if name not in skipped}
    missing: dict[str, str] = {}
    for binding in bindings(column.rules, specs):
        if binding.stored not in stored:
            missing |= {part.name: binding.stored for part in binding.parts if part.name not in missing}
            continue
        tensor = stored[binding.stored]
        _check(binding, tensor)
        unexplained.pop(binding.stored, None)
        for part, piece in zip(binding.parts, binding.split(tensor), strict=True):
            if part.name in tensors:
                raise DamagedInput(f"{part.name} is stored twice, in {sources[part.name][0]} and in {binding.stored}")
            tensors[part.name], sources[part.name] = piece, (binding.stored,)
    if absent := [name for name in specs if name not in tensors]:
        where = missing.get(absent[0], "no rule of this family")
        raise DamagedInput(
            f"{len(absent)} of {len(specs)} tensors are missing, the first is {absent[0]} ({where}); "
            "the checkpoint is incomplete or its config describes another model"
        )
    if unexplained:
        raise UnsupportedInput(
            f"{len(unexplained)} stored tensors are explained by no rule, the first is {next(iter(unexplained))}; "
            "the config describes another model, or this family needs a rule for them"
        )
    return Resolved({name: tensors[name] for name in specs}, sources, skipped)


def _of_modules(column: Column, stored: Collection[str]) -> dict[str, str]:
    places: dict[str, str] = {}
    for pattern, what in column.modules.items():
        end = pattern.rpartition("*")[2]
        places |= {name.removesuffix(end) + ".": what for name in stored if fnmatchcase(name, pattern)}
    return {name: what for place, what in places.items() for name in stored if name.startswith(place)}


def _check(binding: Binding, tensor: LazyTensor) -> None:
    needed, found = binding.shape, tensor.shape
    if binding.layout.padded and len(found) == len(needed):
        matches = found[0] >= needed[0] and found[1:] == needed[1:]
    else:
        matches = found == needed
    if not matches:
        raise DamagedInput(
            f"{binding.stored} has shape {list(found)}, the config asks for {list(needed)}; "
            "the config describes another model"
        )
    if "float" not in tensor.dtype:
        raise UnsupportedInput(f"{binding.stored} has dtype {tensor.dtype}, weights are floating-point numbers")
