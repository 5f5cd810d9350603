"""`push` and `pull`: the live and labelled versions of a repository, with their evidence, to another place and back.

A version's manifest goes first and claims its number; its files follow, and last the config that lists it: until then
no server sees it. What is there already is not sent again, so the same command continues where it stopped. A model that
is new to an object store, which cannot rename, is put together beside the repository and copied into it there, its
config last. The history of a model only ever grows: who would overwrite one that has gone another way is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemoport import artifact
from nemoport.errors import DamagedInput, PolicyError, UsageError
from nemoport.repository import config, history, journal, values
from nemoport.repository.journal import Move, Step, Write
from nemoport.repository.publish import check_paths, served, verify
from nemoport.repository.remote import Remote, lock
from nemoport.repository.storage import changing, need_room
from nemoport.repository.versions import State, evidence_of, is_live, staging_area, state

PULLED = ".pull-"


@dataclass(frozen=True, kw_only=True)
class Sent:
    model: str
    versions: tuple[int, ...]
    files: int
    """How many went over the line; the others were there."""
    bytes: int
    already: bool
    """The other side was up to date."""


@dataclass(frozen=True, kw_only=True)
class _Tree:
    """What a model is at one moment, without the versions' files."""

    texts: dict[str, bytes]
    """config.pbtxt and what belongs to it, by relative path."""
    versions: tuple[int, ...]
    told: bytes
    """Its history."""


def push(repository: Path, remote: Remote, names: Sequence[str]) -> list[Sent]:
    """Models that are live; each is all there or as it was."""
    sent = []
    with lock(remote) as renew:
        for name in names:
            with changing(repository, name):  # what a killed process began is finished first
                known = state(repository, name)
                if not is_live(repository, name):
                    raise UsageError(f"{name} is not live in {repository}; promote a version of it, then push")
                tree = _tree_of(repository, known)
            sent.append(_push(repository, known, tree, remote, renew))
    return sent


def _push(repository: Path, known: State, tree: _Tree, remote: Remote, renew: Callable[[], None]) -> Sent:
    name, files, size = known.name, 0, 0
    there = remote.read(f"{remote.evidence}/{name}/{history.FILE}") or b""
    if not tree.told.startswith(there):
        raise PolicyError(
            f"{remote} has events of {name} that {repository} does not; pull it into another directory, and publish "
            "there what is missing"
        )
    whole = remote.read(f"{remote.root}/{name}/{config.FILE}") is not None
    place = f"{remote.root if whole else remote.staging}/{name}"
    for version in tree.versions:
        evidence = evidence_of(repository, name) / str(version)
        made = artifact.read_manifest(evidence)
        renew()
        _claim(remote, name, version, (evidence / artifact.MANIFEST).read_bytes())
        present = remote.sizes(f"{place}/{version}")
        missing = [file for file in served(made).files if present.get(file.path) != file.size]
        if missing:
            verify(known.model / known.directory(version), evidence, made)
        for file in missing:
            renew()
            remote.upload(known.model / known.directory(version) / file.path, f"{place}/{version}/{file.path}")
            files, size = files + 1, size + file.size
        for document in sorted(evidence.iterdir()):
            _write_if_other(remote, f"{remote.evidence}/{name}/{version}/{document.name}", document.read_bytes())
    renew()
    for path, text in tree.texts.items():
        if path != config.FILE:
            _write_if_other(remote, f"{place}/{path}", text)
    changed = _write_if_other(remote, f"{place}/{config.FILE}", tree.texts[config.FILE])
    if not whole:
        _arrive(remote, name, [*tree.texts], tree.versions)
    for path in remote.sizes(f"{remote.root}/{name}/{config.LABELS}"):
        if f"{config.LABELS}/{path}" not in tree.texts:
            remote.files.rm_file(f"{remote.root}/{name}/{config.LABELS}/{path}")
    told = _write_if_other(remote, f"{remote.evidence}/{name}/{history.FILE}", tree.told)
    already = not (files or changed or told)
    return Sent(model=name, versions=tree.versions, files=files, bytes=size, already=already)


def _claim(remote: Remote, name: str, version: int, manifest: bytes) -> None:
    path = f"{remote.evidence}/{name}/{version}/{artifact.MANIFEST}"
    there = remote.read(path)
    if there is None:
        remote.write(path, manifest)
    elif there != manifest:
        raise PolicyError(
            f"version {version} of {name} is another artifact in {remote}; pull that repository into another "
            "directory, and publish there what is missing"
        )


def _write_if_other(remote: Remote, path: str, content: bytes) -> bool:
    if remote.read(path) == content:
        return False
    remote.write(path, content)
    return True


def _arrive(remote: Remote, name: str, texts: list[str], versions: Sequence[int]) -> None:
    """A model that is new there goes from the staging area into the repository."""
    source, target = f"{remote.staging}/{name}", f"{remote.root}/{name}"
    if remote.renames:
        remote.files.makedirs(remote.root, exist_ok=True)
        Path(source).rename(target)
        return
    for version in versions:
        for file in remote.sizes(f"{source}/{version}"):
            remote.files.cp_file(f"{source}/{version}/{file}", f"{target}/{version}/{file}")
    for text in sorted(texts, key=lambda path: path == config.FILE):
        remote.files.cp_file(f"{source}/{text}", f"{target}/{text}")
    remote.files.rm(source, recursive=True)


def pull(remote: Remote, repository: Path, names: Sequence[str]) -> list[Sent]:
    """Models as they are there; versions that are only here stay, and are served as before only where the config
    from there lists them."""
    return [_pull(remote, repository, name) for name in names]


def _pull(remote: Remote, repository: Path, name: str) -> Sent:
    tree = _tree_there(remote, name)
    with changing(repository, name):
        area = staging_area(repository) / f"{PULLED}{name}"
        here = is_live(repository, name) or (staging_area(repository) / name).exists()
        known = state(repository, name) if here else None
        path = evidence_of(repository, name) / history.FILE
        told = path.read_bytes() if path.is_file() else b""
        if known and told.startswith(tree.told):
            shutil.rmtree(area, ignore_errors=True)
            return Sent(model=name, versions=tree.versions, files=0, bytes=0, already=True)
        if not tree.told.startswith(told):
            raise PolicyError(
                f"{repository} has events of {name} that {remote} does not; pull into another directory, and publish "
                "there what is missing"
            )
        model = known.model if known else area / "model"
        steps, files, size = list[Step](), 0, 0
        for version in tree.versions:
            if known and version in (*known.live, *known.unlisted):
                continue
            if known and version in known.staged:
                steps.append(Move(known.model / known.directory(version), known.model / str(version)))
                continue
            count, amount = _fetch(remote, repository, name, version, area)
            files, size = files + count, size + amount
            if known:
                steps.append(Move(area / "model" / str(version), model / str(version)))
            steps.append(Move(area / "evidence" / str(version), evidence_of(repository, name) / str(version)))
        if known:
            ordered = sorted(tree.texts.items(), key=lambda item: item[0] == config.FILE)
            steps += [Write(model / text, content.decode()) for text, content in ordered]
        else:
            for text, content in tree.texts.items():
                (model / text).parent.mkdir(parents=True, exist_ok=True)
                (model / text).write_bytes(content)
        artifact.settle_on_disk(area) if area.is_dir() else None
        if not is_live(repository, name):
            steps.append(Move(model, repository.resolve() / name))
        evidence_of(repository, name).mkdir(exist_ok=True)
        journal.commit(repository, name, [*steps, Write(path, tree.told.decode())], None)
        shutil.rmtree(area, ignore_errors=True)
        return Sent(model=name, versions=tree.versions, files=files, bytes=size, already=False)


def _fetch(remote: Remote, repository: Path, name: str, version: int, area: Path) -> tuple[int, int]:
    """A version and its evidence, verified. What an earlier attempt brought is kept; a file that is not as it should
    be is dropped, for the next attempt."""
    evidence, files = area / "evidence" / str(version), area / "model" / str(version)
    for document in remote.sizes(f"{remote.evidence}/{name}/{version}"):
        remote.download(f"{remote.evidence}/{name}/{version}/{document}", evidence / document)
    made = artifact.read_manifest(evidence)
    check_paths(evidence, made)
    missing = [
        file
        for file in served(made).files
        if not (files / file.path).is_file() or (files / file.path).stat().st_size != file.size
    ]
    need_room(repository, sum(file.size for file in missing))
    for file in missing:
        remote.download(f"{remote.root}/{name}/{version}/{file.path}", files / file.path)
    try:
        verify(files, evidence, made)
    except DamagedInput as error:
        shutil.rmtree(files)
        raise DamagedInput(
            f"what {remote} holds of {name} {version} differs from its manifest: {error}; push it again"
        ) from error
    return len(missing), sum(file.size for file in missing)


def _tree_of(repository: Path, known: State) -> _Tree:
    paths = [config.FILE, values.FILE, *(f"{config.LABELS}/{label}.pbtxt" for label in known.labels)]
    told = evidence_of(repository, known.name) / history.FILE
    return _Tree(
        texts={path: (known.model / path).read_bytes() for path in paths if (known.model / path).is_file()},
        versions=tuple(sorted({*known.live, *known.labels.values()})),
        told=told.read_bytes() if told.is_file() else b"",
    )


def _tree_there(remote: Remote, name: str) -> _Tree:
    place, texts, versions = f"{remote.root}/{name}", dict[str, bytes](), set[int]()
    labels = [f"{config.LABELS}/{path}" for path in remote.sizes(f"{place}/{config.LABELS}")]
    for path in (values.FILE, *sorted(labels), config.FILE):
        if (content := remote.read(f"{place}/{path}")) is not None:
            texts[path] = content
            if path != values.FILE:
                versions.update(config.parse(content.decode(), f"{remote}/{name}/{path}").versions)
    if config.FILE not in texts:
        raise UsageError(f"{remote} has no model {name!r}; it has {', '.join(remote.models()) or 'none'}")
    told = remote.read(f"{remote.evidence}/{name}/{history.FILE}") or b""
    return _Tree(texts=texts, versions=tuple(sorted(versions)), told=told)
