"""NeMo 1.0: a `.nemo` file, which is a tar, gzipped or not, or the directory that it was unpacked to.

`model_config.yaml`, the tokenizer under a hashed name, and the weights: one `model_weights.ckpt`, one in each
`mp_rank_TT/` or `tp_rank_TT_pp_rank_PPP/`, or a distributed checkpoint in `model_weights/`. Nothing is unpacked.
Sources: NeMo 1.x, core/connectors/save_restore_connector.py and nlp/parts/nlp_overrides.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.checkpoint import Checkpoint
from nemoport.exporters.formats import distributed, megatron, megatron_ranks, tar, tokenizer
from nemoport.exporters.formats.megatron_ranks import Place
from nemoport.exporters.formats.structured import stored_mapping
from nemoport.exporters.formats.tree import Archive, Directory, Tree, archive, is_archive, peek
from nemoport.exporters.tensor import Store

WRAPS = ("torch_dist", "torch_dcp", "zarr", "megatron_lm")
CONFIG, WEIGHTS, WHOLE = "model_config.yaml", "model_weights", "model_weights.ckpt"
LOOKS_FOR = "a .nemo archive, or its model_config.yaml"
NEEDED = (WHOLE, f"*p_rank_*/{WHOLE}", f"{WEIGHTS}/{distributed.INDEX}")
_RANK = re.compile(rf"(?:tp_rank_(\d{{2,4}})_pp_rank_(\d{{3,5}})|mp_rank_(\d{{2,4}}))/{re.escape(WHOLE)}")
_FIRST = 2**20
"""Bytes of a tar that has another name in which its config is looked for."""


def recognises(path: Path) -> bool:
    if path.is_file():
        return is_archive(path) and (path.suffix == ".nemo" or tar.heads(peek(path, _FIRST), CONFIG))
    root = _root(path)
    return root is not None and (
        (root / WHOLE).is_file() or (root / WEIGHTS).is_dir() or any(root.glob(f"*p_rank_*/{WHOLE}"))
    )


def files(path: Path) -> Tree:
    return archive(path) if path.is_file() else Directory(_root(path) or path)


def read(path: Path, config: Mapping[str, Any] | None) -> Checkpoint:
    tree = files(path)
    if (stored := tree.file(CONFIG)) is None:
        raise DamagedInput(f"{path} holds no {CONFIG}; it is incomplete, or no checkpoint of NeMo 1.0")
    said = stored_mapping(stored)
    if "megatron" not in (target := str(said.get("target") or "megatron")).lower():
        raise UnsupportedInput(f"{path} holds a {target}; of NeMo 1.0, nemoport reads the Megatron models")
    words = megatron.words_of_yaml(said) | dict(config or {})
    names = _ranks(tree)
    if not names and not any(name.startswith(f"{WEIGHTS}/") for name in tree.names()):
        raise DamagedInput(f"{path} holds no weights: no {WHOLE}, none for each rank and no {WEIGHTS}/; copy it again")
    if tree.file(f"{WEIGHTS}/{distributed.DESCRIPTION}") or not names:
        contents, trained = distributed.read(tree.below(WEIGHTS)), megatron.trained(words)
    else:
        ranks = {place: _rank(tree, name) for place, name in names.items()}
        contents, trained = megatron_ranks.gather(ranks), megatron_ranks.trained(ranks)
    tensors, skipped = megatron.weights(contents.tensors, contents.objects)
    return Checkpoint(
        path=path,
        format="nemo1",
        writer=f"NeMo {said.get('nemo_version') or '1'}",
        naming="megatron",
        config=words,
        tensors=tensors,
        skipped=skipped,
        tokenizer=_tokenizer(tree, said.get("tokenizer")),
        trained=trained,
        masters=megatron.masters(contents.tensors),
    )


def _root(path: Path) -> Path | None:
    """The directory of the config: the one given, or the one around its weights."""
    candidates = (path, path.parent) if path.name == WEIGHTS else (path,)
    return next((each for each in candidates if (each / CONFIG).is_file()), None)


def _ranks(tree: Tree) -> dict[Place, str]:
    """The file of each rank."""
    found = {}
    for name in tree.names():
        if name == WHOLE:
            return {(0, 0, 0): name}
        if match := _RANK.fullmatch(name):
            tensor, stage, both = match.groups()
            found[int(tensor or both), int(stage or 0), 0] = name
    return found


def _rank(tree: Tree, name: str) -> megatron_ranks.Rank:
    file = megatron_ranks.opened(tree, name)
    return megatron_ranks.Rank(name, (file.chunk(file.saved),))


def _tokenizer(tree: Tree, said: Any) -> Tree | None:
    """The config names its files, or its directory, as `nemo:HASH_NAME`; other words are of no member."""
    words = said if isinstance(said, Mapping) else {}
    members = {key: name for key, value in words.items() if (name := _member(value))}
    directories = (tree.below(members[key]) for key in ("type", "model", "vocab_file") if key in members)
    files = {} if words.get("library") == "tiktoken" else dict(_files(tree, members, words.get("library")))
    return tokenizer.find(*directories, Archive(tree.name, files))


def _member(value: Any) -> str | None:
    """Its own, and not one of the machine that it is read on."""
    if not isinstance(value, str) or not value.startswith("nemo:"):
        return None
    name = value.removeprefix("nemo:")
    return name if PurePosixPath(name).name == name != ".." else None


def _files(tree: Tree, members: Mapping[str, str], library: Any) -> Iterator[tuple[str, Store]]:
    """Single files, under the names that Hugging Face has for them."""
    sentencepiece = "tokenizer.model" if library == "sentencepiece" else ""
    for key, json_name, other_name in (
        ("model", "tokenizer.json", sentencepiece),
        ("vocab_file", "vocab.json", "vocab.txt"),
        ("merge_file", "", "merges.txt"),
    ):
        member = members.get(key, "")
        name = json_name if member.endswith(".json") else other_name
        if member and name and (store := tree.file(member)):
            yield name, store
