"""The engine: fill every slot of every file, in parallel, within a memory cap, and finish atomically.

Everything is known before the first byte moves: files, headers, offsets, sizes. Each worker takes a slot, fills it
block by block into a buffer of its own, hashes the block and writes it at its final offset. What is in memory is the
blocks in flight. Files grow in a hidden directory beside the destination, with a journal of the slots that are done; a
killed run leaves only that, and the same command finds it, checks the journal against the bytes and goes on. The last
step is one rename.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from itertools import repeat
from pathlib import Path
from threading import Lock, local
from typing import BinaryIO
from zlib import crc32

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from nemoport.artifact import (
    LEDGER,
    MANIFEST,
    ORIGIN,
    Artifact,
    File,
    describe,
    digest_at,
    json_bytes,
    read_manifest,
    sync_directory,
    write_manifest,
)
from nemoport.errors import InputError, MachineError, UsageError
from nemoport.exporters import ledger
from nemoport.exporters.checkpoint import Slot, TensorFile
from nemoport.exporters.dtypes import words
from nemoport.exporters.job import Job, fingerprint
from nemoport.exporters.tensor import LazyTensor, cut, nbytes

BLOCK = 4 * 2**20
"""Bytes moved at once: small enough to stay in cache between copy, hash and write."""
DEFAULT_MEMORY = 512 * 2**20
_INTERPRETER = 160 * 2**20
"""Bytes that Python, numpy and the plan of a large model take."""
_PER_WORKER = 8 * BLOCK
"""A block, and what a cast holds of it at other widths."""
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

Progress = Callable[[int], None]
"""Called with the number of bytes just finished, from any thread."""


def workers_within(max_memory: int) -> int:
    """How many workers a memory cap allows, at most one a core."""
    if (allowed := (max_memory - _INTERPRETER) // _PER_WORKER) < 1:
        least = (_INTERPRETER + _PER_WORKER) // 2**20
        raise UsageError(f"--max-memory {max_memory // 2**20}MiB is too little to work in; give at least {least}MiB")
    return min(allowed, max(2, len(os.sched_getaffinity(0))), 16)


def check_destination(job: Job) -> None:
    """Refuse a place that is taken by anything but the result of this very job."""
    if os.path.lexists(job.destination):
        _finished_before(job, fingerprint(job))


def run(job: Job, progress: Progress = lambda _: None) -> Artifact:
    """Write the artifact. Doing it again is no work; doing something else to the same place is an error."""
    _check_complete(job)
    known = fingerprint(job)
    if os.path.lexists(job.destination):
        return _finished_before(job, known)
    partial = job.destination.with_name(f".{job.destination.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _journal(partial, known) as journal:
            if os.path.lexists(job.destination):  # another process has finished meanwhile
                shutil.rmtree(partial)
                return _finished_before(job, known)
            try:
                _check_room(job, partial)
                job.prepare()
                digests, seals = _fill(job, partial, journal, progress)
                return _finish(job, partial, digests, seals, known)
            except Exception:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise MachineError(
                f"no room left for {job.destination}: it needs {job.bytes} bytes ({error.strerror}); "
                "free some, or write to another disk"
            ) from error
        raise MachineError(f"{job.destination} cannot be written: {error.strerror or error}") from error


@dataclass(frozen=True)
class Journal:
    """The slots that are done, by file and name, and the file that new ones are added to."""

    done: Mapping[tuple[str, str], str]
    stream: BinaryIO
    lock: Lock

    def add(self, file: TensorFile, slot: Slot, digest: str) -> None:
        with self.lock:
            self.stream.write(json.dumps([file.path, slot.name, digest]).encode() + b"\n")
            self.stream.flush()


@contextmanager
def _journal(partial: Path, fingerprint: str) -> Iterator[Journal]:
    """Take over what an earlier run of the same job left; of another job, nothing."""
    path = partial / ".journal"
    with path.open("a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another nemoport is writing {partial}; wait for it, or choose another directory"
            ) from None
        stream.seek(0)
        rows = []
        for line in stream.read().splitlines():
            with suppress(ValueError):  # the last line of a killed run may be cut
                rows.append(json.loads(line))
        if not rows or rows[0] != [fingerprint]:
            for entry in partial.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry)
                elif entry != path:
                    entry.unlink()
            stream.truncate(0)
            stream.write(json.dumps([fingerprint]).encode() + b"\n")
            stream.flush()
            rows = rows[:0]
        for half in partial.glob(f".{MANIFEST}.*"):  # written when it was killed
            half.unlink()
        done = {(row[0], row[1]): row[2] for row in rows if len(row) == 3}
        yield Journal(done, stream, Lock())


def _fill(
    job: Job, partial: Path, journal: Journal, progress: Progress
) -> tuple[dict[tuple[str, str], str], dict[str, Mapping[int, bytes]]]:
    """Every slot's digest, each slot written or found written; and each file's seal, with which it is whole."""
    order = {name: index for index, name in enumerate(job.model.tensors)}
    work = sorted(
        (
            (file, slot, offset)
            for file in job.output.files
            for slot, offset in zip(file.slots, file.offsets, strict=True)
        ),
        # Ranks that share a source tensor take it together, so that it comes from the disk once.
        key=lambda item: (order.get(item[1].parts[0], -1) if item[1].parts else -1, item[0].path, item[1].name),
    )
    streams = {file.path: _open(partial / file.path, file) for file in job.output.files}
    buffers = local()
    try:
        with ThreadPoolExecutor(job.workers) as pool:

            def fill(file: TensorFile, slot: Slot, offset: int) -> str:
                handle = streams[file.path].fileno()
                known = journal.done.get((file.path, slot.name))
                if known is None or digest_at(handle, offset, nbytes(slot.tensor)) != known:
                    if not hasattr(buffers, "block"):
                        buffers.block = np.empty(BLOCK, np.uint8)
                    try:
                        known = _write(handle, slot.tensor, offset, buffers.block)
                    except InputError as error:
                        raise type(error)(f"{slot.name}: {error}") from error
                    journal.add(file, slot, known)
                progress(nbytes(slot.tensor))
                return known

            running = [(file, slot, pool.submit(fill, file, slot, offset)) for file, slot, offset in work]
            try:
                digests = {(file.path, slot.name): future.result() for file, slot, future in running}
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
            seals = {file.path: _seal(file, streams[file.path].fileno(), pool) for file in job.output.files}
        for stream in streams.values():
            os.fsync(stream.fileno())
        return digests, seals
    finally:
        for stream in streams.values():
            stream.close()


def _seal(file: TensorFile, handle: int, pool: ThreadPoolExecutor) -> Mapping[int, bytes]:
    """What a file of slots still lacks, written. The slots are read back for it: they were just written."""
    if file.seal is None:
        return {}
    sizes = [nbytes(slot.tensor) for slot in file.slots]
    lacking = file.seal(list(pool.map(_checksum, repeat(handle), file.offsets, sizes)))
    for offset, content in lacking.items():
        _write_all(handle, memoryview(content), offset)
    return lacking


def _checksum(handle: int, offset: int, size: int) -> int:
    """CRC-32 of `size` bytes of an open file."""
    found = 0
    while size and (content := os.pread(handle, min(size, BLOCK), offset)):
        found = crc32(content, found)
        offset, size = offset + len(content), size - len(content)
    return found


def _open(path: Path, file: TensorFile) -> FileIO:
    """The file at its final size, with its header."""
    size = max((offset + nbytes(slot.tensor) for slot, offset in zip(file.slots, file.offsets, strict=True)), default=0)
    path.parent.mkdir(exist_ok=True)
    stream = path.open("r+b" if path.exists() else "x+b", buffering=0)
    os.ftruncate(stream.fileno(), max(size, len(file.header)))
    os.pwrite(stream.fileno(), file.header, 0)
    return stream


def _write(handle: int, tensor: LazyTensor, offset: int, buffer: NDArray[np.uint8]) -> str:
    """Move one tensor to its place; its digest."""
    hasher = blake3()
    for block in blocks(tensor):
        size = nbytes(block)
        space = buffer[:size] if size <= buffer.size else np.empty(size, np.uint8)
        block.fill(space.view(words(block.dtype)).reshape(block.shape))
        hasher.update(space.data)
        _write_all(handle, space.data, offset)
        offset += size
    return hasher.hexdigest()


def blocks(tensor: LazyTensor, axis: int = 0) -> Iterator[LazyTensor]:
    """A tensor in consecutive pieces of about `BLOCK` bytes, in row-major order."""
    if nbytes(tensor) <= BLOCK or axis == len(tensor.shape):
        yield tensor
        return
    length = tensor.shape[axis]
    step = max(1, BLOCK * length // nbytes(tensor))
    for start in range(0, length, step):
        piece = cut(tensor, axis, start, min(start + step, length))
        yield from blocks(piece, axis + 1) if step == 1 else (piece,)


def _write_all(handle: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(handle, content, offset)
        content, offset = content[written:], offset + written


def _finish(
    job: Job,
    partial: Path,
    digests: Mapping[tuple[str, str], str],
    seals: Mapping[str, Mapping[int, bytes]],
    fingerprint: str,
) -> Artifact:
    """Ledger, small files, manifest, and the rename that makes it all true."""
    rows = ledger.rows(job, digests, seals)
    (partial / LEDGER).write_bytes(b"".join(json.dumps(row).encode() + b"\n" for row in rows))
    sidecars = {**job.output.sidecars, **{name: made() for name, made in job.output.late.items()}}
    for name, content in sidecars.items():
        (partial / name).parent.mkdir(exist_ok=True)
        (partial / name).write_bytes(content)
    origin = {
        "path": str(job.model.checkpoint.path.resolve()),
        "config": job.config,
        "adapter": str(job.adapter.resolve()) if job.adapter else None,
        "calibration": job.calibration,
        "fingerprint": fingerprint,
    }
    (partial / ORIGIN).write_bytes(json_bytes(origin))
    tensor_files = tuple(File(file.path, (partial / file.path).stat().st_size, None) for file in job.output.files)
    for name in (*sidecars, LEDGER, ORIGIN):
        with (partial / name).open("rb") as stream:
            os.fsync(stream.fileno())
    plain = tuple(describe(partial / name, partial) for name in (*sidecars, LEDGER))
    artifact = ledger.artifact(job, tensor_files + plain)
    write_manifest(partial, artifact)
    for directory in (*(entry for entry in partial.rglob("*") if entry.is_dir()), partial):
        sync_directory(directory)
    os.rename(partial, job.destination)
    # Only now: the lock on the journal is what keeps another process out of the directory.
    (job.destination / ".journal").unlink()
    sync_directory(job.destination.parent)
    return artifact


def _check_complete(job: Job) -> None:
    """Every canonical tensor goes somewhere, every slot has a name of its own. Only what has no tensors at all, a
    tokenizer, leaves them behind."""
    written = {part for file in job.output.files for slot in file.slots for part in slot.parts}
    assert not job.output.files or not (lost := set(job.model.tensors) - written), (
        f"{job.kind} writes no {sorted(lost)[0]}"
    )
    for file in job.output.files:
        assert len({slot.name for slot in file.slots}) == len(file.slots), file.path


def _check_room(job: Job, partial: Path) -> None:
    held = sum(entry.stat().st_blocks * 512 for entry in partial.rglob("*"))
    if (free := shutil.disk_usage(partial).free + held) < job.bytes:
        raise MachineError(
            f"{job.destination} needs {job.bytes} bytes and its disk has {free} free; "
            "free some, or write to another disk"
        )


def _finished_before(job: Job, fingerprint: str) -> Artifact:
    origin = job.destination / ORIGIN
    with suppress(OSError, ValueError, KeyError):
        if json.loads(origin.read_bytes())["fingerprint"] == fingerprint and (job.destination / MANIFEST).is_file():
            (job.destination / ".journal").unlink(missing_ok=True)  # killed after the rename
            return read_manifest(job.destination)
    raise UsageError(
        f"{job.destination} exists and is not the result of this conversion; remove it, or choose another with -o"
    )
