"""Zarr: any chunks, any of its compressors, and nothing read where something is missing."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nemoport.errors import DamagedInput, InputError, MissingPackage, NemoportError, UnsupportedInput
from nemoport.exporters import source
from nemoport.exporters.formats import zarr as format_of_zarr
from nemoport.exporters.formats.tree import Directory
from nemoport.exporters.tensor import LazyTensor, read

from .fixtures import LLAMA
from .made import SPECS, config, random_tensors, stored

FIXTURE = LLAMA["zarr"]
SPEC = SPECS["llama"]["every bias"]
CONFIG = config(SPEC, "megatron")
NORM, FC1 = "model.decoder.final_layernorm.weight", "model.decoder.layers.mlp.linear_fc1.weight"


def save_zarr(
    directory: Path, canonical: Mapping[str, LazyTensor], compressor: Any, separator: str, spelling: str
) -> Path:
    """What the zarr library writes, in chunks that do not divide the tensors."""
    import zarr

    for name, tensor in stored(SPEC, "megatron", canonical).items():
        array = zarr.create_array(
            directory / name,
            shape=tensor.shape,
            chunks=tuple(max(1, size // 2 - 1) for size in tensor.shape),
            dtype="<i2",
            compressors=compressor,
            filters=None,
            fill_value=None,
            zarr_format=2,
            chunk_key_encoding={"name": "v2", "separator": separator},
        )
        array[...] = read(tensor).view("<i2")
        index = directory / name / ".zarray"
        index.write_text(index.read_text().replace('"<i2"', f'"{spelling}"'))
    return directory


def _compressor(name: str | None) -> Any:
    import numcodecs

    if name is None:
        return None
    made = {"zlib": numcodecs.Zlib, "gzip": numcodecs.GZip, "zstd": numcodecs.Zstd, "lz4": numcodecs.LZ4}
    return numcodecs.Blosc(cname="zstd", shuffle=2) if name == "blosc" else made[name]()


@pytest.mark.parametrize("spelling", ["bfloat16", "<V2"])
@pytest.mark.parametrize(
    "compressor, separator",
    [(None, "."), (None, "/"), ("zlib", "."), ("gzip", "."), ("blosc", "/"), ("zstd", "."), ("lz4", ".")],
)
def test_what_the_library_wrote_reads_back_equal(
    compressor: str | None, separator: str, spelling: str, tmp_path: Path
) -> None:
    canonical = random_tensors(SPEC)
    path = save_zarr(tmp_path / "saved", canonical, _compressor(compressor), separator, spelling)
    model = source.model(path, CONFIG)
    assert model.checkpoint.format == "zarr"
    for name, tensor in canonical.items():
        np.testing.assert_array_equal(read(model.tensors[name]).view("u2"), read(tensor).view("u2"), name)


def test_any_slice_of_a_compressed_tensor_is_that_of_the_whole(tmp_path: Path) -> None:
    path = save_zarr(tmp_path / "saved", random_tensors(SPEC), _compressor("blosc"), ".", "bfloat16")
    bits = np.random.default_rng(1)
    for tensor in source.checkpoint(path, CONFIG).tensors.values():
        whole = read(tensor).view("u2")
        for _ in range(5):
            box = tuple(
                (int(low), int(high)) for low, high in (sorted(bits.integers(0, n + 1, 2)) for n in whole.shape)
            )
            part = read(tensor.cut(box)).view("u2")
            np.testing.assert_array_equal(part, whole[tuple(slice(*span) for span in box)])


@pytest.mark.parametrize(
    "around, files, name",
    [
        ("megatron_lm", ("common.pt",), "megatron_lm, iteration"),
        ("megatron_bridge", ("run_config.yaml",), "megatron_bridge, iteration"),
        ("nemo2", ("context",), "nemo2"),
    ],
)
def test_the_same_programs_wrap_it_as_wrap_torch_dist(
    around: str, files: tuple[str, ...], name: str, tmp_path: Path
) -> None:
    path = tmp_path / "saved"
    weights = path / "weights" if around == "nemo2" else path
    shutil.copytree(FIXTURE.path, weights)
    for file in files:
        at = LLAMA[name].path / file
        shutil.copytree(at, path / file) if at.is_dir() else shutil.copy(at, path / file)
    model = source.model(path)
    assert model.checkpoint.format == around
    assert model.spec == source.model(LLAMA[name].path).spec
    assert model.checkpoint.skipped


def test_pickled_objects_are_counted_and_not_opened(tmp_path: Path) -> None:
    path = Path(shutil.copytree(FIXTURE.path, tmp_path / "saved"))
    objects = sorted(path.glob("*/shard_*.pt"))
    for each in objects:
        each.write_bytes(b"no pickle at all")
    model = source.model(path, FIXTURE.config)
    assert set(model.checkpoint.skipped) == {each.relative_to(path).as_posix() for each in objects}
    assert set(model.checkpoint.skipped.values()) == {"extra state of Transformer Engine"}


def _zarray(path: Path, key: str, **words: Any) -> None:
    index = path / key / ".zarray"
    index.write_text(json.dumps(json.loads(index.read_text()) | words))


@pytest.mark.parametrize(
    "key, words, error",
    [
        (NORM, {"shape": [2**40]}, DamagedInput),
        (NORM, {"shape": [2**80]}, DamagedInput),
        (NORM, {"shape": [63]}, InputError),
        (NORM, {"shape": [0]}, InputError),
        (NORM, {"shape": [[64]]}, DamagedInput),
        (NORM, {"shape": None}, DamagedInput),
        (NORM, {"chunks": [0]}, DamagedInput),
        (NORM, {"chunks": [32]}, DamagedInput),
        (NORM, {"chunks": [64, 1]}, DamagedInput),
        (NORM, {"dtype": ">f4"}, UnsupportedInput),
        (NORM, {"dtype": [["a", "<f4"]]}, UnsupportedInput),
        (NORM, {"dtype": "<f4"}, DamagedInput),
        (NORM, {"zarr_format": 3}, UnsupportedInput),
        (NORM, {"filters": [{"id": "pickle"}]}, UnsupportedInput),
        (NORM, {"compressor": {"id": "pickle"}}, UnsupportedInput),
        (NORM, {"compressor": "zlib?"}, UnsupportedInput),
        (NORM, {"dimension_separator": "../"}, DamagedInput),
        (FC1, {"order": "F"}, UnsupportedInput),
        (FC1, {"chunks": [1, 1, 1]}, DamagedInput),
        (FC1, {"shape": [2**40, 352, 64]}, DamagedInput),
        (FC1, {"shape": [2**40, 0, 64]}, DamagedInput),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_an_impossible_index_is_refused_at_once(
    key: str, words: dict[str, Any], error: type[NemoportError], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(FIXTURE.path, tmp_path / "saved"))
    _zarray(path, key, **words)
    began = time.monotonic()
    with pytest.raises(error):
        source.model(path, FIXTURE.config)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("fill", [None, 0])
def test_a_lost_chunk_is_no_chunk_of_zeros(fill: int | None, tmp_path: Path) -> None:
    path = Path(shutil.copytree(FIXTURE.path, tmp_path / "saved"))
    _zarray(path, FC1, fill_value=fill)
    (path / FC1 / "2.0.0").unlink()
    with pytest.raises(DamagedInput, match=r"2\.0\.0 is missing, and 1 of the 4 chunks"):
        source.model(path, FIXTURE.config)


@pytest.mark.parametrize("change", [lambda content: content[:-1], lambda content: content + b"\0", lambda content: b""])
def test_a_chunk_of_another_size_is_refused(change: Any, tmp_path: Path) -> None:
    path = Path(shutil.copytree(FIXTURE.path, tmp_path / "saved"))
    chunk = path / FC1 / "1.0.0"
    chunk.write_bytes(change(chunk.read_bytes()))
    with pytest.raises(DamagedInput):
        source.model(path, FIXTURE.config)


@pytest.mark.parametrize("compressor", ["zlib", "gzip", "blosc", "zstd", "lz4"])
def test_a_damaged_compressed_chunk_is_an_error_or_other_numbers(compressor: str, tmp_path: Path) -> None:
    """Never a crash, and never more memory than a chunk has: a decompressor may believe the bytes it is given."""
    path = save_zarr(tmp_path / "saved", random_tensors(SPEC), _compressor(compressor), ".", "bfloat16")
    chunk = path / "decoder.final_layernorm.weight/0"
    before, bits = chunk.read_bytes(), np.random.default_rng(7)
    for _ in range(60):
        damaged = bytearray(before)
        if bits.integers(2):
            damaged[int(bits.integers(len(damaged)))] = int(bits.integers(256))
        else:
            del damaged[int(bits.integers(len(damaged))) :]
        chunk.write_bytes(damaged)
        tensor = format_of_zarr.read(Directory(path)).tensors["decoder.final_layernorm.weight"]
        with suppress(DamagedInput):
            read(tensor)


def test_a_chunk_that_would_inflate_without_end_is_refused(tmp_path: Path) -> None:
    import zlib

    path = save_zarr(tmp_path / "saved", random_tensors(SPEC), _compressor("zlib"), ".", "bfloat16")
    (path / "decoder.final_layernorm.weight/0").write_bytes(zlib.compress(bytes(2**28)))
    tensor = format_of_zarr.read(Directory(path)).tensors["decoder.final_layernorm.weight"]
    with pytest.raises(DamagedInput, match="another size"):
        read(tensor)


def test_only_a_compressor_that_python_lacks_needs_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {
        name: save_zarr(tmp_path / name, random_tensors(SPEC), _compressor(name), ".", "bfloat16")
        for name in ("zlib", "blosc")
    }
    monkeypatch.setitem(sys.modules, "numcodecs", None)
    read(source.model(paths["zlib"], CONFIG).tensors["norm.weight"])
    with pytest.raises(MissingPackage, match=r"nemoport\[zarr\]"):
        source.model(paths["blosc"], CONFIG)
