"""What a validation found, as a value: a line for each check, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nemoport.validation.measures import Distance

WORST = 10
"""Linears that are named."""


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
class Fidelity:
    """How a model predicts a text, beside its source in float32."""

    positions: int
    """Tokens predicted."""
    kl_mean: float
    """Kullback-Leibler divergence of its distribution from the source's, nats."""
    kl_p99: float
    top1: float
    """Share of positions with the same likeliest token."""
    perplexity: float
    ratio: float
    """Its perplexity over the source's."""

    @property
    def measures(self) -> dict[str, str]:
        """In words, for people."""
        return {
            "tokens": str(self.positions),
            "KL": f"{self.kl_mean:.1e}",
            "KL p99": f"{self.kl_p99:.1e}",
            "top-1": f"{self.top1:.3f}",
            "perplexity": f"{self.perplexity:.3f}",
            "more": f"{self.ratio - 1:+.2%}",
        }


@dataclass(frozen=True, kw_only=True)
class Directions:
    """How an embedding model's vectors lie, beside its source's."""

    texts: int
    cosine_mean: float
    cosine_min: float
    nearest: float
    """The share of each text's ten nearest that are its ten nearest in the source too."""

    @property
    def measures(self) -> dict[str, str]:
        return {
            "texts": str(self.texts),
            "mean cosine": f"{self.cosine_mean:.5f}",
            "least cosine": f"{self.cosine_min:.5f}",
            "nearest kept": f"{self.nearest:.1%}",
        }


@dataclass(frozen=True, kw_only=True)
class Labels:
    """How a classifier or a reranker labels texts, beside its source."""

    texts: int
    kl_mean: float
    kl_max: float
    top1: float
    moved: float
    """The share of pairs of texts that a label puts in another order."""

    @property
    def measures(self) -> dict[str, str]:
        return {
            "texts": str(self.texts),
            "KL": f"{self.kl_mean:.1e}",
            "KL at most": f"{self.kl_max:.1e}",
            "top-1": f"{self.top1:.3f}",
            "pairs moved": f"{self.moved:.1%}",
        }


Measured = Fidelity | Directions | Labels


@dataclass(frozen=True)
class Rounding:
    """What quantizing did to a linear."""

    relative: float
    """||w' - w|| / ||w||."""
    sqnr: float
    """The same in decibels."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What a recipe did, and what it cost."""

    method: str
    algorithm: str
    """ModelOpt's word for it."""
    calibration: str | None
    """The digest of what its statistics were taken from."""
    excluded: tuple[str, ...]
    """What was left plain, in the target's words."""
    text: str
    """What it was judged on."""
    digest: str
    """Of the tokens of that text."""
    found: Measured
    floor: Measured
    """The source itself, computed in bfloat16."""
    linears: Mapping[str, Rounding]

    @property
    def worst(self) -> dict[str, Rounding]:
        """The ten linears that lost most."""
        ordered = sorted(self.linears.items(), key=lambda each: each[1].relative, reverse=True)
        return dict(ordered[:WORST])


@dataclass(frozen=True, kw_only=True)
class Service:
    """How a model met its clients, on the runner. Seconds and bytes; None where it was not measured."""

    checks: tuple[Check, ...]
    load_seconds: float | None = None
    memory: int | None = None
    """Resident bytes that the server grew by."""
    first_seconds: float | None = None
    latencies: tuple[float, ...] = ()
    """Of requests after the first, one at a time."""

    @property
    def percentiles(self) -> dict[str, float]:
        """The nearest latency at or above each rank; none where nothing was timed."""
        ordered = sorted(self.latencies)
        return {f"p{rank}": ordered[math.ceil(rank / 100 * len(ordered)) - 1] for rank in (50, 95, 99) if ordered}

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)


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
    layers: Mapping[str, float] = field(default_factory=dict)
    """What the artifact's dtype or quantization does to the source: the relative error of what enters each layer."""
    quantization: Quantization | None = None
    """Where nemoport itself quantized it."""
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        data = {"passed": self.passed, **_finite(asdict(self))}
        if self.quantization:
            data["quantization"]["worst"] = list(self.quantization.worst)
        return data


@dataclass(frozen=True, kw_only=True)
class Section:
    """One model of a repository: compared with its source where nemoport made it, served where it is live."""

    model: str
    answers: Report | None = None
    service: Service | None = None

    @property
    def passed(self) -> bool:
        parts = [part.passed for part in (self.answers, self.service) if part]
        return bool(parts) and all(parts)

    @property
    def checks(self) -> tuple[Check, ...]:
        return tuple(check for part in (self.service, self.answers) if part for check in part.checks)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Everything that one validation found."""

    subject: str
    sections: tuple[Section, ...]

    @property
    def passed(self) -> bool:
        return bool(self.sections) and all(section.passed for section in self.sections)

    def as_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "subject": self.subject,
            "models": [
                {
                    "model": section.model,
                    "passed": section.passed,
                    "service": _as_json(section.service) if section.service else None,
                    "answers": section.answers.as_json() if section.answers else None,
                }
                for section in self.sections
            ],
        }


def _as_json(service: Service) -> dict[str, Any]:
    return {"passed": service.passed, **_finite(asdict(service)), "latency_seconds": service.percentiles}


def _finite(value: Any) -> Any:
    """JSON has no infinity: an infinite distance is written as null."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
