"""A repository somewhere else: on S3, on GCS, or in another directory, through fsspec.

URL/NAME/...            as a tritonserver reads it, which is started on the URL
URL.evidence/NAME/...   as beside a repository on disk
URL.staging/NAME/...    a model that is new there, until it is whole
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, MachineError, MissingPackage, UsageError
from nemoport.repository.lock import Owner, as_bytes, ourselves, read_owner

LOCK = ".lock"
EXPIRY = 600.0
"""Seconds after which a writer that did not renew its lock is taken for gone. It is renewed before each file."""


@dataclass(frozen=True)
class Remote:
    files: Any
    """An fsspec file system."""
    root: str
    renames: bool
    """Whether a directory can be renamed at once; object stores cannot."""

    @property
    def evidence(self) -> str:
        return f"{self.root}.evidence"

    @property
    def staging(self) -> str:
        return f"{self.root}.staging"

    def __str__(self) -> str:
        return str(self.files.unstrip_protocol(self.root))

    def read(self, path: str) -> bytes | None:
        try:
            content: bytes = self.files.cat_file(path)
        except FileNotFoundError:
            return None
        return content

    def write(self, path: str, content: bytes) -> None:
        """Whole and at once: an object appears when it is complete, a file by a rename."""
        if not self.renames:
            self.files.pipe_file(path, content)
            return
        parent, _, name = path.rpartition("/")
        self.files.makedirs(parent, exist_ok=True)
        self.files.pipe_file(f"{parent}/.{name}.part", content)
        Path(f"{parent}/.{name}.part").replace(path)

    def upload(self, source: Path, path: str) -> None:
        """A large file; half of one has another name, or is not there."""
        if not self.renames:
            self.files.put_file(str(source), path)
            return
        parent, _, name = path.rpartition("/")
        self.files.makedirs(parent, exist_ok=True)
        self.files.put_file(str(source), f"{parent}/.{name}.part")
        Path(f"{parent}/.{name}.part").replace(path)

    def download(self, path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        self.files.get_file(path, str(part))
        part.replace(target)

    def sizes(self, directory: str) -> dict[str, int]:
        """Every file below a directory, by its relative path."""
        try:
            found = self.files.find(directory, detail=True)
        except FileNotFoundError:
            return {}
        head = f"{directory}/"
        sizes = {path.removeprefix(head): row["size"] for path, row in found.items() if path.startswith(head)}
        if outside := [path for path in sizes if ".." in path.split("/") or path.startswith("/")]:
            raise DamagedInput(f"{self} holds {directory}/{outside[0]}, which would lie outside of it; remove it there")
        return sizes

    def models(self) -> tuple[str, ...]:
        """Every model with a config: one without is not whole yet."""
        configs = (path for path in self.sizes(self.root) if path.count("/") == 1 and path.endswith("/config.pbtxt"))
        return tuple(sorted(path.partition("/")[0] for path in configs))


def is_url(text: str) -> bool:
    return "://" in text


def connect(url: str) -> Remote:
    """Credentials and endpoints come from where the store's own tools take them, AWS_ENDPOINT_URL for example."""
    if not is_url(url):
        raise UsageError(f"{url} is no URL; write s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or file:///DIRECTORY")
    try:
        import fsspec
        from fsspec.implementations.local import LocalFileSystem
    except ImportError:
        raise MissingPackage("fsspec", "remote", f"reaching {url}") from None
    try:
        files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise MissingPackage(error.name or "the store's package", "remote", f"reaching {url}") from error
    except ValueError as error:
        raise UsageError(f"{url} cannot be reached: {error}") from error
    root = root.rstrip("/")
    local = isinstance(files, LocalFileSystem)
    if not local and "/" not in root:
        raise UsageError(f"{url} is a whole bucket; evidence lies beside the repository, so name a prefix in it")
    return Remote(files, root, renames=local)


@contextmanager
def lock(remote: Remote) -> Iterator[Any]:
    """Keep others from writing there; gives a function that renews the lock. It is an object that only one can
    create, and stale when it was not renewed."""
    path = f"{remote.evidence}/{LOCK}"
    ours = ourselves()
    _create(remote, path)

    def renew() -> None:
        owner = read_owner(remote.read(path) or b"")
        if owner is None or (owner.host, owner.pid) != (ours.host, ours.pid):
            raise MachineError(f"the lock on {remote} was taken over by {owner or 'nobody'}; run this again")
        remote.files.pipe_file(path, as_bytes(_lease()))

    try:
        yield renew
    finally:
        owner = read_owner(remote.read(path) or b"")
        if owner and (owner.host, owner.pid) == (ours.host, ours.pid):
            remote.files.rm_file(path)


def _create(remote: Remote, path: str) -> None:
    if remote.renames:
        remote.files.makedirs(remote.evidence, exist_ok=True)
    for _ in range(2):
        try:
            remote.files.pipe_file(path, as_bytes(_lease()), mode="create")
        except FileExistsError:
            owner = _settled_owner(remote, path)
            gone = owner is not None and owner.host == ourselves().host and not _alive(owner.pid)
            if owner and owner.until > time.time() and not gone:
                raise MachineError(f"{remote} is being changed by {owner}; run this again when it is done") from None
            remote.files.rm_file(path)
        else:
            return
    raise MachineError(f"{remote} is being changed by another nemoport; run this again when it is done")


def _settled_owner(remote: Remote, path: str) -> Owner | None:
    """A lock in a directory is there a moment before its words are."""
    owner = read_owner(remote.read(path) or b"")
    if owner is None:
        time.sleep(0.5)
        owner = read_owner(remote.read(path) or b"")
    return owner


def _lease() -> Owner:
    owner = ourselves()
    return replace(owner, until=owner.since + EXPIRY)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
