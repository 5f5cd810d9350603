"""What the models before and after the engine know of its tokenizer, beside `tokenizer.json` itself: the ids at which
a text ends, and the one that fills up. Nothing is tokenized here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput

FILE = "tokenizer.json"
SETTINGS = "tokenization.json"
_SAID_IN = ("tokenizer_config.json", "special_tokens_map.json")


def settings(directory: Path, vocab_size: int) -> dict[str, Any]:
    """For `tokenization.json`. Where a text may end in several ways, the first is the engine's end and the others are
    words to stop at."""
    if not (directory / FILE).is_file():
        raise UnsupportedInput(
            f"{directory} has no {FILE}; give the directory of the tokenizer with --tokenizer, or load it with "
            "transformers' AutoTokenizer and save it there with save_pretrained"
        )
    try:
        ids = _ids(directory)
        pads = [ids[name] for name in _named(directory, "pad_token") if name in ids]
        ends = _generated(directory) or [ids[name] for name in _named(directory, "eos_token") if name in ids][:1]
        most = max((*ids.values(), *ends), default=0)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise DamagedInput(
            f"{directory} does not say its tokens as transformers does ({error!r}); save the tokenizer again"
        ) from error
    if not ends:
        raise UnsupportedInput(f"{directory} does not say where a text ends; put eos_token into tokenizer_config.json")
    if most >= vocab_size:
        raise UnsupportedInput(
            f"{directory} knows the token {most}, and the engine {vocab_size}; give its own tokenizer with --tokenizer"
        )
    return {
        "end_id": ends[0],
        "pad_id": (pads or ends)[0],
        "stop_ids": ends[1:],
        "vocab_size": vocab_size,
        "add_special_tokens": True,
        "skip_special_tokens": True,
    }


def _ids(directory: Path) -> dict[str, int]:
    """Token -> id: the model's, and those that were added."""
    said = _read(directory / FILE)
    model = said.get("model") or {}
    vocabulary = model.get("vocab") or {}
    known = dict(vocabulary) if isinstance(vocabulary, dict) else {row[0]: i for i, row in enumerate(vocabulary)}
    known |= {row["content"]: row["id"] for row in said.get("added_tokens") or ()}
    return {name: _id(each) for name, each in known.items()}


def _generated(directory: Path) -> list[int]:
    """The ids at which transformers' `generate` stops."""
    if not (directory / "generation_config.json").is_file():
        return []
    said = _read(directory / "generation_config.json").get("eos_token_id")
    return [_id(each) for each in (said if isinstance(said, list) else [said] if said is not None else [])]


def _id(said: Any) -> int:
    if not isinstance(said, int) or said < 0:
        raise ValueError(f"the id {said!r}")
    return said


def _named(directory: Path, word: str) -> list[str]:
    """What the files of a tokenizer call one of its tokens: text, or text with more about it."""
    said = [_read(directory / name).get(word) for name in _SAID_IN if (directory / name).is_file()]
    return [each["content"] if isinstance(each, dict) else each for each in said if each]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
        return found
    except ValueError as error:
        raise DamagedInput(f"{path} is no JSON object ({error}); save the tokenizer again") from error
