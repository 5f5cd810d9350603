"""Every pickle of a checkpoint, judged without building anything that it names.

One that the reader needs goes through the restricted unpickler; any other is only looked through, opcode by opcode.
The archives inside `.distcp` files are one for each chunk, thousands, and no reader opens their pickles: they are
counted. So is nothing else: a pickle is known by its first bytes, not by its name alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Literal

from nemoport.errors import DamagedInput, InputError, PolicyError
from nemoport.exporters.formats import torch_dist, torch_zip
from nemoport.exporters.formats.tree import Tree
from nemoport.exporters.formats.unpickle import survey, unpickle
from nemoport.exporters.tensor import Store

Verdict = Literal["clean", "suspicious, needed", "suspicious, not needed"]
LARGEST = 16 * 2**20
"""Bytes of a pickle that is looked through."""
_SUFFIXES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_IN_CHUNKS = "*.distcp/"


@dataclass(frozen=True)
class Pickle:
    path: str
    """In the checkpoint, or in the archive that holds it."""
    verdict: Verdict
    globals: tuple[str, ...] = ()
    """What it would import beyond the allow-list."""
    note: str = ""
    """Why it could not be looked through, if it could not."""


@dataclass(frozen=True)
class Found:
    pickles: tuple[Pickle, ...]
    archives: int
    """Of the `.distcp` files that are needed, whose pickles nobody opens."""


def found(tree: Tree, needed: Sequence[str]) -> Found:
    """Every pickle of a tree. `needed` are the names that the reader opens, with `*` inside a directory's level."""
    pickles: list[Pickle] = []
    archives = 0
    for name in tree.names():
        if not _may_be(name) or (store := tree.file(name)) is None:
            continue
        if not _matches(name, needed):
            pickles += _not_needed(name, store)
        elif PurePosixPath(name).name != torch_dist.INDEX:
            pickles.append(_needed(name, store, lambda store=store: _opened(store)))  # type: ignore[misc]
        else:
            parent = PurePosixPath(name).parent.as_posix()
            beside = tree if parent == "." else tree.below(parent)
            contents: list[torch_dist.Contents] = []
            pickles.append(_needed(name, store, lambda: contents.append(torch_dist.read(beside))))  # noqa: B023
            for each in contents:
                archives += each.archives
                pickles += _objects(each, needed)
    return Found(tuple(pickles), archives)


def _objects(contents: torch_dist.Contents, needed: Sequence[str]) -> Iterator[Pickle]:
    """Pickled objects among the tensors that the reader opens, such as the arguments of a run."""
    for name, store in contents.objects.items():
        if store and f"{_IN_CHUNKS}{name}" in needed:
            yield _needed(f"{store.name}/{name}", store, lambda store=store: torch_zip.load(store))  # type: ignore[misc]


def _may_be(name: str) -> bool:
    """By its name. Chunks of zarr are named by their numbers, and any bytes may begin them."""
    path = PurePosixPath(name)
    return path.suffix in _SUFFIXES or path.name == torch_dist.INDEX or (not path.suffix and not path.name.isdecimal())


def _matches(name: str, needed: Sequence[str]) -> bool:
    parts = name.split("/")
    return any(
        len(levels := pattern.split("/")) == len(parts) and all(map(fnmatchcase, parts, levels)) for pattern in needed
    )


def _opened(store: Store) -> object:
    if _head(store) == _ZIP:
        return torch_zip.load(store)
    return unpickle(bytes(store.view(0, min(store.size, torch_zip.LARGEST_PICKLE))), store.name)


def _needed(name: str, store: Store, read: Callable[[], object]) -> Pickle:
    try:
        read()
    except PolicyError:
        looked = list(_looked_through(name, store))
        beyond = tuple(dict.fromkeys(each for found in looked for each in found.globals))
        return Pickle(name, "suspicious, needed", beyond)
    except InputError:  # reading the checkpoint will say so
        pass
    return Pickle(name, "clean")


def _not_needed(name: str, store: Store) -> Iterator[Pickle]:
    for each in _looked_through(name, store):
        verdict: Verdict = "suspicious, not needed" if each.globals or each.note else "clean"
        yield Pickle(each.path, verdict, each.globals, each.note)


def _looked_through(name: str, store: Store) -> Iterator[Pickle]:
    """What opcodes say, of a bare pickle or of those in an archive of torch.save."""
    head = _head(store)
    if head == _ZIP:
        try:
            for member, content in torch_zip.pickles(store, LARGEST):
                yield _surveyed(name if member == "data.pkl" else f"{name}/{member}", content)
        except DamagedInput:
            yield Pickle(name, "clean", note="its archive cannot be read")
    elif head[:1] == _PICKLE or (head and PurePosixPath(name).suffix in (".pkl", ".pickle")):
        yield _surveyed(name, bytes(store.view(0, store.size)) if store.size <= LARGEST else None)


def _surveyed(name: str, content: bytes | None) -> Pickle:
    if content is None:
        return Pickle(name, "clean", note=f"it has more than {LARGEST:,} bytes")
    beyond, whole = survey(content)
    return Pickle(name, "clean", beyond, "" if whole else "it is damaged")


def _head(store: Store) -> bytes:
    return bytes(store.view(0, min(store.size, len(_ZIP))))
