"""The plots of a validation's page, as SVG to be set into it."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from nemoport.errors import MissingPackage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "nemoport", "font.family": "sans-serif", "font.size": 9}
"""Text as text, and the same bytes for the same numbers."""
INK = "#1f5c99"


def by_layer(errors: Mapping[str, float]) -> str:
    """Relative error of what enters each layer."""
    figure, axes = _axes("what enters layer", "relative error")
    axes.plot(range(len(errors)), list(errors.values()), marker="o", markersize=3, color=INK)
    axes.set_ylim(bottom=0)
    last = len(errors) - 1
    places = sorted({0, last, *range(0, last, max(1, last // 8))})
    axes.set_xticks(places, ["head" if place == last else str(place) for place in places])
    return _svg(figure)


def latencies(seconds: Sequence[float]) -> str:
    figure, axes = _axes("milliseconds", "requests")
    axes.hist([1e3 * each for each in seconds], bins=min(20, len(seconds)), color=INK)
    axes.locator_params(axis="y", integer=True)
    return _svg(figure)


def bounds(used: Mapping[str, float]) -> str:
    """The share of its bound that each check used up; over 1 is a failure."""
    figure, axes = _axes("share of its bound", "", height=0.6 + 0.22 * len(used))
    names = list(used)[::-1]
    values = [min(used[name], 2.0) for name in names]
    axes.barh(names, values, color=["#b3261e" if used[name] > 1 else INK for name in names])
    axes.axvline(1, color="black", linewidth=0.8)
    return _svg(figure)


def _axes(across: str, up: str, height: float = 2.2) -> tuple[Figure, Axes]:
    if find_spec("matplotlib") is None:
        raise MissingPackage("matplotlib", "report", "the plots of report.html")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(6.4, height), layout="constrained")
        axes = figure.add_subplot()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: Figure) -> str:
    """Without its XML prologue, which has no place inside of a page."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"^.*?(?=<svg)", "", out.getvalue(), count=1, flags=re.DOTALL)
