"""The way of a job: into the queue of its model, with others into a batch, on to an instance, back with a reply."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from nemoport.runner.batching import Batching, plan
from nemoport.runner.jobs import Deliver, Job, Later, Outcome, Reply, Run, WhenIdle
from nemoport.runner.pace import Pace
from nemoport.runner.queueing import Queue
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.statistics import Statistics

log = logging.getLogger(__name__)


class Scheduler:
    """A thread per instance takes batches from one queue. `ordered` gives replies in the order of the requests.

    With a `pace`, quick jobs are executed by the thread that reads requests, when it has nothing more to read: handing
    them to another would cost more, and until then others come that fit into the batch. Threads start with the first
    job that needs them. After `close` no job is taken, those that wait are executed, and then `finalize` is called,
    once.
    """

    def __init__(
        self,
        name: str,
        run: Run,
        instances: int,
        *,
        batching: Batching,
        queue: Queue,
        statistics: Statistics,
        ordered: bool = False,
        pace: Pace | None = None,
        finalize: Callable[[], None] = lambda: None,
    ) -> None:
        self._name, self._run, self._instances, self._finalize = name, run, instances, finalize
        self._batching, self._queue, self._statistics = batching, queue, statistics
        self._changed = threading.Condition()
        self._threads = self._executing = 0
        self._started = self._closed = False
        self._promised = False
        """A thread that reads requests will come when it is idle."""
        self._line = Line() if ordered else None
        self._pace = pace

    def submit(self, job: Job, when_idle: WhenIdle | None = None) -> None:
        """`job.deliver` is called from another thread, or by `when_idle`. Refuses when the queue is full."""
        promise = False
        try:
            with self._changed:
                if self._closed:
                    raise Refusal(f"{job.request.label}model '{self._name}' is being unloaded", Code.UNAVAILABLE)
                self._queue.put(job, time.monotonic_ns())
                self._statistics.pending += 1
                if self._line is not None:
                    self._line.join(job)
                if when_idle is None or not self._is_quick(job):
                    self._wake()
                elif not self._promised:
                    self._promised = promise = True
        except Refusal as refusal:
            self._statistics.refused(refusal)
            raise
        if promise and when_idle is not None:
            when_idle(self._work_here)

    def is_busy(self) -> bool:
        return bool(self._executing or len(self._queue))

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed, self._batching = True, replace(self._batching, delay_ns=0)
            if len(self._queue):
                self._wake()
            last = self._is_over()
            self._changed.notify_all()
        if last:
            self._end()

    def _end(self) -> None:
        """A model that fails as it says goodbye keeps neither the server nor another model from ending."""
        try:
            self._finalize()
        except BaseException:
            log.exception("model '%s' failed at its end", self._name)

    def _wake(self) -> None:
        if not self._started:
            self._started, self._threads = True, self._instances
            for instance in range(self._instances):
                name = f"{self._name}_{instance}"
                threading.Thread(target=self._work, args=(instance,), name=name, daemon=True).start()
        self._changed.notify()

    def _work(self, instance: int) -> None:
        while jobs := self._take():
            self._perform(jobs, instance)
            del jobs  # not kept alive while waiting for the next
        with self._changed:
            self._threads -= 1
            last = self._is_over()
        if last:
            self._end()

    def _work_here(self) -> None:
        """What is not quick, or has to wait, is left to the threads."""
        while jobs := self._take_here():
            self._perform(jobs, 0)

    def _perform(self, jobs: Sequence[Job], instance: int) -> None:
        before = time.thread_time_ns()
        self._execute(jobs, instance)
        if self._pace is not None:
            self._pace.took(jobs, time.thread_time_ns() - before)
        with self._changed:
            self._executing -= 1
            last = self._is_over()
            if len(self._queue) and not self._promised:
                self._wake()
        if last:
            self._end()

    def _is_over(self) -> bool:
        return self._closed and not self._threads and not self._executing and not len(self._queue)

    def _take(self) -> list[Job]:
        """The next batch, when it is time for it; empty when there will be none."""
        while True:
            with self._changed:
                now = time.monotonic_ns()
                dropped = self._drop(now)
                if not dropped:
                    jobs, wait = self._due(self._queue, now)
                    if jobs:
                        if len(self._queue):
                            self._wake()
                        return jobs
                    if self._closed and not len(self._queue):
                        return []
                    self._wait(now, wait)
            self._tell(dropped)

    def _take_here(self) -> list[Job]:
        with self._changed:
            if not len(self._queue):
                self._promised = False
                return []
            now = time.monotonic_ns()
            dropped = self._drop(now)
            jobs, _ = self._due(takewhile(self._is_quick, self._queue), now)
            if not jobs:
                self._promised = False
                self._wake()
        self._tell(dropped)
        return jobs

    def _due(self, waiting: Iterable[Job], now: int) -> tuple[list[Job], int]:
        """A batch, if it is time for one, else in how many nanoseconds to ask again; 0 is when something changes."""
        may = len(self._queue) and self._executing < self._instances
        count, wait = plan(waiting, self._batching, now) if may else (0, 0)
        if count:
            self._executing += 1
            self._statistics.pending -= count
        return self._queue.pop(count), wait

    def _drop(self, now: int) -> list[tuple[Job, Refusal]]:
        dropped = self._queue.drop(now, self._ahead())
        self._statistics.pending -= len(dropped)
        return dropped

    def _is_quick(self, job: Job) -> bool:
        return self._pace is not None and self._pace.is_quick(job)

    def _ahead(self) -> int:
        return max(self._batching.max_items, 1)

    def _tell(self, dropped: Sequence[tuple[Job, Refusal]]) -> None:
        for job, refusal in dropped:
            self._statistics.dropped(job, refusal)
            self._answer(job, refusal)

    def _wait(self, now: int, wait: int) -> None:
        deadline = self._queue.next_deadline(self._ahead())
        ends = [wait] if wait else []
        ends += [] if deadline is None else [max(deadline - now, 1)]
        self._changed.wait(min(ends) / 1e9 if ends else None)

    def _execute(self, jobs: Sequence[Job], instance: int) -> None:
        began = time.monotonic_ns()
        try:
            outcome = self._run(jobs, instance)
        except Refusal as refusal:
            outcome = Outcome([refusal] * len(jobs), began, time.monotonic_ns())
        except BaseException as error:  # the edge of an instance: these requests fail, others go on
            log.exception("model '%s' failed", self._name)
            ours = Refusal(f"internal error: {type(error).__name__}: {error}", Code.INTERNAL)
            outcome = Outcome([ours] * len(jobs), began, time.monotonic_ns())
        self._statistics.executed(jobs, outcome, began, time.monotonic_ns())
        for job, reply in zip(jobs, outcome.replies, strict=True):
            if not (reply is None or isinstance(reply, Later)):
                self._answer(job, reply)

    def _answer(self, job: Job, reply: Reply) -> None:
        """The last of a job. Whoever waits for one may fail over it; the others of its batch wait too."""
        try:
            job.deliver(reply, True)
        except Exception:
            log.exception("an answer of model '%s' could not be delivered", self._name)


@dataclass(slots=True)
class _Place:
    deliver: Deliver
    reply: Reply | None = None
    there: bool = False


class Line:
    """Jobs whose replies are given on in the order in which they joined."""

    def __init__(self) -> None:
        self._places: deque[_Place] = deque()
        self._lock = threading.Lock()

    def join(self, job: Job) -> None:
        place = _Place(job.deliver)
        self._places.append(place)

        def deliver(reply: Reply | None, last: bool) -> None:
            with self._lock:
                place.reply, place.there = reply, True
                while self._places and self._places[0].there:
                    head = self._places.popleft()
                    head.deliver(head.reply, True)

        job.deliver = deliver
