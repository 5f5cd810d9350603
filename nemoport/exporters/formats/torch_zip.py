"""`torch.save` archives: a ZIP of `<stem>/data.pkl` and `<stem>/data/<key>`, all members stored uncompressed."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.exporters.formats.unpickle import unpickle

LARGEST_PICKLE = 256 * 2**20
"""Bytes. The arguments of a training run and the index of its tensors stay far below."""


def load(path: Path) -> Any:
    """The object that was saved, as inert data; tensors are `StoredTensor`s."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
            if len(members) != 1:
                raise DamagedInput(
                    f"{path.name} holds {len(members)} data.pkl, one is needed; it is no torch.save file"
                )
            if members[0].file_size > LARGEST_PICKLE:
                raise DamagedInput(f"{path.name} holds a pickle of {members[0].file_size} bytes; it is damaged")
            content = archive.read(members[0])
    # zipfile raises all of these on damaged archives.
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, zipfile.LargeZipFile) as error:
        raise DamagedInput(f"{path.name} is not a readable torch.save file ({error}); copy it again") from error
    return unpickle(content, path.name)


def mentions(path: Path, word: bytes) -> bool:
    """Whether the file is an archive whose pickle contains a word, without opening the pickle. Never an error."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith("/data.pkl")]
            return any(word in archive.read(info) for info in members if info.file_size <= LARGEST_PICKLE)
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError):
        return False
