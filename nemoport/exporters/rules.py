"""Rules: one line of a table ties one stored tensor to the canonical tensors inside it.

    Rule("decoder.layers.{i}.mlp.linear_fc1.weight", (gate, up), STACKED)

A column is the table of one naming (Megatron, Hugging Face, TensorRT-LLM) of one family, with the dialects of its
config. It is read both ways: `resolve` splits stored tensors into canonical ones, `bindings` with `join` writes them.
Two rules may offer the same parts under different names; a checkpoint has one of them, and the first is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters import encoding
from nemoport.exporters.configs import Dialect
from nemoport.exporters.layouts import WHOLE, Layout
from nemoport.exporters.tensor import LazyTensor, Zeros
from nemoport.spec import TensorSpec


@dataclass(frozen=True)
class Rule:
    stored: str
    parts: tuple[str, ...]
    layout: Layout = WHOLE


@dataclass(frozen=True, kw_only=True)
class Column:
    """One naming of one family."""

    rules: tuple[Rule, ...]
    dialects: tuple[Dialect, ...]
    tied_copy: str = ""
    """Where a tied model may store its embedding a second time."""
    buffers: Mapping[str, str] = field(default_factory=dict)
    """Stored things that are no weights: a pattern of their names, and what they are."""
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
    """Every rule at every layer where the model has its parts, in the order of the rules."""
    for rule in rules:
        pattern = re.compile(re.escape(rule.parts[0]).replace(r"\{i\}", r"(?P<i>\d+)"))
        for name in specs:
            if (match := pattern.fullmatch(name)) is None:
                continue
            place = match.groupdict()
            parts = [part.format(**place) for part in rule.parts]
            if all(part in specs for part in parts):
                yield Binding(rule.stored.format(**place), tuple(specs[part] for part in parts), rule.layout)


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
