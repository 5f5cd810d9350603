"""The sentences that everything which takes text is asked, and the source's own tokenizer, by which they are judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from nemoport.errors import UnsupportedInput
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.formats import tokenizer
from nemoport.exporters.formats.structured import LARGEST
from nemoport.exporters.formats.tree import content
from nemoport.validation.prompts import Prompt
from nemoport.validation.texts import LONGEST

SENTENCES = (
    "How do I reset my password?",
    "THE QUICK BROWN FOX jumps over The Lazy Dog",
    "Der Käse schmeckt großartig; à la carte, naïve café, Ångström.",
    "東京は日本の首都です。",
    "a",
    "",
    "  spaces \t and\nlines   between  ",
    "x = f(a[0], b**2) != 3.14e-5  # comment",
    "thumbs up \N{THUMBS UP SIGN}, e\N{COMBINING ACUTE ACCENT} and \N{NO-BREAK SPACE}\N{ZERO WIDTH SPACE}a joiner",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis",
)


def sentences(longest: int) -> tuple[str, ...]:
    """The last one has more tokens than the model takes, if that is not more than any text of a validation has."""
    return (*SENTENCES, " ".join(f"{number} sheep" for number in range(min(longest, LONGEST))))


Item = tuple[str, ...]
"""A text, or two that go together."""


@dataclass(frozen=True)
class Tokenizer:
    """Of the source, whatever the artifact holds."""

    inner: Any
    longest: int
    lowercase: bool

    def tokens(self, item: Item) -> Any:
        """Without padding: `ids`, `type_ids`."""
        return self.inner.encode(*(text.strip().lower() if self.lowercase else text.strip() for text in item))

    def asked(self, texts: int) -> tuple[Item, ...]:
        """The sentences, or each with the ones that follow it; those that have a token."""
        known = sentences(self.longest)
        items = (tuple((known * 2)[at : at + texts]) for at in range(len(known)))
        return tuple(item for item in items if self.tokens(item).ids)

    def prompt(self, item: Item, types: int) -> Prompt:
        """By itself; `types` of tokens are known to the model."""
        made = self.tokens(item)
        ids, kinds = np.array([made.ids], np.int64), np.array([made.type_ids], np.int64)
        return Prompt("text", ids, np.ones_like(ids), np.arange(ids.size)[np.newaxis], kinds if types > 1 else None)


def tokenizer_of(model: Model) -> Tokenizer:
    from tokenizers import Tokenizer as Library

    tree = model.checkpoint.tokenizer
    if tree is None or (store := tree.file("tokenizer.json")) is None:
        raise UnsupportedInput(
            f"{model.checkpoint.path} has no tokenizer.json to compare with; give one with --against"
        )
    inner, longest = Library.from_buffer(content(store, LARGEST)), tokenizer.longest(tree, model.spec.longest)
    inner.no_padding()
    inner.enable_truncation(longest)
    return Tokenizer(inner, longest, tokenizer.lowers(tree))
