"""Tensors by the axes that they are made of, and what each axis counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis of a canonical tensor: `size` elements, made of `units` that must stay whole (heads, for example)."""

    name: str
    size: int
    units: int


@dataclass(frozen=True)
class TensorSpec:
    name: str
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)


Tensors = dict[str, tuple[Axis, ...]]
"""Axes of the tensors of a part of the model, by their names within it."""


def below(prefix: str, named: Tensors) -> Tensors:
    return {prefix + name: axes for name, axes in named.items()}
