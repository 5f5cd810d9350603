"""Labels: names for versions, which servers understand.

`stable` is what config.pbtxt serves to requests that name no version. Any other label, such as `canary`, compiles to
configs/LABEL.pbtxt, the same config with its own list of versions: servers that are started with
`--model-config-name LABEL` on the same tree serve the labelled version, and all others do not see it.
"""

from __future__ import annotations

import re
from pathlib import Path

from nemoport.errors import UsageError
from nemoport.repository import gate
from nemoport.repository.change import Done, Wanted, make, unchanged
from nemoport.repository.promote import promote
from nemoport.repository.retreat import rollback
from nemoport.repository.storage import changing
from nemoport.repository.versions import STABLE, is_live, number_of, state

_LABEL = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def label(repository: Path, name: str, word: str, version: str, *, force: bool = False) -> Done:
    """Give a version a label, and take it from the one that had it. A staged version passes the same gate as for a
    promotion, because servers of that label will serve it."""
    _check(word)
    known, number = state(repository, name), number_of(version)
    if word == STABLE:
        if number in known.live:
            return rollback(repository, name, version)
        return promote(repository, name, version, force=force)
    with changing(repository, name):
        known = state(repository, name)
        if number not in known.every:
            raise UsageError(
                f"{name} in {repository} has no version {version}; it has {', '.join(map(str, known.every))}"
            )
        if not is_live(repository, name):
            raise UsageError(
                f"{name} in {repository} has no live version for {word} to stand beside; "
                f"run: nemoport repo promote {repository} {name}"
            )
        if known.labels.get(word) == number:
            return unchanged(known, "label", number)
        admitted = None if number in known.live else gate.check(repository, known, number, force=force)
        wanted = Wanted(live=known.live, labels={**known.labels, word: number})
        details = {"label": word, "from": known.labels.get(word)}
        return make(repository, known, wanted, "label", number, details, admitted=admitted)


def unlabel(repository: Path, name: str, word: str) -> Done:
    """Take a label away; its version stays where it is."""
    _check(word)
    if word == STABLE:
        raise UsageError(f"{STABLE} is what {name} serves by itself; retire its versions instead")
    state(repository, name)
    with changing(repository, name):
        known = state(repository, name)
        if word not in known.labels:
            return unchanged(known, "unlabel", None)
        wanted = Wanted(live=known.live, labels={other: v for other, v in known.labels.items() if other != word})
        return make(repository, known, wanted, "unlabel", known.labels[word], {"label": word})


def _check(word: str) -> None:
    if not _LABEL.fullmatch(word):
        raise UsageError(f"{word!r} cannot be a label; use letters, digits, '_' and '-', a letter first")
