"""Signing what was published."""

from __future__ import annotations

from pathlib import Path

from nemoport import artifact
from nemoport.errors import UsageError
from nemoport.repository import history, journal, provenance, publish, signing
from nemoport.repository.change import Done, unchanged
from nemoport.repository.journal import Write
from nemoport.repository.storage import changing
from nemoport.repository.versions import evidence_of, number_of, state


def sign(repository: Path, name: str, version: str | None, key: Path) -> Done:
    """Sign a version's build statement, or that of the version that is served; its files are verified first."""
    state(repository, name)
    private = signing.private_key(key)
    with changing(repository, name):
        known = state(repository, name)
        number = known.served if version is None else number_of(version)
        if number is None or number not in known.every:
            raise UsageError(f"{name} in {repository} has no version {version or 'that is live'} to sign")
        evidence = evidence_of(repository, name) / str(number)
        made = artifact.read_manifest(evidence)
        publish.verify(known.model / known.directory(number), evidence, made)
        statement = artifact.json_bytes(provenance.statement(made, evidence, name, number))
        envelope = signing.sign(statement, private).decode()
        place = evidence / signing.FILE
        if place.is_file() and place.read_text() == envelope:
            return unchanged(known, "sign", number)
        told = evidence_of(repository, name) / history.FILE
        details = {"key": signing.keyid(private.public_key())}
        event = history.following(told, "sign", number, known.live, None, details)
        journal.commit(repository, name, [Write(place, envelope)], event)
        done = unchanged(state(repository, name), "sign", number)
        return Done(**{**vars(done), "already": False, "details": details})
