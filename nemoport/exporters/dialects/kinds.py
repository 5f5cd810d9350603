"""Layers of two kinds, those with a window and those without. `kinds` says which each is, one word a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nemoport.exporters.configs import Config
from nemoport.exporters.dialects.rows import Scaling
from nemoport.exporters.words import Words, by_layer, collapsed

LOCAL, GLOBAL = "sliding_attention", "full_attention"


def windows(kinds: Callable[[Config], list[str]], window: Callable[[Config], int | None]) -> Callable[[Config], Words]:
    return lambda config: {"window": collapsed([window(config) if kind == LOCAL else None for kind in kinds(config)])}


def ropes(
    kinds: Callable[[Config], list[str]],
    window: Callable[[Config], int | None],
    local: Callable[[Config], float],
    far: Callable[[Config], tuple[float, Scaling]],
) -> Callable[[Config], Words]:
    """Layers without a window have another rope, and may be scaled."""

    def of(config: Config) -> Words:
        near, (base, scaling) = (window(config), local(config), None), far(config)
        each = [near if kind == LOCAL else (None, base, scaling) for kind in kinds(config)]
        return {
            word: collapsed(values)
            for word, values in zip(("window", "rope_base", "rope_scaling"), zip(*each, strict=True), strict=True)
        }

    return of


def kinds_of(words: Words) -> list[str]:
    return [LOCAL if window else GLOBAL for window in by_layer(words, "window")]


def or_none(into: Callable[[Any], int], value: Any) -> int | None:
    return None if value is None else into(value)


def first(words: Words, word: str, kind: str, otherwise: Any = None) -> Any:
    """The value of a word in the first layer of a kind."""
    kinds = zip(by_layer(words, word), kinds_of(words), strict=True)
    return next((value for value, its in kinds if its == kind), otherwise)


def known(kinds: Sequence[str], count: int) -> list[str]:
    if unknown := set(kinds) - {LOCAL, GLOBAL}:
        raise ValueError(unknown)
    if len(kinds) != count:
        raise ValueError(f"{len(kinds)} kinds of {count} layers")
    return list(kinds)
