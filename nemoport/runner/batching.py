"""Which waiting jobs make a batch, and how a batch of arrays is put together and taken apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nemoport.runner.jobs import Job, Outcome, Reply, Run
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.tensors import Array

Execute = Callable[[Mapping[str, Array], Sequence[str]], list[Array]]


@dataclass(frozen=True)
class Batching:
    """How far jobs are merged. `max_items` 0 is one job at a time."""

    max_items: int = 0
    preferred: frozenset[int] = frozenset()
    delay_ns: int = 0


def batching_of(config: ModelConfig) -> Batching:
    if not config.HasField("dynamic_batching") or config.max_batch_size < 1:
        return Batching()
    said = config.dynamic_batching
    return Batching(
        config.max_batch_size, frozenset(said.preferred_batch_size), said.max_queue_delay_microseconds * 1000
    )


def plan(jobs: Iterable[Job], batching: Batching, now: int) -> tuple[int, int]:
    """How many of the first jobs to execute now; when none yet, how many nanoseconds from now to ask again.

    As Triton: within the delay a preferred size is taken and else waited for; after it, all that fits.
    """
    items = count = best = 0
    kind: tuple[object, ...] | None = None
    oldest, full = now, False
    for job in jobs:
        if count and (job.kind != kind or items + job.items > batching.max_items):
            full = True
            break
        kind, oldest = job.kind, min(oldest, job.queued)
        count, items = count + 1, items + job.items
        if items in batching.preferred:
            best = count
        if items >= batching.max_items:
            full = True
            break
    left = oldest + batching.delay_ns - now
    if best and left > 0:
        return best, 0
    return (count, 0) if full or left <= 0 else (0, left)


def merged(execute: Execute) -> Run:
    """Jobs as one call on arrays. When a batch fails each job is tried alone, so that none fails by its neighbour."""

    def run(jobs: Sequence[Job], instance: int) -> Outcome:
        wanted = tuple(dict.fromkeys(name for job in jobs for name in job.wanted))
        feeds = jobs[0].feeds if len(jobs) == 1 else _joined(jobs)
        began = time.monotonic_ns()
        try:
            arrays = execute(feeds, wanted)
        except Refusal as refusal:
            replies = [refusal] if len(jobs) == 1 else [run([job], instance).replies[0] for job in jobs]
            return Outcome(replies, began, time.monotonic_ns())
        ended = time.monotonic_ns()
        outputs = dict(zip(wanted, arrays, strict=True))
        return Outcome([outputs] if len(jobs) == 1 else _parted(jobs, outputs), began, ended)

    return run


def _joined(jobs: Sequence[Job]) -> dict[str, Array]:
    return {name: np.concatenate([job.feeds[name] for job in jobs]) for name in jobs[0].feeds}


def _parted(jobs: Sequence[Job], outputs: Mapping[str, Array]) -> list[Reply]:
    total, start = sum(job.items for job in jobs), 0
    for name, array in outputs.items():
        if array.shape[:1] != (total,):
            refusal = Refusal(
                f"output '{name}' has shape {list(array.shape)} for a batch of {total}; the model does not keep the "
                "batch in the first dimension, serve it with max_batch_size: 0",
                Code.INTERNAL,
            )
            return [refusal] * len(jobs)
    replies: list[Reply] = []
    for job in jobs:
        replies.append({name: outputs[name][start : start + job.items] for name in job.wanted})
        start += job.items
    return replies
