"""Jobs that wait for a model: levels of priority, how long each may be, and how long a job may wait in it.

level 1   [job job job]  then those that are late, where the policy delays them
level 2   [job]
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from nemoport.runner.jobs import Job
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.refusal import Code, Refusal

_US = 1000


@dataclass(frozen=True)
class Policy:
    """A ModelQueuePolicy; 0 is no limit, and a late job is refused or executed after those that are not."""

    max_size: int = 0
    timeout_us: int = 0
    may_override: bool = False
    rejects_late: bool = True

    def deadline(self, asked_us: int, now: int) -> int | None:
        """A request may shorten the time that the policy gives, and no more."""
        timeout = min(asked_us, self.timeout_us) if self.may_override and asked_us else self.timeout_us
        return now + timeout * _US if timeout else None


@dataclass
class Level:
    policy: Policy
    waiting: deque[Job] = field(default_factory=deque)
    late: deque[Job] = field(default_factory=deque)


class Queue:
    """Not locked: its scheduler has the lock."""

    def __init__(self, policies: tuple[Policy, ...] = (Policy(),), default_priority: int = 1) -> None:
        self._levels = [Level(policy) for policy in policies]
        self._default, self._size = default_priority, 0
        self._times_out = any(policy.timeout_us for policy in policies)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Job]:
        """In the order of execution."""
        return chain.from_iterable(chain(level.waiting, level.late) for level in self._levels)

    def put(self, job: Job, now: int) -> None:
        level = self._levels[(job.priority if 0 < job.priority <= len(self._levels) else self._default) - 1]
        if 0 < level.policy.max_size <= len(level.waiting) + len(level.late):
            raise Refusal(f"{job.request.label}Exceeds maximum queue size", Code.UNAVAILABLE)
        job.queued, job.deadline = now, level.policy.deadline(job.timeout_us, now)
        level.waiting.append(job)
        self._size += 1

    def pop(self, count: int) -> list[Job]:
        taken: list[Job] = []
        for level in self._levels:
            for line in (level.waiting, level.late):
                while line and len(taken) < count:
                    taken.append(line.popleft())
        self._size -= len(taken)
        return taken

    def drop(self, now: int, ahead: int) -> list[tuple[Job, Refusal]]:
        """Take out the cancelled and the late of the first `ahead` jobs; where the policy says so, the late wait on."""
        dropped = []
        for job in list(islice(self, ahead)):
            late = job.deadline is not None and job.deadline <= now
            if job.cancelled or late:
                level = next(level for level in self._levels if job in level.waiting or job in level.late)
                (level.waiting if job in level.waiting else level.late).remove(job)
                if job.cancelled:
                    dropped.append((job, Refusal(f"{job.request.label}request is cancelled", Code.CANCELLED)))
                elif level.policy.rejects_late:
                    dropped.append((job, Refusal(f"{job.request.label}Request timeout expired", Code.UNAVAILABLE)))
                else:
                    job.deadline = None
                    level.late.append(job)
        self._size -= len(dropped)
        return dropped

    def next_deadline(self, ahead: int) -> int | None:
        if not self._times_out:
            return None
        return min((job.deadline for job in islice(self, ahead) if job.deadline is not None), default=None)


def queue_of(config: ModelConfig) -> Queue:
    if not config.HasField("dynamic_batching"):
        return Queue()
    batching = config.dynamic_batching
    if not batching.priority_levels:
        return Queue((_policy(batching.default_queue_policy),))
    own = batching.priority_queue_policy
    levels = range(1, batching.priority_levels + 1)
    policies = tuple(_policy(own.get(level, batching.default_queue_policy)) for level in levels)
    return Queue(policies, batching.default_priority_level)


def _policy(message: Any) -> Policy:
    return Policy(
        message.max_queue_size,
        message.default_timeout_microseconds,
        message.allow_timeout_override,
        message.timeout_action == message.REJECT,
    )
