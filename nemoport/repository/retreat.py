"""The ways back: `rollback` to a version that was served before, `retire` one, `prune` the files of those that nobody
needs. Evidence and history stay, and no number is ever used again."""

from __future__ import annotations

from pathlib import Path

from nemoport.errors import PolicyError, UsageError
from nemoport.repository import history
from nemoport.repository.change import Done, Wanted, make, unchanged
from nemoport.repository.storage import changing
from nemoport.repository.versions import State, evidence_of, number_of, state


def rollback(repository: Path, name: str, version: str | None = None) -> Done:
    """Serve a live version that is not the highest, by taking those above it from the config; their files stay. Without
    a version, the newest promotion is taken back, once: the same command again finds it done."""
    state(repository, name)
    with changing(repository, name):
        known = state(repository, name)
        if version is None and _last(repository, name) == "rollback":
            return unchanged(known, "rollback", known.served)
        number = number_of(version) if version is not None else max(known.live[:-1], default=None)
        if number is None:
            raise UsageError(f"{name} in {repository} serves no version before {known.served}; there is no way back")
        if number not in known.live:
            raise UsageError(
                f"version {number} of {name} is not live, only {', '.join(map(str, known.live)) or 'none'}; "
                f"run: nemoport repo promote {repository} {name} {number}"
            )
        if number == known.served:
            return unchanged(known, "rollback", number)
        wanted = Wanted(live=[each for each in known.live if each <= number], labels=known.labels)
        return make(repository, known, wanted, "rollback", number, {"from": known.served})


def retire(repository: Path, name: str, version: str) -> Done:
    """Serve a version no more; its files stay. With its last version a model leaves the repository, for the staging
    area, because a server does not start on a model without one."""
    state(repository, name)
    with changing(repository, name):
        known, number = state(repository, name), number_of(version)
        if number not in known.every or number in known.staged:
            raise UsageError(f"{name} in {repository} serves no version {version}; it serves {_list(known)}")
        if number not in known.live:
            return unchanged(known, "retire", number)
        live = [each for each in known.live if each != number]
        if labels := [label for label, each in known.labels.items() if each == number or not live]:
            raise PolicyError(
                f"version {number} of {name} is needed by the label {labels[0]}; move the label, or take it away with: "
                f"nemoport repo label {repository} {name} {labels[0]} --remove"
            )
        wanted = Wanted(live=live, labels=known.labels)
        return make(repository, known, wanted, "retire", number, {"from": known.served})


def prune(repository: Path, name: str, keep: int) -> Done:
    """Keep the `keep` newest live versions, those with a label, and staged ones that are newer than what is served;
    remove the files of all others."""
    if keep < 1:
        raise UsageError(f"--keep {keep} would leave nothing to serve; keep 1 or more, or retire the versions")
    state(repository, name)
    with changing(repository, name):
        known = state(repository, name)
        leaving = superfluous(known, keep)
        if not leaving:
            return unchanged(known, "prune", None)
        wanted = Wanted(live=[each for each in known.live if each not in leaving], labels=known.labels, leaving=leaving)
        return make(repository, known, wanted, "prune", None, {"removed": list(leaving)})


def superfluous(known: State, keep: int) -> tuple[int, ...]:
    served = known.served if known.served is not None else -1
    waiting = [each for each in known.staged if each > served]
    kept = {*known.live[-keep:], *known.labels.values(), *(waiting if known.live else waiting[-keep:])}
    return tuple(each for each in known.every if each not in kept)


def _last(repository: Path, name: str) -> str | None:
    """The newest event that changed what is served."""
    events = history.read(evidence_of(repository, name) / history.FILE)
    return next((event.what for event in reversed(events) if event.what in ("promote", "rollback", "retire")), None)


def _list(known: State) -> str:
    return ", ".join(map(str, known.live)) or "none"
