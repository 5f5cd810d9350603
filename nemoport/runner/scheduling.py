"""The way of a job: into the queue of its model, with others into a batch, on to an instance, back with a reply."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from nemoport.runner.batching import Batching, plan
from nemoport.runner.jobs import Deliver, Job, Outcome, Reply, Run
from nemoport.runner.pace import Pace
from nemoport.runner.queueing import Queue
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.statistics import Statistics

log = logging.getLogger(__name__)


class Scheduler:
    """A thread per instance takes batches from one queue. `ordered` gives replies in the order of the requests.

    With a `pace`, a quick job that would wait for nothing is executed on the thread that submits it. Threads start
    with the first job that is queued. After `close` no job is taken, those that wait are executed, and then `finalize`
    is called, once.
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
        self._line = Line() if ordered else None
        self._pace = None if ordered else pace

    def submit(self, job: Job) -> None:
        """`job.deliver` is called from another thread, or of a quick job now. Refuses when the queue is full."""
        try:
            with self._changed:
                if self._closed:
                    raise Refusal(f"{job.request.label}model '{self._name}' is being unloaded", Code.UNAVAILABLE)
                here = self._is_for_here(job)
                if here:
                    self._executing += 1
                else:
                    self._wait_in_queue(job)
        except Refusal as refusal:
            self._statistics.refused(refusal)
            raise
        if here and self._pace is not None:
            self._execute([job], 0)
            self._pace.held_up(job, time.monotonic_ns() - job.queued)
            self._leave()

    def _is_for_here(self, job: Job) -> bool:
        if self._pace is None or not self._pace.is_quick(job) or len(self._queue) or self._executing >= self._instances:
            return False
        job.queued = time.monotonic_ns()
        return plan([job], self._batching, job.queued)[0] == 1

    def _wait_in_queue(self, job: Job) -> None:
        self._queue.put(job, time.monotonic_ns())
        self._statistics.queued()
        if self._line is not None:
            self._line.join(job)
        if not self._started:
            self._start()
        self._changed.notify()

    def close(self) -> None:
        with self._changed:
            if self._closed:
                return
            self._closed, self._batching = True, replace(self._batching, delay_ns=0)
            last = self._is_over()
            self._changed.notify_all()
        if last:
            self._finalize()

    def _start(self) -> None:
        self._started, self._threads = True, self._instances
        for instance in range(self._instances):
            threading.Thread(target=self._work, args=(instance,), name=f"{self._name}_{instance}", daemon=True).start()

    def _work(self, instance: int) -> None:
        while jobs := self._take():
            before = time.thread_time_ns()
            self._execute(jobs, instance)
            if self._pace is not None and len(jobs) == 1:
                self._pace.took(jobs[0], time.thread_time_ns() - before)
            del jobs  # not kept alive while waiting for the next
            self._leave()
        with self._changed:
            self._threads -= 1
            last = self._is_over()
        if last:
            self._finalize()

    def _leave(self) -> None:
        with self._changed:
            self._executing -= 1
            last = self._is_over()
            if len(self._queue):
                self._changed.notify()
        if last:
            self._finalize()

    def _is_over(self) -> bool:
        return self._closed and not self._threads and not self._executing

    def _take(self) -> list[Job]:
        """The next batch, when it is time for it; empty when there will be none."""
        while True:
            with self._changed:
                now = time.monotonic_ns()
                ahead = max(self._batching.max_items, 1)
                dropped = self._queue.drop(now, ahead)
                if not dropped:
                    may = len(self._queue) and self._executing < self._instances
                    count, wait = plan(self._queue, self._batching, now) if may else (0, 0)
                    if count:
                        jobs = self._queue.pop(count)
                        self._executing += 1
                        self._statistics.taken(count)
                        if len(self._queue):
                            self._changed.notify()
                        return jobs
                    if self._closed and not len(self._queue):
                        return []
                    self._wait(now, wait, ahead)
            for job, refusal in dropped:
                self._statistics.dropped(job, refusal)
                job.deliver(refusal, True)

    def _wait(self, now: int, wait: int, ahead: int) -> None:
        deadline = self._queue.next_deadline(ahead)
        ends = [wait] if wait else []
        ends += [] if deadline is None else [max(deadline - now, 1)]
        self._changed.wait(min(ends) / 1e9 if ends else None)

    def _execute(self, jobs: Sequence[Job], instance: int) -> None:
        began = time.monotonic_ns()
        try:
            outcome = self._run(jobs, instance)
        except Refusal as refusal:
            outcome = Outcome([refusal] * len(jobs), began, time.monotonic_ns())
        except Exception as error:  # the edge of an instance: these requests fail, others go on
            log.exception("model '%s' failed", self._name)
            ours = Refusal(f"internal error: {type(error).__name__}: {error}", Code.INTERNAL)
            outcome = Outcome([ours] * len(jobs), began, time.monotonic_ns())
        self._statistics.executed(jobs, outcome, began, time.monotonic_ns())
        for job, reply in zip(jobs, outcome.replies, strict=True):
            if reply is not None:
                job.deliver(reply, True)


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
