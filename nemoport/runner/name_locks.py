"""A lock a model: loads of different models go on at once, and an ensemble's holds its own while its members load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, get_ident


class WaitsForItself(Exception):
    """The lock would never be given: whoever has it waits, perhaps over others, for one that is held here."""

    def __init__(self, held: list[str]) -> None:
        super().__init__()
        self.held = held
        """By the thread that asked, in the order in which it took them."""


class NameLocks:
    def __init__(self) -> None:
        self._changed = Condition()
        self._holders: dict[str, int] = {}
        """Name to thread, in the order in which they were taken."""
        self._waits_for: dict[int, str] = {}
        """Thread to name."""

    def names(self) -> list[str]:
        """Those that are held."""
        return list(self._holders)

    @contextmanager
    def held(self, name: str) -> Iterator[None]:
        """In the block nobody else has the name. A thread may hold several; raises WaitsForItself."""
        me = get_ident()
        with self._changed:
            self._waits_for[me] = name
            try:
                while name in self._holders:
                    if self._waits_for_me(name, me):
                        raise WaitsForItself([held for held, by in self._holders.items() if by == me])
                    self._changed.wait()
            finally:
                del self._waits_for[me]
            self._holders[name] = me
        try:
            yield
        finally:
            with self._changed:
                del self._holders[name]
                self._changed.notify_all()

    def _waits_for_me(self, name: str | None, me: int) -> bool:
        """Whether the name's holder is this thread, or waits for it."""
        while name in self._holders:
            if (holder := self._holders[name]) == me:
                return True
            name = self._waits_for.get(holder)
        return False
