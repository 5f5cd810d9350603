"""Promotion: a version that was proven goes live.

The new version is added to those that are live, and as the highest it answers every request that names none; the
versions before it stay for clients that pin them, and for the way back. The config is replaced last and at once: that
is the moment at which servers see it. A model that was never live is put together beside the repository and moved into
it whole.
"""

from __future__ import annotations

from pathlib import Path

from nemoport.errors import UsageError
from nemoport.repository import gate
from nemoport.repository.change import Done, Wanted, make, unchanged
from nemoport.repository.storage import changing
from nemoport.repository.versions import State, number_of, state


def promote(repository: Path, name: str, version: str | None = None, *, force: bool = False) -> Done:
    """Make a version live: `7`, `staging-7`, or the newest that is staged. It needs a green verdict on exactly its
    bytes; `force` takes a red one, which is recorded, and none takes a version that was never validated."""
    state(repository, name)  # a wrong name is refused before anything is made
    with changing(repository, name):
        known = state(repository, name)
        number = _number(repository, known, version)
        if number in known.live:
            return unchanged(known, "promote", number)
        admitted = gate.check(repository, known, number, force=force)
        wanted = Wanted(live=(*known.live, number), labels=known.labels)
        return make(repository, known, wanted, "promote", number, {"from": known.served}, admitted=admitted)


def _number(repository: Path, known: State, version: str | None) -> int:
    number = number_of(version) if version is not None else known.next_up if known.next_up is not None else known.served
    if number is None or number not in known.every:
        raise UsageError(
            f"{known.name} in {repository} has no version {version or 'to promote'}; "
            f"staged: {_list(known.staged)}, live: {_list(known.live)}"
            + (f", not served: {_list(known.unlisted)}" if known.unlisted else "")
        )
    return number


def _list(versions: tuple[int, ...]) -> str:
    return ", ".join(map(str, versions)) or "none"
