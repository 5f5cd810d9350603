"""Threads for what would keep a door waiting: two pools, so that no request of a model waits for loads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

_CONTROL = 64  # they are started when needed, and mostly wait


@dataclass(frozen=True)
class Threads:
    infer: Executor
    """For bodies that are large, and prompts."""
    control: Executor
    """For loads and unloads, which may take as long as a model likes, and the index."""


@contextmanager
def threads(infer: int) -> Iterator[Threads]:
    """At its end what was begun in them is done."""
    with ThreadPoolExecutor(infer, "infer") as inferring, ThreadPoolExecutor(_CONTROL, "control") as controlling:
        yield Threads(inferring, controlling)
