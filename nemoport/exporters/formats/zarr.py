"""Zarr version 2, as Megatron-core's zarr backend writes it: a directory for each tensor.

    decoder.final_layernorm.weight/.zarray      {"shape": [64], "chunks": [64], "dtype": "bfloat16", ...}
    decoder.final_layernorm.weight/0            the numbers of chunk 0, row-major, at the full size of a chunk
    decoder.layers.mlp.linear_fc1.weight/2.0.0  chunk (2, 0, 0)
    decoder.final_layernorm._extra_state/shard_0_1.pt   a pickled object, never opened

In zarr a chunk without a file holds `fill_value`. Megatron-core writes every chunk (`write_empty_chunks`, and no fill
value), so here a missing file is a lost file: reading zeros in its place would be a silently wrong model.

Megatron-core does not compress. A compressed chunk, which only a later copy has, can only be had whole: the last few
are kept, since the parts of a tensor are read one after the other. Sources: zarr-specs, v2/v2.0.rst;
megatron/core/dist_checkpointing/strategies/zarr.py.
"""

from __future__ import annotations

import mmap
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from threading import Lock
from typing import Any

import numpy as np

from nemoport.errors import DamagedInput, MissingPackage, UnsupportedInput
from nemoport.exporters.dtypes import DTYPES, itemsize
from nemoport.exporters.formats.shards import tiled
from nemoport.exporters.formats.structured import stored_mapping
from nemoport.exporters.formats.torch_dist import Contents
from nemoport.exporters.formats.tree import Tree
from nemoport.exporters.tensor import Buffer, LazyTensor, Span, Store, stored

INDEX = ".zarray"
_OBJECT = re.compile(r".+/shard_[^/]*\.pt")
_TYPES = {
    **{f"<f{width}": f"float{8 * width}" for width in (2, 4, 8)},
    **{f"<i{width}": f"int{8 * width}" for width in (2, 4, 8)},
    "|i1": "int8",
    "|u1": "uint8",
    "|b1": "bool",
    # numpy has no bfloat16: zarr calls it two bytes without a type, and Megatron-core and tensorstore mend that.
    "<V2": "bfloat16",
    "|V2": "bfloat16",
}
_LARGEST = 4 * 2**30
"""Bytes of the largest compressed chunk, once decompressed."""
_KEPT = 224 * 2**20
"""Bytes of decompressed chunks kept, within the default cap on memory; one is, however large."""

_PIECE = 2**20

Decode = Callable[[Buffer, int], Buffer]
"""Compressed bytes and their number decompressed -> as many."""


def read(tree: Tree) -> Contents:
    """Every array of the tree, unread, and the pickled objects beside them."""
    files: dict[str, set[str]] = {}
    names = tree.names()
    keys = {name.removesuffix(f"/{INDEX}") for name in names if name.endswith(f"/{INDEX}")}
    for name in names:
        if (key := _owner(name, keys)) is not None and not name.removeprefix(f"{key}/").startswith("."):
            files.setdefault(key, set()).add(name)
    chunks = _Chunks()
    return Contents(
        {key: _array(tree, key, files.get(key, set()), chunks) for key in sorted(keys)},
        {name: tree.file(name) for name in names if _OBJECT.fullmatch(name) and _owner(name, keys) is None},
    )


def _owner(name: str, keys: set[str]) -> str | None:
    """The array that a file belongs to: chunks may lie in directories of their own."""
    while "/" in name:
        name = name.rpartition("/")[0]
        if name in keys:
            return name
    return None


def _array(tree: Tree, key: str, files: set[str], chunks: _Chunks) -> LazyTensor:
    index = tree.file(f"{key}/{INDEX}")
    assert index is not None
    found = stored_mapping(index)
    shape, sizes = _numbers(key, found, "shape", 0), _numbers(key, found, "chunks", 1)
    if len(shape) != len(sizes):
        raise DamagedInput(f"{key}/{INDEX} has chunks of {len(sizes)} axes and a shape of {len(shape)}; copy it again")
    if found.get("zarr_format", 2) != 2 or found.get("filters") or (found.get("order") != "C" and len(shape) > 1):
        said = {word: found.get(word) for word in ("zarr_format", "filters", "order")}
        raise UnsupportedInput(f"{key} is stored with {said}; nemoport reads zarr 2, row-major and without filters")
    dtype = _dtype(key, found.get("dtype"))
    decode = _decoder(key, found.get("compressor"))
    counts = [-(-full // size) for full, size in zip(shape, sizes, strict=True)]
    separator = found.get("dimension_separator", ".")
    if separator not in (".", "/"):
        raise DamagedInput(f"{key}/{INDEX} separates dimensions by {separator!r}; zarr does by '.' or '/'")
    pieces = []
    for place in _places(counts):
        name = f"{key}/{separator.join(map(str, place)) or '0'}"
        if name not in files or (store := tree.file(name)) is None:
            missing = prod(counts) - len(files)
            raise DamagedInput(
                f"{name} is missing, and {max(missing, 1)} of the {prod(counts)} chunks of {key}; copy the checkpoint"
            )
        corner = tuple(at * size for at, size in zip(place, sizes, strict=True))
        # Chunks at the edge are stored whole.
        box = tuple((0, min(size, full - low)) for size, full, low in zip(sizes, shape, corner, strict=True))
        pieces.append((corner, _chunk(store, sizes, dtype, decode, chunks).cut(box)))
    if extra := len(files) - len(pieces):
        raise DamagedInput(f"{key} has {extra} files beyond the {len(pieces)} chunks of its shape {list(shape)}")
    return tiled(key, shape, dtype, pieces, f"{key}/{INDEX}")


def _places(counts: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Of every chunk, row-major. Lazily: a damaged shape may promise any number of them."""
    for flat in range(prod(counts)):
        place = []
        for count in reversed(counts):
            flat, at = divmod(flat, count)
            place.append(at)
        yield tuple(reversed(place))


def _numbers(key: str, found: Mapping[str, Any], word: str, least: int) -> tuple[int, ...]:
    value = found.get(word)
    if not isinstance(value, list) or not all(type(size) is int and least <= size < 2**48 for size in value):
        raise DamagedInput(f"{key}/{INDEX} has {word} {str(value)[:80]}; copy the checkpoint again")
    return tuple(value)


def _dtype(key: str, value: Any) -> str:
    dtype = _TYPES.get(value, value) if isinstance(value, str) else None
    if dtype not in DTYPES:
        raise UnsupportedInput(f"{key} has dtype {str(value)[:80]}; nemoport reads little-endian {', '.join(DTYPES)}")
    return dtype


def _chunk(store: Store, shape: tuple[int, ...], dtype: str, decode: Decode | None, chunks: _Chunks) -> LazyTensor:
    size = prod(shape) * itemsize(dtype)
    if decode is None:
        if store.size != size:
            raise DamagedInput(f"{store.name} has {store.size} bytes, a chunk {size}; copy the checkpoint again")
        return stored(store, offset=0, shape=shape, dtype=dtype)
    if size > _LARGEST:
        raise UnsupportedInput(f"{store.name} is a compressed chunk of {size} bytes; nemoport reads up to {_LARGEST}")
    return stored(_Compressed(store, decode, size, chunks), offset=0, shape=shape, dtype=dtype)


class _Chunks:
    """The chunks that were decompressed last, one at a time."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: OrderedDict[int, tuple[object, Buffer]] = OrderedDict()

    def get(self, owner: object, size: int, decompress: Callable[[], Buffer], span: Span) -> Buffer:
        """Some of the bytes of a chunk; a copy, so that nobody holds on to a chunk that is not kept."""
        key = id(owner)
        with self._lock:
            if key not in self._kept:
                while self._kept and size + sum(len(each) for _, each in self._kept.values()) > _KEPT:
                    self._kept.popitem(last=False)
                self._kept[key] = owner, decompress()
            self._kept.move_to_end(key)
            return bytes(memoryview(self._kept[key][1])[slice(*span)])


@dataclass(frozen=True)
class _Compressed:
    """The decompressed bytes of a chunk, as a store."""

    compressed: Store
    decode: Decode
    size: int
    chunks: _Chunks = field(repr=False)

    @property
    def name(self) -> str:
        return self.compressed.name

    def view(self, start: int, stop: int) -> Buffer:
        return self.chunks.get(self, self.size, self._whole, (start, stop))

    def _whole(self) -> Buffer:
        found = self.decode(self.compressed.view(0, self.compressed.size), self.size)
        if len(found) != self.size:
            raise DamagedInput(f"{self.name} decompresses to another size than the {self.size} bytes of a chunk")
        return found


def _decoder(key: str, compressor: Any) -> Decode | None:
    """What undoes a compressor. Only these are ever looked up: zarr's own registry also unpickles."""
    if compressor is None:
        return None
    codec = compressor.get("id") if isinstance(compressor, Mapping) else compressor
    if codec in ("zlib", "gzip"):
        return _inflate
    if codec in ("blosc", "zstd", "lz4"):
        return _numcodecs(codec)
    raise UnsupportedInput(f"{key} is compressed by {str(codec)[:80]}; nemoport reads zlib, gzip, blosc, zstd and lz4")


def _room(size: int) -> memoryview:
    """Memory that goes back at once: chunks are as large as the allocator likes to keep."""
    return memoryview(mmap.mmap(-1, max(size, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))[:size]


def _inflate(content: Buffer, size: int) -> Buffer:
    """No more than is wanted, whatever the stream holds, and piece by piece, so that it is in memory once."""
    inflater, out, at, left = zlib.decompressobj(wbits=47), _room(size), 0, content  # either header
    try:
        while piece := inflater.decompress(left, _PIECE):
            if at + len(piece) > size:
                return b""
            out[at : at + len(piece)] = piece
            at, left = at + len(piece), inflater.unconsumed_tail
    except zlib.error as error:
        raise DamagedInput(f"a compressed chunk is damaged ({error}); copy the checkpoint again") from error
    return out if at == size else b""


def _numcodecs(name: str) -> Decode:
    try:
        import numcodecs
    except ImportError as error:
        raise MissingPackage("numcodecs", "zarr", f"reading zarr compressed by {name}") from error
    codec = {"blosc": numcodecs.Blosc, "zstd": numcodecs.Zstd, "lz4": numcodecs.LZ4}[name]()
    promised = {"blosc": _blosc_size, "zstd": _zstd_size, "lz4": _lz4_size}[name]

    def decode(content: Buffer, size: int) -> Buffer:
        if promised(bytes(content[:32]), len(content)) != size:
            raise DamagedInput(f"a chunk compressed by {name} promises other than its {size} bytes; copy it again")
        out = _room(size)
        try:
            codec.decode(np.frombuffer(content, np.uint8), np.frombuffer(out, np.uint8))
        except (RuntimeError, ValueError) as error:
            raise DamagedInput(f"a compressed chunk is damaged ({error}); copy the checkpoint again") from error
        return out

    return decode


def _lz4_size(head: bytes, _: int) -> int | None:
    """numcodecs puts the size before the block."""
    return int.from_bytes(head[:4], "little") if len(head) > 4 else None


def _blosc_size(head: bytes, size: int) -> int | None:
    """c-blosc/README_CHUNK_FORMAT.rst. Its decompressor believes the header on where the chunk ends, so must we not."""
    nbytes, cbytes = int.from_bytes(head[4:8], "little"), int.from_bytes(head[12:16], "little")
    return nbytes if len(head) >= 16 and cbytes == size else None


def _zstd_size(head: bytes, _: int) -> int | None:
    """RFC 8878, 3.1.1.1: the frame's header. None where the writer left the size out, which numcodecs does not."""
    if len(head) < 5 or head[:4] != b"\x28\xb5\x2f\xfd":
        return None
    flag, single, dictionary = head[4] >> 6, head[4] >> 5 & 1, (0, 1, 2, 4)[head[4] & 3]
    width = (single, 2, 4, 8)[flag]
    start = 5 + (1 - single) + dictionary
    number = int.from_bytes(head[start : start + width], "little")
    return number + 256 * (width == 2) if width else None
