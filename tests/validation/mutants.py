"""What a real bug would do to an artifact, done to a good one and sealed again: every digest, the ledger and the
manifest are those of the changed bytes, so that nothing but numbers can tell."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from blake3 import blake3
from numpy.typing import NDArray

from nemoport import artifact
from nemoport.exporters.dtypes import real
from nemoport.spec import Attention, tensors

Array = NDArray[Any]


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, and what it is made of."""

    file: str
    name: str
    parts: tuple[str, ...]
    array: Array
    """A view into the file."""


class Opened:
    """An artifact whose tensors can be changed in place, by the names of the files or by canonical names."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.manifest = directory, artifact.read_manifest(directory)
        self._rows = [json.loads(line) for line in (directory / artifact.LEDGER).read_text().splitlines()]
        written = [row for row in self._rows if "target" in row]
        self.files = {name: np.memmap(directory / name, mode="r+") for name in {row["file"] for row in written}}
        self.stored = [self._stored(row) for row in written]

    def named(self, name: str) -> list[Array]:
        """By the name in the file, one for each file that has it, in order of ranks."""
        return [each.array for each in self.stored if each.name == name]

    def pieces(self, name: str) -> list[Array]:
        """By canonical name: each rank's share, in order of ranks."""
        return [self._part(each, name) for each in self.stored if name in each.parts]

    def seal(self) -> None:
        for file in self.files.values():
            file.flush()
        for row in self._rows:
            if "file" in row:
                content = self.files[row["file"]][row["offset"] : row["offset"] + row["bytes"]]
                row["blake3"] = blake3(content.tobytes()).hexdigest()
        lines = "".join(json.dumps(row) + "\n" for row in self._rows)
        (self.directory / artifact.LEDGER).write_text(lines)
        files = tuple(self._sealed(file) for file in self.manifest.files)
        artifact.write_manifest(self.directory, replace(self.manifest, files=files))

    def _sealed(self, file: artifact.File) -> artifact.File:
        now = artifact.describe(self.directory / file.path, self.directory)
        return now if file.blake3 else replace(now, blake3=None)

    def _stored(self, row: Mapping[str, Any]) -> Stored:
        start, shape = row["offset"], tuple(row["shape"])
        array = self.files[row["file"]][start : start + row["bytes"]].view(real(row["dtype"])).reshape(shape)
        return Stored(row["file"], row["target"], tuple(row["parts"]), array)

    def _part(self, stored: Stored, name: str) -> Array:
        """The rows of one part: [q; k; v] of a rank are in proportion to those of the whole model. Of a stack of
        experts all rows follow one another."""
        whole = tensors(self.manifest.spec)
        array = stored.array
        if array.ndim > len(whole[name].shape):
            array = array.reshape(-1, *array.shape[2:])
        rows = [whole[part].shape[0] for part in stored.parts]
        start = sum(rows[: stored.parts.index(name)]) * len(array) // sum(rows)
        return array[start : start + whole[name].shape[0] * len(array) // sum(rows)]


Change = Callable[[Opened], None]


def mutate(clean: Path, mutant: Path, change: Change) -> Path:
    shutil.copytree(clean, mutant)
    opened = Opened(mutant)
    change(opened)
    opened.seal()
    assert artifact.identity(mutant) != artifact.identity(clean), "the mutant is the clean artifact"
    return mutant


def exchange(a: Array, b: Array) -> None:
    assert a.shape == b.shape, (a.shape, b.shape)
    a[...], b[...] = b.copy(), a.copy()


def exchange_tensors(one: str, other: str) -> Change:
    def change(opened: Opened) -> None:
        for a, b in zip(opened.pieces(one), opened.pieces(other), strict=True):
            exchange(a, b)

    return change


def exchange_experts(prefix: str, one: int, other: int) -> Change:
    """All that is of one expert of a layer, and of another."""

    def change(opened: Opened) -> None:
        for name in tensors(opened.manifest.spec):
            if name.startswith(f"{prefix}.{one}."):
                twin = name.replace(f"{prefix}.{one}.", f"{prefix}.{other}.")
                for a, b in zip(opened.pieces(name), opened.pieces(twin), strict=True):
                    exchange(a, b)

    return change


def untransposed(name: str) -> Change:
    """[in, out] in the place of [out, in]: the memory of the one seen as the other."""

    def change(opened: Opened) -> None:
        for piece in opened.pieces(name):
            piece[...] = np.ascontiguousarray(piece.T).reshape(piece.shape)

    return change


def exchange_layers(one: int, other: int) -> Change:
    def change(opened: Opened) -> None:
        for name in tensors(opened.manifest.spec):
            if name.startswith(f"layers.{one}."):
                twin = name.replace(f"layers.{one}.", f"layers.{other}.")
                for a, b in zip(opened.pieces(name), opened.pieces(twin), strict=True):
                    a[...], b[...] = b.copy(), a.copy()

    return change


def join_in_another_order(one: str, other: str) -> Change:
    """[one; other] written as [other; one] and cut where it was: an exchange where their heights differ."""

    def change(opened: Opened) -> None:
        for a, b in zip(opened.pieces(one), opened.pieces(other), strict=True):
            turned = np.concatenate([b, a])
            a[...], b[...] = turned[: len(a)], turned[len(a) :]

    return change


def fill(name: str, value: float) -> Change:
    def change(opened: Opened) -> None:
        for piece in opened.pieces(name):
            piece[...] = piece.dtype.type(value)

    return change


def shift_rows(name: str) -> Change:
    def change(opened: Opened) -> None:
        for piece in opened.pieces(name):
            piece[...] = np.roll(piece, 1, axis=0)

    return change


def add_to_one(name: str, row: int, by: float) -> Change:
    def change(opened: Opened) -> None:
        opened.pieces(name)[0][row, 3] += by

    return change


def pair_neighbours(name: str) -> Change:
    """Rows of each head as for a rope that turns (2j, 2j + 1): [0 h 1 h+1 ...]."""

    def change(opened: Opened) -> None:
        mixer = opened.manifest.spec.mixers[0]
        assert isinstance(mixer, Attention)
        size = mixer.head_dim
        for piece in opened.pieces(name):
            heads = piece.reshape(-1, 2, size // 2, piece.shape[-1])
            piece[...] = heads.swapaxes(1, 2).reshape(piece.shape).copy()

    return change


def interleave_groups(name: str) -> Change:
    """Query heads [a0 a1 | b0 b1 | ...] as [a0 b0 ... | a1 b1 ...]: heads given to the wrong KV head."""

    def change(opened: Opened) -> None:
        mixer = opened.manifest.spec.mixers[0]
        assert isinstance(mixer, Attention)
        for piece in opened.pieces(name):
            heads = piece.reshape(-1, mixer.heads // mixer.kv_heads, mixer.head_dim, piece.shape[-1])
            piece[...] = heads.swapaxes(0, 1).reshape(piece.shape).copy()

    return change


def exchange_ranks(name: str) -> Change:
    """One tensor's shares, as the file has them, on ranks 0 and 1."""

    def change(opened: Opened) -> None:
        exchange(*opened.named(name)[:2])

    return change


def exchange_files(one: str, other: str) -> Change:
    def change(opened: Opened) -> None:
        exchange(opened.files[one], opened.files[other])

    return change


def in_config(key: str, factor: float) -> Change:
    def change(opened: Opened) -> None:
        path = opened.directory / "config.json"
        config = json.loads(path.read_bytes())
        config[key] *= factor
        path.write_bytes(artifact.json_bytes(config))

    return change


def in_graph(pattern: str, attribute: str, change_to: Callable[[float], float]) -> Change:
    """An attribute of the nodes whose name matches."""

    def change(opened: Opened) -> None:
        path = opened.directory / "model.onnx"
        model, changed = onnx.load_model(path, load_external_data=False), 0
        for node in model.graph.node:
            for each in node.attribute:
                if each.name == attribute and re.fullmatch(pattern, node.name):
                    each.f = change_to(each.f)
                    changed += 1
        assert changed
        path.write_bytes(model.SerializeToString(deterministic=True))

    return change


def tables_of_base(factor: float) -> Change:
    """The graph's cosines and sines, of another rope."""

    def change(opened: Opened) -> None:
        (cos,), (sin,) = opened.named("rope.0.cos"), opened.named("rope.0.sin")
        rope = opened.manifest.spec.mixers[0].rope
        assert rope is not None
        angles = np.outer(np.arange(len(cos)), (rope.base * factor) ** -(np.arange(cos.shape[1]) / cos.shape[1]))
        cos[...], sin[...] = np.cos(angles), np.sin(angles)

    return change


def tables_late_by_one(first: int) -> Change:
    """Every row from `first` on is the one before it."""

    def change(opened: Opened) -> None:
        for name in ("rope.0.cos", "rope.0.sin"):
            (table,) = opened.named(name)
            table[first:] = table[first - 1 : -1].copy()

    return change
