"""sentence-transformers' description of an embedding model: `modules.json` lists what follows the transformer, each
with a directory for its config.

    modules.json, 1_Pooling/config.json, 2_Normalize/

Pooling is said by one key (`pooling_mode`, from release 5 on) or by a flag for each mode.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemoport.artifact import json_bytes
from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.formats.structured import stored_list, stored_mapping
from nemoport.exporters.formats.tree import Tree
from nemoport.spec import Embedding, Pooling

MODULES = "modules.json"
_POOLING = "1_Pooling"
_MODES: Mapping[str, Pooling] = {"mean": "avg", "cls": "cls", "lasttoken": "last"}
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
_PLACE = re.compile(r"[\w.-]{0,100}")
_PACKAGE = "sentence_transformers.models"
"""Where classes were until release 5, which every later one still takes."""


def words(tree: Tree) -> dict[str, Any]:
    """`pooling` and `normalize`, as a model's config may have them; nothing where the files are not there."""
    if (store := tree.file(MODULES)) is None:
        return {}
    kinds = {}
    for module in stored_list(store):
        if not isinstance(module, Mapping) or not isinstance(kind := module.get("type"), str):
            raise DamagedInput(f"{MODULES} lists a module without a type; copy the model again")
        kinds[kind.rpartition(".")[2]] = place = str(module.get("path") or "")
        if not _PLACE.fullmatch(place) or place == "..":
            raise DamagedInput(f"{MODULES} points outside its directory, to {place[:80]}; it was tampered with")
    if unknown := [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]:
        raise UnsupportedInput(
            f"{MODULES} lists a module {unknown[0]}, which nemoport does not compute; it knows Pooling and Normalize"
        )
    if list(kinds) == ["Transformer"]:  # a CrossEncoder's, whose class has its own head
        return {}
    if "Pooling" not in kinds:
        raise UnsupportedInput(f"{MODULES} lists no Pooling: the model gives a vector for each token, not for a text")
    if (config := tree.file(place := f"{kinds['Pooling']}/config.json")) is None:
        raise DamagedInput(f"{MODULES} names {place}, which is missing; copy the model again")
    return {"pooling": _pooling(stored_mapping(config), place), "normalize": "Normalize" in kinds}


def _pooling(config: Mapping[str, Any], place: str) -> Pooling:
    said = config.get("pooling_mode") or [mode for flag, mode in _FLAGS.items() if config.get(flag)] or "mean"
    modes = said if isinstance(said, list) else [said]
    if len(modes) != 1 or (ours := _MODES.get(str(modes[0]))) is None:
        named = " and ".join(map(str, modes))
        raise UnsupportedInput(f"{place} pools by {named}; nemoport pools by one of {', '.join(_MODES)}")
    return ours


def files(head: Embedding, hidden_size: int) -> dict[str, bytes]:
    """The description of a model, in the words that every release reads."""
    mode = {ours: name for name, ours in _MODES.items()}[head.pooling]
    flags = {flag: its == mode for flag, its in _FLAGS.items()}
    modules = [("Transformer", ""), ("Pooling", _POOLING)]
    if head.normalized:
        modules.append(("Normalize", "2_Normalize"))
    rows = [
        {"idx": number, "name": str(number), "path": path, "type": f"{_PACKAGE}.{kind}"}
        for number, (kind, path) in enumerate(modules)
    ]
    return {
        MODULES: json_bytes(rows),
        f"{_POOLING}/config.json": json_bytes({"word_embedding_dimension": hidden_size, **flags}),
    }
