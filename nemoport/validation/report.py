"""What a validation found, as a value: a line for each check, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nemoport.validation.measures import Distance


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    passed: bool
    found: str
    needed: str
    distance: Distance | None = None
    used: float | None = None
    """The share of its bound that the distance used up: how near it came to failing, or how far beyond it went."""


@dataclass(frozen=True, kw_only=True)
class Report:
    subject: str
    kind: str
    artifact: str
    """BLAKE3 of the manifest: the verdict is on these bytes and no others."""
    source: Mapping[str, Any]
    executed_by: str
    checks: tuple[Check, ...]
    noise_floor: Mapping[str, Distance] = field(default_factory=dict)
    """By prompt: the source itself, computed in the artifact's dtype."""
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **_finite(asdict(self))}


def _finite(value: Any) -> Any:
    """JSON has no infinity: an infinite distance is written as null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
