"""Versions of engines: read from what people and packages write, and put in order."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_FORM = re.compile(r"v?(\d+(?:\.\d+)*)(?:(?:a|b|rc)(\d+))?(?:[.+-].*)?")
FINAL = 1 << 30
"""The place of a release among its candidates."""


@dataclass(frozen=True, order=True)
class Version:
    numbers: tuple[int, ...]
    """Without zeros at the end, so that 1.3 is 1.3.0."""
    candidate: int = FINAL
    """20 of 1.3.0rc20."""
    said: str = field(default="", compare=False)
    spelt: tuple[int, ...] = field(default=(), compare=False)
    """With its zeros: 1.1.0 is one release, 1.1 a line of them."""

    def __str__(self) -> str:
        return self.said

    def within(self, line: Version) -> bool:
        """One of the releases that begin so: 1.2.1 of 1.2."""
        padded = self.spelt + (0,) * max(0, len(line.spelt) - len(self.spelt))
        return padded[: len(line.spelt)] == line.spelt


def version(text: str) -> Version | None:
    """`1.2.1`, `0.17.0.post1`, `1.3.0rc20`, `0.24.0+092c4842.nv26.7`; None for anything else."""
    if (found := _FORM.fullmatch(text)) is None:
        return None
    spelt = tuple(int(number) for number in found[1].split("."))
    numbers = list(spelt)
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return Version(tuple(numbers), int(found[2]) if found[2] else FINAL, text, spelt)


def known(text: str) -> Version:
    """Of a row, which is a version."""
    found = version(text)
    assert found is not None, text
    return found
