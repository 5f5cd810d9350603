"""What a model version has done so far, as `GET .../stats` and the metrics tell it."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from threading import Lock
from typing import Any

from nemoport.runner.jobs import Deliver, Job, Later, Outcome, Reply
from nemoport.runner.refusal import Code, Refusal

_PHASES = ("compute_input", "compute_infer", "compute_output")
TIMED = ("request", "queue", *_PHASES)
"""What the last requests took, piece by piece."""
_LAST = 2048  # requests of which that is remembered
FIRST_RESPONSE_MS = (100, 500, 2000, 5000)
"""Upper ends of the buckets in which first responses of decoupled models are counted: Triton's."""
_OF_REQUEST = ("success", "fail", "queue", *_PHASES, "cache_hit", "cache_miss")
_OF_RESPONSE = ("compute_infer", "compute_output", "success", "fail", "empty_response", "cancel")


class Failure(Enum):
    """Why a request failed, as the label `reason` of a metric has it."""

    REJECTED = "REJECTED"
    CANCELED = "CANCELED"
    BACKEND = "BACKEND"
    OTHER = "OTHER"


_REASONS = {Code.UNAVAILABLE: Failure.REJECTED, Code.CANCELLED: Failure.CANCELED}


@dataclass(slots=True)
class Duration:
    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """So much time in all, of so many."""
        self.count += count
        self.ns += ns


def _durations(names: Sequence[str]) -> dict[str, Duration]:
    return {name: Duration() for name in names}


@dataclass
class Statistics:
    last_inference: int = 0
    """Milliseconds since 1970."""
    inference_count: int = 0
    execution_count: int = 0
    requests: dict[str, Duration] = field(default_factory=lambda: _durations(_OF_REQUEST))
    batches: dict[int, dict[str, Duration]] = field(default_factory=dict)
    responses: dict[int, dict[str, Duration]] = field(default_factory=dict)
    failures: Counter[Failure] = field(default_factory=Counter)
    pending: int = 0
    """Requests that wait to be executed: the scheduler counts them, under its own lock."""
    last: deque[tuple[int, ...]] = field(default_factory=lambda: deque(maxlen=_LAST))
    """Nanoseconds of each of TIMED, of the requests that went well."""
    first_responses: Counter[int] = field(default_factory=Counter)
    """How many fell into each bucket of FIRST_RESPONSE_MS; the number of buckets is the one beyond them."""
    first_response_ns: int = 0
    _lock: Lock = field(default_factory=Lock)

    def dropped(self, job: Job, refusal: Refusal) -> None:
        """It waited, and will not be executed."""
        self.failed(time.monotonic_ns() - job.queued, refusal)

    def refused(self, refusal: Refusal) -> None:
        """It did not come as far as the queue."""
        self.failed(0, refusal)

    def failed(self, ns: int, refusal: Refusal) -> None:
        with self._lock:
            self._failed(ns, _REASONS.get(refusal.code, Failure.OTHER))

    def answered(self, ns: int) -> None:
        """One request, in an execution of its own."""
        with self._lock:
            self.last_inference = time.time_ns() // 1_000_000
            self.inference_count += 1
            self.execution_count += 1
            self.last.append((ns, 0, 0, ns, 0))
            row = self.batches.setdefault(1, _durations(_PHASES))
            for name, spent in (("success", ns), ("queue", 0), *zip(_PHASES, (0, ns, 0), strict=True)):
                self.requests[name].add(spent)
                if name in row:
                    row[name].add(spent)

    def first_response(self, ns: int) -> None:
        with self._lock:
            self._first_response(ns)

    def executed(self, jobs: Sequence[Job], outcome: Outcome, began: int, ended: int) -> None:
        """One execution: every request of it is charged its whole time, as Triton does, unless it goes on."""
        told = [pair for pair in zip(jobs, outcome.replies, strict=True) if pair[1] is not Later.LATER]
        if not told:
            return
        spent = (outcome.infer_began - began, outcome.infer_ended - outcome.infer_began, ended - outcome.infer_ended)
        items = good = waited = 0
        with self._lock:
            self.last_inference = time.time_ns() // 1_000_000
            self.execution_count += 1
            for job, reply in told:
                items += job.items
                if isinstance(reply, Refusal):
                    self._failed(ended - job.queued, Failure.BACKEND)
                    continue
                good += 1
                waited += began - job.queued
                self.inference_count += job.items
                self.last.append((ended - job.queued, began - job.queued, *spent))
            self.requests["success"].add(waited + good * (ended - began), good)
            self.requests["queue"].add(waited, good)
            if items not in self.batches:
                self.batches[items] = _durations(_PHASES)
            for phase, ns in zip(_PHASES, spent, strict=True):
                self.requests[phase].add(good * ns, good)
                self.batches[items][phase].add(ns)

    def counted(self, deliver: Deliver) -> Deliver:
        """The same, and each response of the request is counted, by its place among them."""
        index, before = 0, time.monotonic_ns()

        def count(reply: Reply | None, last: bool) -> None:
            nonlocal index, before
            now = time.monotonic_ns()
            outcome = "empty_response" if reply is None else "fail" if isinstance(reply, Refusal) else "success"
            with self._lock:
                if not index:
                    self._first_response(now - before)
                row = self.responses.setdefault(index, _durations(_OF_RESPONSE))
                row[outcome].add(now - before)
                if reply is not None:
                    row["compute_infer"].add(now - before)
                    row["compute_output"].add(0)
            index, before = index + 1, now
            deliver(reply, last)

        return count

    def quantiles(self, which: Sequence[float]) -> dict[str, list[int]]:
        """Of each of TIMED, in nanoseconds, over the last requests."""
        with self._lock:
            rows = list(self.last)
        columns = [sorted(column) for column in zip(*rows, strict=True)] or [[] for _ in TIMED]
        return {
            name: [column[min(int(each * len(column)), len(column) - 1)] if column else 0 for each in which]
            for name, column in zip(TIMED, columns, strict=True)
        }

    def as_json(self, name: str, version: int) -> dict[str, Any]:
        with self._lock:
            return {
                "name": name,
                "version": str(version),
                "last_inference": self.last_inference,
                "inference_count": self.inference_count,
                "execution_count": self.execution_count,
                "inference_stats": _shown(self.requests),
                "response_stats": {str(index): _shown(row) for index, row in sorted(self.responses.items())},
                "batch_stats": [{"batch_size": size, **_shown(row)} for size, row in sorted(self.batches.items())],
                "memory_usage": [],
            }

    def _first_response(self, ns: int) -> None:
        self.first_responses[bisect_left(FIRST_RESPONSE_MS, ns / 1e6)] += 1
        self.first_response_ns += ns

    def _failed(self, ns: int, reason: Failure) -> None:
        self.requests["fail"].add(ns)
        self.failures[reason] += 1


def _shown(durations: dict[str, Duration]) -> dict[str, Any]:
    return {name: asdict(duration) for name, duration in durations.items()}
