"""What was done to a model, by whom and when: one line an event, in REPO.evidence/NAME/history.jsonl.

Each line holds the digest of the line before it, so none can be changed or left out unseen. An event is written
together with what it tells of, by the journal: it stands here if, and only if, it took place.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blake3 import blake3

from nemoport import __version__
from nemoport.artifact import sync_directory
from nemoport.errors import DamagedInput
from nemoport.repository.lock import user

FILE = "history.jsonl"


@dataclass(frozen=True, kw_only=True)
class Event:
    number: int
    what: str
    """publish, promote, rollback, retire, prune, label, unlabel, config, sign."""
    version: int | None
    live: tuple[int, ...]
    """What the model's config lists from here on."""
    config: str | None = None
    """BLAKE3 of the config from here on; None while there is none at work."""
    when: str
    by: str
    producer: str
    previous: str | None
    """BLAKE3 of the line before."""
    details: Mapping[str, Any] = field(default_factory=dict)


def following(
    path: Path, what: str, version: int | None, live: tuple[int, ...], config: str | None, details: Mapping[str, Any]
) -> Event:
    """The next event of a history, made now by whoever runs this."""
    lines = _lines(path)
    return Event(
        number=len(lines) + 1,
        what=what,
        version=version,
        live=live,
        config=config,
        when=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        by=f"{user()}@{socket.gethostname()}",
        producer=f"nemoport {__version__}",
        previous=blake3(lines[-1]).hexdigest() if lines else None,
        details=dict(details),
    )


def line(event: Event) -> bytes:
    data = {name: getattr(event, name) for name in Event.__dataclass_fields__ if name != "details"}
    return json.dumps(data | dict(event.details), ensure_ascii=False).encode() + b"\n"


def append(path: Path, written: bytes) -> None:
    """Once, however often it is asked for; a line that was torn by a crash is taken away first."""
    lines = _lines(path)
    if lines and lines[-1] == written:
        return
    with path.open("ab") as file:
        file.truncate(sum(map(len, lines)))
        file.write(written)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(path.parent)


def read(path: Path) -> tuple[Event, ...]:
    try:
        return tuple(_event(json.loads(each)) for each in _lines(path))
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedInput(f"{path} is not a history that nemoport wrote ({error!r}); restore it") from error


def check(path: Path) -> None:
    """Every line must hold the digest of the one before it."""
    lines, previous = _lines(path), None
    for number, (event, written) in enumerate(zip(read(path), lines, strict=True), 1):
        if (event.number, event.previous) != (number, previous):
            raise DamagedInput(f"{path}: event {number} does not follow from the line before it; restore the file")
        previous = blake3(written).hexdigest()


def _lines(path: Path) -> list[bytes]:
    """Whole lines only."""
    content = path.read_bytes() if path.is_file() else b""
    return [each for each in content.splitlines(keepends=True) if each.endswith(b"\n")]


def _event(data: dict[str, Any]) -> Event:
    own = {name: data.pop(name) for name in Event.__dataclass_fields__ if name != "details"}
    return Event(**{**own, "live": tuple(own["live"]), "details": data})
