"""What generation has done and how fast, as the metrics tell it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Lock

QUANTILES = (0.5, 0.95, 0.99)
_RECENT = 4096  # observations of which quantiles are taken
_WINDOW_NS = 10 * 10**9  # over which tokens per second are counted


@dataclass
class Summary:
    """Quantiles of what was seen lately, count and sum of everything."""

    count: int = 0
    sum: int = 0
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def add(self, value: int) -> None:
        self.count += 1
        self.sum += value
        self.recent.append(value)

    def quantiles(self) -> dict[float, int]:
        """The smallest value that so large a share of them does not exceed; nothing of nothing."""
        ordered = sorted(self.recent)
        last = len(ordered) - 1
        return {share: ordered[min(int(share * len(ordered)), last)] for share in QUANTILES} if ordered else {}


@dataclass
class Measured:
    """Times are nanoseconds."""

    prompt_tokens: int = 0
    tokens: int = 0
    requests: int = 0
    preemptions: int = 0
    waiting: int = 0
    running: int = 0
    cached: int = 0
    first_token: Summary = field(default_factory=Summary)
    between_tokens: Summary = field(default_factory=Summary)
    whole: Summary = field(default_factory=Summary)
    batch: Summary = field(default_factory=Summary)
    _made: deque[int] = field(default_factory=lambda: deque(maxlen=_RECENT))
    _lock: Lock = field(default_factory=Lock)

    def made(self, since: int | None, asked: int, now: int) -> None:
        """A token; `since` is when the one before it of its request was made."""
        with self._lock:
            self.tokens += 1
            self._made.append(now)
            (self.first_token if since is None else self.between_tokens).add(now - (asked if since is None else since))

    def stepped(self, rows: int) -> None:
        """The model was asked for so many tokens at once."""
        with self._lock:
            self.batch.add(rows)

    def ended(self, prompt: int, asked: int, now: int) -> None:
        with self._lock:
            self.requests += 1
            self.prompt_tokens += prompt
            self.whole.add(now - asked)

    def preempted(self) -> None:
        with self._lock:
            self.preemptions += 1

    def holds(self, waiting: int, running: int, cached: int) -> None:
        self.waiting, self.running, self.cached = waiting, running, cached

    def tokens_per_second(self) -> int:
        """Over the last seconds, or the part of them since the first token."""
        now = time.monotonic_ns()
        with self._lock:
            lately = [at for at in self._made if now - at < _WINDOW_NS]
        return len(lately) * 10**9 // max(now - lately[0], 10**6) if lately else 0

    def lines(self, row: Row, labels: str) -> Iterator[str]:
        """A metric in Prometheus' text format."""
        found = row.value(self)
        if isinstance(found, int):
            yield f"{row.name}{{{labels}}} {found}"
            return
        with self._lock:
            quantiles, count, total = found.quantiles(), found.count, found.sum
        for share, value in quantiles.items():
            yield f'{row.name}{{{labels},quantile="{share}"}} {value // row.unit}'
        yield f"{row.name}_count{{{labels}}} {count}"
        yield f"{row.name}_sum{{{labels}}} {total // row.unit}"


@dataclass(frozen=True)
class Row:
    name: str
    kind: str
    help: str
    value: Callable[[Measured], int | Summary]
    unit: int = 1


_US = 1000
ROWS = (
    Row("nv_generation_request_success", "counter", "Number of texts generated to their end", lambda m: m.requests),
    Row("nv_generation_prompt_tokens", "counter", "Number of tokens in their prompts", lambda m: m.prompt_tokens),
    Row("nv_generation_tokens", "counter", "Number of tokens generated", lambda m: m.tokens),
    Row(
        "nv_generation_preemption_count",
        "counter",
        "Number of times that a sequence gave up its place and was computed again",
        lambda m: m.preemptions,
    ),
    Row("nv_generation_pending_request_count", "gauge", "Sequences that wait for a place", lambda m: m.waiting),
    Row("nv_generation_running_request_count", "gauge", "Sequences in the running batch", lambda m: m.running),
    Row("nv_generation_cached_positions", "gauge", "Positions that the state of the batch holds", lambda m: m.cached),
    Row(
        "nv_generation_tokens_per_second",
        "gauge",
        "Tokens generated per second, over the last ten seconds",
        lambda m: m.tokens_per_second(),
    ),
    Row(
        "nv_generation_batch_size_summary",
        "summary",
        "Sequences in one execution of the model",
        lambda m: m.batch,
    ),
    Row(
        "nv_generation_time_to_first_token_summary_us",
        "summary",
        "From the request to its first token, in microseconds",
        lambda m: m.first_token,
        _US,
    ),
    Row(
        "nv_generation_inter_token_latency_summary_us",
        "summary",
        "Between two tokens of one request, in microseconds",
        lambda m: m.between_tokens,
        _US,
    ),
    Row(
        "nv_generation_request_duration_summary_us",
        "summary",
        "From the request to its last token, in microseconds",
        lambda m: m.whole,
        _US,
    ),
)
