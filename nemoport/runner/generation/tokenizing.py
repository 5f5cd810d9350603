"""The tokenizer that lies beside a model: text to tokens, messages to text by its chat template, tokens to text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nemoport.errors import DamagedInput, MissingPackage
from nemoport.runner.generation.chat import ChatTemplate, chat_template
from nemoport.runner.refusal import Refusal

FILE = "tokenizer.json"
_UNFINISHED = "\ufffd"
"""What a decoder gives for the first bytes of a character."""
_NEIGHBOURS = 8


@dataclass(frozen=True)
class Tokenizer:
    ends: frozenset[int]
    """Tokens that end a text."""
    chat: ChatTemplate | None
    _tokenizer: Any

    def encode(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        try:
            return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except (ValueError, TypeError, UnicodeError) as error:  # halves of surrogate pairs are no text
            raise Refusal(f"the text cannot be tokenized: {error}") from None

    def decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


class Speech:
    """Tokens to text as they come: a character whose bytes are in several tokens comes whole. Only the last tokens are
    read again with each new one: how a token reads may depend on its neighbours, and not on the whole text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._said = ""  # of their text

    def add(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if len(text) <= len(self._said) or text.endswith(_UNFINISHED):
            return ""
        new = text[len(self._said) :]
        self._said = text
        if len(self._tokens) > _NEIGHBOURS * 2:
            self._tokens = self._tokens[-_NEIGHBOURS:]
            self._said = self._tokenizer.decode(self._tokens)
        return new

    def rest(self) -> str:
        """What is still to be said, when no token will follow."""
        return self._tokenizer.decode(self._tokens)[len(self._said) :]


def read(directory: Path) -> Tokenizer | None:
    """None where the directory has none that can be read here."""
    path = directory / FILE
    if not path.is_file():
        return None
    if find_spec("tokenizers") is None:
        raise MissingPackage("tokenizers", "text", f"text for {directory.parent.name}")
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers has no class of its own
        raise DamagedInput(f"{path} is no tokenizer that the package tokenizers reads: {error}") from error
    config = _json(directory / "tokenizer_config.json")
    special = _json(directory / "special_tokens_map.json") | config
    named = {role: _content(special.get(role)) for role in ("bos_token", "eos_token", "pad_token", "unk_token")}
    known = {role: text for role, text in named.items() if text is not None}
    said = _json(directory / "generation_config.json").get("eos_token_id")
    ends = {token for token in (said if isinstance(said, list) else [said]) if type(token) is int}
    if "eos_token" in known and (token := tokenizer.token_to_id(known["eos_token"])) is not None:
        ends.add(token)
    return Tokenizer(frozenset(ends), chat_template(directory, config, known), tokenizer)


def _json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DamagedInput(f"{path} is no JSON: {error}; copy the tokenizer again") from None
    if not isinstance(found, dict):
        raise DamagedInput(f"{path} is no JSON object; copy the tokenizer again")
    return found


def _content(token: Any) -> str | None:
    """A special token is stored as its text, or as an object with it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
