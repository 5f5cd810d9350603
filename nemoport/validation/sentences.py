"""The sentences that everything which takes text is asked, and the source's own tokenizer, by which they are judged."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Tokenizer:
    """Of the source, whatever the artifact holds."""

    inner: Any
    longest: int
    lowercase: bool

    def tokens(self, text: str) -> Any:
        """One text's, without padding: `ids`, `type_ids`."""
        stripped = text.strip()
        return self.inner.encode(stripped.lower() if self.lowercase else stripped)

    def asked(self) -> tuple[str, ...]:
        """Those of the sentences that have a token."""
        return tuple(text for text in sentences(self.longest) if self.tokens(text).ids)

    def prompt(self, name: str, texts: Sequence[str], types: bool) -> Prompt:
        """Padded on the right."""
        made = [self.tokens(text) for text in texts]
        width = max(len(each.ids) for each in made)
        ids, kinds, mask = (
            np.array([[*row, *[0] * (width - len(row))] for row in rows], np.int64)
            for rows in zip(*((each.ids, each.type_ids, [1] * len(each.ids)) for each in made), strict=True)
        )
        return Prompt(name, ids, mask, np.maximum(np.cumsum(mask, axis=1) - 1, 0), kinds if types else None)


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
