"""Optimization profiles from a signature: between which shapes a plan works, and for which its kernels are chosen.

An axis has a name in the signature, and bounds here; `total`, the length of a decoder's attention mask, is what was
before and what is new.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

from nemoport.artifact import Signature, Tensor
from nemoport.errors import UsageError

BATCH, SEQUENCE, PAST, TOTAL = "batch", "sequence", "past", "total"


@dataclass(frozen=True)
class Bounds:
    least: int
    best: int
    most: int

    def __add__(self, other: Bounds) -> Bounds:
        return Bounds(self.least + other.least, self.best + other.best, self.most + other.most)


def bounds(signature: Signature, longest: int, given: Iterable[str]) -> dict[str, Bounds]:
    """Of every axis that varies: as given, `NAME=LEAST:BEST:MOST`, or as is usual for texts of up to `longest`."""
    varies = dict.fromkeys(axis for tensor in signature.inputs for axis in tensor.shape if isinstance(axis, str))
    free = [axis for axis in (BATCH, SEQUENCE, PAST) if axis in varies]
    found = _usual(free, longest) | _given(given, free)
    if PAST in found:
        found[TOTAL] = found[PAST] + found[SEQUENCE]
    assert found.keys() == varies.keys(), varies
    tokens = found.get(TOTAL, found[SEQUENCE]).most
    if tokens > longest:
        way_out = f"{SEQUENCE}=LEAST:BEST:MOST" + (f" and {PAST}=LEAST:BEST:MOST" if PAST in found else "")
        raise UsageError(
            f"the profile has {tokens} tokens of a text, and the model takes {longest}; say --axis {way_out}"
        )
    return found


def _given(texts: Iterable[str], free: list[str]) -> dict[str, Bounds]:
    found: dict[str, Bounds] = {}
    for text in texts:
        axis, bounded = _read(text, free)
        if axis in found:
            raise UsageError(f"--axis {axis} is given twice; a plan has one profile, so give its bounds once")
        found[axis] = bounded
    return found


def shapes(signature: Signature, known: Mapping[str, Bounds]) -> dict[str, list[list[int]]]:
    """Of each input its least, its best and its greatest shape."""
    sizes = {axis: astuple(each) for axis, each in known.items()}

    def shape(tensor: Tensor, number: int) -> list[int]:
        return [sizes[axis][number] if isinstance(axis, str) else axis for axis in tensor.shape]

    return {tensor.name: [shape(tensor, number) for number in range(3)] for tensor in signature.inputs}


def _usual(free: list[str], longest: int) -> dict[str, Bounds]:
    """A decoder is asked token by token after a prompt, which comes in pieces of a quarter."""
    piece = min(512, max(1, longest // 4) if PAST in free else longest)
    before = min(1536, longest - piece)
    usual = {
        BATCH: Bounds(1, 1, 8),
        SEQUENCE: Bounds(1, 1 if PAST in free else min(128, piece), piece),
        PAST: Bounds(0, min(512, before), before),
    }
    return {axis: usual[axis] for axis in free}


def _read(text: str, free: list[str]) -> tuple[str, Bounds]:
    axis, _, numbers = text.partition("=")
    if axis not in free:
        raise UsageError(f"--axis {text} bounds no axis of the model, which has {', '.join(free)}")
    try:
        found = Bounds(*map(int, numbers.split(":")))
    except (TypeError, ValueError):
        raise UsageError(f"--axis {text} does not say {axis}=LEAST:BEST:MOST, as {axis}=1:4:8") from None
    if not 0 <= found.least <= found.best <= found.most or not found.most or (not found.least and axis != PAST):
        raise UsageError(f"--axis {text} does not rise from 1, or of {PAST} from 0; give {axis}=1:4:8, for example")
    return axis, found
