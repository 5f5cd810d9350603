"""The verb `inspect`: what lies at a path, from names and headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

from nemoport.errors import NemoportError, PolicyError
from nemoport.exporters import lora, source
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import pickles, tokenizer
from nemoport.exporters.formats.distributed import DESCRIPTION
from nemoport.exporters.formats.structured import stored_mapping
from nemoport.exporters.formats.tree import Archive, Directory, Tree
from nemoport.exporters.quantized import quantization
from nemoport.exporters.readers.huggingface import CONFIG
from nemoport.exporters.tensor import LazyTensor, Mosaic, Squeezed, nbytes
from nemoport.spec import parameter_count, to_json

_EMBEDDINGS = ("word_embeddings.weight", "embed_tokens.weight")
_ROW_PARALLEL = (".linear_proj.weight", ".linear_fc2.weight")
"""Of Megatron's weights, those that tensor parallelism cuts along the last axis, and nothing else does."""


def inspect(path: Path, config: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Facts about a checkpoint as JSON data. What stands in the way of converting it is a fact too: `problem`, or
    `refused` where a pickle that must be read is suspicious."""
    with suppress(PolicyError):  # of its index; as the checkpoint that it is as well, its pickles are told
        if (adapter := source.adapter_alone(path)) is not None:
            return _adapter(adapter)
    name, reader = source.reader(path)
    facts = {"path": str(path), "format": name, **_pickles(path, reader)}
    try:
        stored = source.checkpoint(path, config)
    except PolicyError as error:
        return facts | {"refused": str(error)}
    inferred = _inferred(stored)
    facts |= {
        "writer": stored.writer,
        "versions": _versions(reader.files(path)),
        "naming": stored.naming,
        **_tensors(stored.tensors),
        "trained": inferred | dict(stored.trained),
        "inferred": sorted(inferred.keys() - stored.trained.keys()),
        "skipped": dict(Counter(stored.skipped.values())),
        "tokenizer": _tokenizer(stored),
        "adapters": sum(map(lora.is_adapter, stored.tensors)),
        "masters": len(stored.masters),
        "vocabulary": {"true": None, "padded": _rows(stored.tensors)},
    }
    try:
        if (how := quantization(stored)) is not None:
            facts["quantization"] = asdict(how)
        model = source.resolved(stored)
        rows = source.resolved(stored, "padded").spec.vocab_size
    except NemoportError as error:
        return facts | {"problem": str(error)}
    return facts | {
        "family": model.spec.family,
        "parameters": parameter_count(model.spec),
        "dtype": model.dtype,
        "vocabulary": {"true": model.spec.vocab_size, "padded": rows},
        "spec": to_json(model.spec),
    }


def _adapter(found: lora.Adapter) -> dict[str, Any]:
    """Facts about an adapter that lies alone."""
    judged = pickles.found(Directory(found.path), (".metadata", "*/.metadata"))
    return {
        "path": str(found.path),
        "format": f"adapter ({found.format})",
        "pickles": [asdict(each) for each in judged.pickles],
        "archives": judged.archives,
        "writer": found.writer,
        "versions": _versions(Directory(found.path)),
        "naming": found.naming,
        "adapter": {
            "scaling": sorted({str(pair) for pair in found.pairs}),
            "linears": dict(Counter(pair.linear.rpartition(".")[2] for pair in found.pairs)),
        },
        **_tensors(found.tensors),
        "trained": {},
        "inferred": [],
        "skipped": dict(Counter(found.skipped.values())),
        "tokenizer": None,
    }


def _pickles(path: Path, reader: ModuleType) -> dict[str, Any]:
    """Those of the checkpoint's files, and those that lie directly at the path, around it."""
    try:
        tree: Tree = reader.files(path)
        judged = pickles.found(tree, reader.NEEDED)
        around = pickles.found(_around(path, tree), ())
    except PolicyError:  # an archive whose members leave it; reading it will say so
        return {"pickles": [], "archives": 0}
    return {
        "pickles": [asdict(each) for each in (*judged.pickles, *around.pickles)],
        "archives": judged.archives,
    }


def _around(path: Path, tree: Tree) -> Tree:
    beside = Directory(path)
    if not path.is_dir() or (isinstance(tree, Directory) and path.resolve().is_relative_to(tree.path.resolve())):
        return Archive(path.name, {})
    stores = {entry.name: beside.file(entry.name) for entry in path.iterdir() if entry.is_file()}
    return Archive(path.name, {name: store for name, store in stores.items() if store})


def _tensors(tensors: Mapping[str, LazyTensor]) -> dict[str, Any]:
    return {
        "tensors": len(tensors),
        "elements": sum(prod(tensor.shape) for tensor in tensors.values()),
        "bytes": sum(nbytes(tensor) for tensor in tensors.values()),
        "dtypes": dict(Counter(tensor.dtype for tensor in tensors.values()).most_common()),
    }


def _inferred(stored: Checkpoint) -> dict[str, int]:
    """The tensor parallelism of the training run, from how a row-parallel weight was cut. Stages and expert ranks
    leave no such mark."""
    weight = next((stored.tensors[name] for name in stored.tensors if name.endswith(_ROW_PARALLEL)), None)
    if stored.naming != "megatron" or weight is None:
        return {}
    while isinstance(weight, Squeezed):
        weight = weight.source
    return {"tp": len({corner[-1] for corner, _ in weight.pieces}) if isinstance(weight, Mosaic) else 1}


def _rows(tensors: Mapping[str, LazyTensor]) -> int | None:
    return next((tensor.shape[0] for name, tensor in tensors.items() if name.endswith(_EMBEDDINGS)), None)


def _versions(tree: Tree) -> dict[str, str]:
    """What small files say of the programs that wrote them."""
    found: dict[str, str] = {}
    for name in (CONFIG, DESCRIPTION):
        place = next((each for each in (name, f".hf_metadata/{name}", f"weights/{name}") if tree.file(each)), None)
        said = stored_mapping(store) if place and (store := tree.file(place)) else {}
        if name == CONFIG and (version := said.get("transformers_version")):
            found["transformers"] = str(version)
        if name == DESCRIPTION and (backend := said.get("sharded_backend")):
            found[str(backend)] = str(said.get("sharded_backend_version"))
    return found


def _tokenizer(stored: Checkpoint) -> dict[str, Any] | None:
    if stored.tokenizer is None:
        return None
    return {"files": sorted(tokenizer.files(stored.tokenizer)), "ids": tokenizer.size(stored.tokenizer)}
