"""Continuous batching: sequences join and leave the running batch between its steps.

    waiting  -> joining: its prompt goes through the model alone, a chunk between two steps of the others
             -> running: a row of the batch, one token a step -> ended

The state of the batch is a rectangle, rows times the positions of the longest, and never larger than the limit. When
the next step would not fit, the sequence that joined last gives up its row, waits before all others, and is computed
again from its tokens: nobody dies of memory, and the one that joined first always goes on.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from weakref import WeakSet

import numpy as np

from nemoport.runner.generation.executor import Executor
from nemoport.runner.generation.measured import Measured
from nemoport.runner.generation.sampling import Logits, Sampling, choose
from nemoport.runner.refusal import Code, Refusal

log = logging.getLogger(__name__)

_CHUNK = 256
"""Tokens of a prompt that go through the model at a time: the others wait no longer for their next token, and the
logits of a graph that answers all positions stay small."""
_PATIENCE = 5  # seconds, at the end of the process
_HEADROOM = 16
"""Steps that a sequence should have before it, when it joins others, until the batch is full."""


@dataclass(frozen=True)
class Limits:
    """`sequences` is the most rows of the batch, `positions` the most that its state holds (twice, while a step makes
    the next state from the last), `waiting` the longest queue."""

    sequences: int
    positions: int
    waiting: int = 1024


_ENGINES: WeakSet[Engine] = WeakSet()
_THREADS: WeakSet[threading.Thread] = WeakSet()


@atexit.register
def _end_all() -> None:
    """A thread that is in torch or onnxruntime, or lets go of what is theirs, while the interpreter ends would abort
    the process."""
    for engine in list(_ENGINES):
        engine.abandon()
    for thread in list(_THREADS):
        thread.join(_PATIENCE)


class Reason(Enum):
    """Why a text ends, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(eq=False, slots=True, kw_only=True)
class Continuation:
    """A prompt, and what has been made of it so far. `hear` is told each token, and says whether to go on; `end` is
    called once, after the last. Both are called from the engine's thread."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    ends: frozenset[int]
    """Tokens that end the text, and are no part of it."""
    hear: Callable[[int], bool]
    end: Callable[[Reason | Refusal], None]
    deadline: int | None = None
    """Of `time.monotonic_ns`: when it has no place by then, it is refused."""
    made: list[int] = field(default_factory=list)
    asked: int = field(default_factory=time.monotonic_ns)
    last: int | None = None
    left: Callable[[], bool] = lambda: False
    """Whether whoever asked listens no more."""
    ended: bool = False
    _cancelled: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        return (*self.prompt, *self.made)

    @property
    def positions(self) -> int:
        """In its state, while it runs: the last token is not yet there."""
        return len(self.prompt) + len(self.made) - 1

    def cancel(self) -> None:
        """Its row is free before the next step; `end` is told, too."""
        self._cancelled = True

    @property
    def cancelled(self) -> bool:
        return self._cancelled or self.left()


@dataclass
class _Joining:
    who: Continuation
    tokens: tuple[int, ...]
    done: int = 0
    state: Any = None


class Engine:
    """The thread starts with the first continuation. After `close` none is taken, and those there are finish."""

    def __init__(self, name: str, executor: Executor[Any], limits: Limits, measured: Measured) -> None:
        self.limits, self.executor = limits, executor
        self._name, self._measured = name, measured
        self.capacity = min(executor.max_positions, limits.positions)
        """Tokens of the longest sequence that can be run."""
        self._waiting: deque[Continuation] = deque()
        self._joining: _Joining | None = None
        self._running: list[Continuation] = []
        self._state: Any = None
        self._changed = threading.Condition()
        self._started = self._closed = False

    def submit(self, who: Continuation) -> None:
        """Returns at once. Refuses what could never run, and what finds the queue full."""
        needed = len(who.prompt) + who.max_tokens
        assert who.prompt, "a prompt has a token"
        assert needed <= self.capacity, "whoever asks has checked the length"
        with self._changed:
            if self._closed:
                raise Refusal(f"model '{self._name}' is being unloaded", Code.UNAVAILABLE)
            if len(self._waiting) >= self.limits.waiting:
                raise Refusal("Exceeds maximum queue size", Code.UNAVAILABLE)
            self._waiting.append(who)
            if not self._started:
                self._started = True
                thread = threading.Thread(target=self._work, name=f"{self._name}_generation", daemon=True)
                _ENGINES.add(self)
                _THREADS.add(thread)
                thread.start()
            self._changed.notify()

    def is_busy(self) -> bool:
        return bool(self._waiting or self._joining or self._running)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def abandon(self) -> None:
        """Close, and finish nothing."""
        self.close()
        joining = [self._joining.who] if self._joining else []
        for who in [*self._waiting, *joining, *self._running]:
            who.cancel()

    def _work(self) -> None:
        while self._has_work():
            self._drop()
            try:
                self._join()
                self._step()
            except Exception as error:  # the edge of the engine: these fail, those that wait go on
                log.exception("model '%s' failed", self._name)
                self._fail(Refusal(f"internal error: {type(error).__name__}: {error}", Code.INTERNAL))
            self._tell()

    def _has_work(self) -> bool:
        with self._changed:
            while not (self._waiting or self._joining or self._running):
                if self._closed:
                    return False
                self._changed.wait()
            return True

    def _drop(self) -> None:
        """Let go of the cancelled, and of those that waited too long."""
        now, gone = time.monotonic_ns(), list[tuple[Continuation, Refusal]]()
        cancelled, late = "request is cancelled", "Request timeout expired"
        with self._changed:
            for who in list(self._waiting):
                if who.cancelled:
                    gone.append((who, Refusal(cancelled, Code.CANCELLED)))
                elif not who.made and who.deadline is not None and who.deadline <= now:
                    gone.append((who, Refusal(late, Code.UNAVAILABLE)))
            for who, _ in gone:
                self._waiting.remove(who)
        if self._joining and self._joining.who.cancelled:
            gone.append((self._joining.who, Refusal(cancelled, Code.CANCELLED)))
            self._joining = None
        left = {row for row, who in enumerate(self._running) if who.cancelled}
        gone.extend((self._running[row], Refusal(cancelled, Code.CANCELLED)) for row in left)
        self._keep([row for row in range(len(self._running)) if row not in left])
        for who, refusal in gone:
            self._end(who, refusal)

    def _join(self) -> None:
        """A chunk of the prompt of the next one, when there is room for it."""
        if self._joining is None:
            with self._changed:
                if not self._waiting or not self._has_room(self._waiting[0]):
                    return
                who = self._waiting.popleft()
            self._joining = _Joining(who, who.tokens)
        joining = self._joining
        chunk = joining.tokens[joining.done : joining.done + _CHUNK]
        logits, joining.state = self.executor.prefill(chunk, joining.state)
        joining.done += len(chunk)
        if joining.done < len(joining.tokens):
            return
        self._joining = None
        if self._goes_on(joining.who, logits, None):
            states = [self._state, joining.state] if self._running else [joining.state]
            self._state = self.executor.joined(states) if len(states) > 1 else joining.state
            self._running.append(joining.who)

    def _step(self) -> None:
        """A token for each row."""
        self._make_room()
        if not self._running:
            return
        logits, self._state = self.executor.step([who.made[-1] for who in self._running], self._state)
        self._measured.stepped(len(self._running))
        likeliest = logits.argmax(axis=1).tolist()
        on = [
            row
            for row, who in enumerate(self._running)
            if self._goes_on(who, logits[row], likeliest[row] if who.sampling.greedy else None)
        ]
        self._keep(on)

    def _goes_on(self, who: Continuation, logits: Logits, token: int | None) -> bool:
        """Take the next token, from these logits unless it is known; when it was the last, end."""
        if not np.isfinite(logits.max()):
            self._end(who, Refusal(f"model '{self._name}' answered logits that are not numbers", Code.INTERNAL))
            return False
        token = choose(logits, who.sampling, len(who.made)) if token is None else token
        now = time.monotonic_ns()
        self._measured.made(who.last, who.asked, now)
        who.last = now
        who.made.append(token)
        try:
            if token not in who.ends and who.hear(token):
                reason = Reason.LENGTH if len(who.made) == who.max_tokens else None
            else:
                reason = Reason.STOP
        except Exception as error:  # whoever listens fails alone
            log.exception("a text of model '%s' failed", self._name)
            self._end(who, Refusal(f"internal error: {type(error).__name__}: {error}", Code.INTERNAL))
            return False
        if reason:
            self._measured.ended(len(who.prompt), who.asked, now)
            self._end(who, reason)
        return reason is None

    def _end(self, who: Continuation, why: Reason | Refusal) -> None:
        """Once, whatever becomes of the others."""
        if who.ended:
            return
        who.ended = True
        try:
            who.end(why)
        except Exception:  # as above
            log.exception("the end of a text of model '%s' failed", self._name)

    def _has_room(self, who: Continuation) -> bool:
        rows = len(self._running) + 1
        if rows == 1:
            return True
        left = who.max_tokens - len(who.made)
        longest = max(len(who.tokens) + min(left, _HEADROOM), self._width() + 1)
        return rows <= self.limits.sequences and rows * longest <= self.limits.positions

    def _make_room(self) -> None:
        """For the next step."""
        while len(self._running) > 1 and len(self._running) * (self._width() + 1) > self.limits.positions:
            who = self._running[-1]
            self._keep(range(len(self._running) - 1))
            self._measured.preempted()
            with self._changed:
                self._waiting.appendleft(who)

    def _width(self) -> int:
        return max((who.positions for who in self._running), default=0)

    def _keep(self, rows: Sequence[int]) -> None:
        if len(rows) == len(self._running):
            return
        self._state = self.executor.kept(self._state, rows) if rows else None
        self._running = [self._running[row] for row in rows]

    def _fail(self, refusal: Refusal) -> None:
        failed = [*self._running, *([self._joining.who] if self._joining else [])]
        self._running, self._joining, self._state = [], None, None
        for who in failed:
            self._end(who, refusal)

    def _tell(self) -> None:
        running = len(self._running)
        self._measured.holds(len(self._waiting), running, running * self._width())
