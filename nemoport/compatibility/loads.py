"""What a manifest's `loads` says, read: `TensorRT-LLM 0.8 to 1.2 (trtllm-build)` as an engine and its releases.

    NAME [ VERSION or later | VERSION to VERSION | up to VERSION | VERSION ] [ on GPUs of SM N [or later] ] [ words ]

VERSION is a line: 1.2 has 1.2.1 in it, and 1.x all of 1. A line of `loads` is for people first: one that begins with no
engine of NAMES says nothing of a runtime.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from nemoport.compatibility.versions import Version, known

NAMES: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("ONNX Runtime",),
    "tensorrt": ("TensorRT",),
    "tensorrt_llm": ("TensorRT-LLM",),
    "vllm": ("vLLM", "Triton's vLLM backend"),
    "sglang": ("SGLang",),
    "nim": ("NIM",),
    "pytorch": ("Triton's pytorch backend",),
    "python": ("Triton's python backend",),
    "triton": ("Triton",),
}
"""An engine, and what people call it."""
_ENGINES = {name: engine for engine, names in NAMES.items() for name in names}
_VERSION = r"\d+(?:\.\d+)*(?:\.x|(?:a|b|rc)\d+)?(?:\.post\d+)?"
_FORM = re.compile(
    rf"(?P<name>{'|'.join(sorted(map(re.escape, _ENGINES), key=len, reverse=True))})(?![\w'-])"
    rf"(?: (?:(?P<since>{_VERSION}) (?:or later|to (?P<to>{_VERSION}))"
    rf"|up to (?P<through>{_VERSION})|(?P<only>{_VERSION})))?"
    r"(?!\.?\w)(?: on GPUs of SM (?P<sm>\d+)(?P<newer> or later)?)?"
)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One line of `loads`: releases of one engine, on some GPUs."""

    engine: str
    since: Version | None = None
    through: Version | None = None
    """Its whole line; None where there is no end."""
    sm: int | None = None
    """None is any."""
    newer_sm: bool = False
    """GPUs that came later too."""

    @property
    def releases(self) -> str:
        """In words, after the engine's name."""
        if self.since is None:
            return f"up to {self.through}" if self.through else ""
        if self.through is None:
            return f"{self.since} or later"
        return str(self.since) if self.since == self.through else f"{self.since} to {self.through}"

    def __str__(self) -> str:
        gpus = f"on GPUs of SM {self.sm}{' or later' * self.newer_sm}" if self.sm else ""
        return " ".join(filter(None, (NAMES[self.engine][0], self.releases, gpus)))

    @property
    def bounded(self) -> bool:
        return self.since is not None or self.through is not None

    def has(self, version: Version) -> bool:
        """`version` may be a line itself: 1.2 is in `1.2.1`, some of it."""
        if self.since and version < self.since and not (version.within(self.since) or self.since.within(version)):
            return False
        return not self.through or version <= self.through or version.within(self.through)

    def runs_on(self, sm: int) -> bool:
        return self.sm is None or self.sm == sm or (self.newer_sm and self.sm < sm)


def claim(line: str) -> Claim | None:
    """None for what is for people alone."""
    if (found := _FORM.match(line)) is None:
        return None
    since, through = found["since"] or found["only"], found["to"] or found["through"] or found["only"]
    return Claim(
        engine=_ENGINES[found["name"]],
        since=_line(since),
        through=_line(through),
        sm=int(found["sm"]) if found["sm"] else None,
        newer_sm=bool(found["newer"]),
    )


def claims(loads: Iterable[str]) -> tuple[Claim, ...]:
    return tuple(found for line in loads if (found := claim(line)))


def _line(text: str | None) -> Version | None:
    return replace(known(text.removesuffix(".x")), said=text) if text else None
