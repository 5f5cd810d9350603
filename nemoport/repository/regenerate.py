"""Generating a model's config anew, from its newest manifest and its owner's values."""

from __future__ import annotations

from pathlib import Path

from blake3 import blake3

from nemoport import artifact
from nemoport.compatibility import Runtime
from nemoport.errors import PolicyError, UsageError
from nemoport.repository import config, history, stamps, values
from nemoport.repository.change import Done, Wanted, make, unchanged
from nemoport.repository.storage import changing
from nemoport.repository.versions import evidence_of, state


def regenerate(repository: Path, name: str, *, runtime: Runtime | None = None, force: bool = False) -> Done:
    """Write config.pbtxt anew, with the same live versions, and the configs of labels after it. What was edited in it
    by hand would be lost: that is refused without `force`."""
    state(repository, name)
    with changing(repository, name):
        known = state(repository, name)
        path, place = known.model / config.FILE, known.model / values.FILE
        shown = known.served if known.served is not None else known.every[-1]
        made = artifact.read_manifest(evidence_of(repository, name) / str(shown))
        text = place.read_text() if place.is_file() else ""
        if runtime is not None:
            text = values.with_release(text, stamps.release_of(runtime))
        said = values.read(text, str(place))
        wanted = values.generated(said, made, name, known.config.versions)
        for number in known.live:
            other = artifact.read_manifest(evidence_of(repository, name) / str(number))
            if runtime is not None:
                stamps.check(other, runtime, f"version {number} of {name} is live")
            needs = config.from_artifact(other, name, number, said.max_batch_size)
            if reason := config.mismatch(wanted, needs):
                raise PolicyError(f"the config of {name} would not serve version {number}: {reason}; edit {place}")
        new, old = config.render(wanted), path.read_text()
        if new == old and text == (place.read_text() if place.is_file() else ""):
            return unchanged(known, "config", None)
        if config.edited(old) and not force:
            raise UsageError(
                f"{path} was edited by hand since it was generated; move what you changed to {place}, then run this "
                "again with --force"
            )
        change = Wanted(live=known.live, labels=known.labels, text=new, values=text)
        return make(repository, known, change, "config", None, {"triton_release": said.triton_release})


def keep(repository: Path, name: str) -> Done:
    """Put a config that was edited by hand on record as it is, and let the configs of labels follow it."""
    state(repository, name)
    with changing(repository, name):
        known = state(repository, name)
        text = (known.model / config.FILE).read_text()
        told = evidence_of(repository, name) / history.FILE
        left = next((event.config for event in reversed(history.read(told)) if event.config), None)
        if left == blake3(text.encode()).hexdigest():
            return unchanged(known, "config", None)
        return make(repository, known, Wanted(live=known.live, labels=known.labels), "config", None, {"kept": True})
