"""The texts on which a quantized encoder is judged beside its source: the user's, line by line, or everyday questions,
six on each of eight subjects, so that a text has neighbours and strangers. Without a tokenizer, seeded tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from blake3 import blake3

from nemoport.calibration import tokens
from nemoport.errors import UsageError
from nemoport.exporters.checkpoint import Model
from nemoport.spec import Classifier, Embedding, ModelSpec
from nemoport.validation.prompts import SEED, Prompt
from nemoport.validation.sentences import tokenizer_of
from nemoport.validation.texts import LONGEST

MOST = 256
"""Texts that are taken of a file."""
LEAST = 21
"""Texts without which the ten nearest of one would be nearly all."""
BATCH = 16
QUESTIONS = (
    "How do I reset the password of my account?",
    "My login is locked after three wrong passwords.",
    "The code for signing in never reaches my phone.",
    "Can two people share one account?",
    "How can I delete my account for good?",
    "Change the e-mail address that I log in with.",
    "When will my parcel arrive?",
    "The courier left my package at the wrong door.",
    "Can I pick up the order in the shop instead?",
    "My delivery is late by a week.",
    "The box was damaged in transit.",
    "How much does shipping abroad cost?",
    "I was charged twice for one invoice.",
    "Please send me a receipt for last month.",
    "When do I get my money back for the returned shoes?",
    "Which credit cards do you accept?",
    "My bank declined the payment.",
    "Is there a discount for students?",
    "What is a good recipe for lentil soup?",
    "How long should rice simmer?",
    "My bread does not rise in the oven.",
    "Can I replace butter with olive oil in a cake?",
    "Which herbs go well with roast chicken?",
    "How do I keep basil fresh in the fridge?",
    "Will it rain in the mountains tomorrow?",
    "A storm with strong winds is moving in from the sea.",
    "How cold does it get there in January?",
    "It has been too dry for the crops this summer.",
    "Fog is expected on the coast until noon.",
    "How do clouds make snow and hail?",
    "What are the symptoms of the flu?",
    "My knee hurts when I climb stairs.",
    "How much sleep does a child of ten need?",
    "Is it safe to take aspirin with this medicine?",
    "The doctor measured a high blood pressure.",
    "How can I get rid of a sore throat?",
    "Who won the football match last night?",
    "The goalkeeper saved a penalty in the last minute.",
    "How long is a marathon in kilometres?",
    "She broke the world record in the high jump.",
    "What are the rules of offside?",
    "The team changed its coach in the middle of the season.",
    "Why does my program crash with an index out of range?",
    "How do I sort a list in Python?",
    "The build fails since the compiler was updated.",
    "What is the difference between a thread and a process?",
    "How do I undo the last commit in git?",
    "The server runs out of memory under load.",
)


@dataclass(frozen=True)
class Corpus:
    rows: tuple[Prompt, ...]
    """Each a text by itself, without padding."""
    source: str
    """Where they are from, for people."""

    @property
    def digest(self) -> str:
        """Of their tokens."""
        return blake3(b"".join(row.tokens.tobytes() + b"|" for row in self.rows)).hexdigest()

    def prompts(self, batch: int) -> Iterator[Prompt]:
        """In batches of at most `batch`, padded on the right."""
        step = max(1, min(batch, BATCH))
        for start in range(0, len(self.rows), step):
            yield _together(self.rows[start : start + step])


def corpus(model: Model, path: Path | None) -> Corpus:
    if path:
        return Corpus(tuple(_given(path, model)), path.name)
    tree = model.checkpoint.tokenizer
    if tree is None or tree.file("tokenizer.json") is None:
        return Corpus(tuple(_drawn(model.spec)), "seeded tokens, since the source has no tokenizer.json")
    return Corpus(tuple(_read(QUESTIONS, model)), "everyday questions")


def _given(path: Path, model: Model) -> Iterator[Prompt]:
    if not path.is_file():
        raise UsageError(f"--text {path} is no file; give a text a line, JSONL, or token ids in .npz")
    if path.suffix == ".npz":
        limits = tokens.Limits(samples=MOST, length=_longest(model.spec))
        rows = tokens.read(path, None, limits, option="--text").rows
        found = [_row(model.spec, row) for row in rows]
    else:
        lines = (line.strip() for line in tokens.texts(path, "--text"))
        found = list(_read([line for line in lines if line][:MOST], model))
    if len(found) < LEAST:
        raise UsageError(
            f"--text {path} holds {len(found)} texts, {LEAST} needed to compare their neighbours; add more"
        )
    if (most := max(int(row.tokens.max()) for row in found)) >= model.spec.vocab_size:
        raise UsageError(f"--text {path} has token {most}, and the vocabulary ends before {model.spec.vocab_size}")
    yield from found


def _read(texts: Sequence[str], model: Model) -> Iterator[Prompt]:
    """A model with one label is asked how well two texts go together, each with the one after it."""
    tokenizer, spec = tokenizer_of(model), model.spec
    pairs = isinstance(spec.head, Classifier) and spec.head.labels == 1
    for number, text in enumerate(texts):
        item = (text, texts[(number + 1) % len(texts)]) if pairs else (text,)
        row = tokenizer.prompt(item, spec.token_types)
        if row.tokens.size:
            yield _asked(spec, row.taken(slice(None), slice(_longest(spec))))


def _drawn(spec: ModelSpec) -> Iterator[Prompt]:
    draw = np.random.default_rng(SEED)
    for _ in QUESTIONS:
        yield _row(spec, draw.integers(0, spec.vocab_size, draw.integers(4, min(40, _longest(spec)))))


def _row(spec: ModelSpec, ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Prompt:
    tokens_, types = ids[None].astype(np.int64), np.zeros((1, ids.size), np.int64)
    places = np.arange(ids.size)[None]
    return _asked(spec, Prompt("text", tokens_, types + 1, places, types if spec.token_types > 1 else None))


def _asked(spec: ModelSpec, row: Prompt) -> Prompt:
    """For the whole vector."""
    whole = isinstance(spec.head, Embedding) and spec.head.matryoshka
    return replace(row, dimensions=np.array([spec.hidden_size]) if whole else None)


def _longest(spec: ModelSpec) -> int:
    return min(LONGEST, spec.longest)


def _together(rows: Sequence[Prompt]) -> Prompt:
    width = max(row.tokens.shape[1] for row in rows)

    def padded(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        return np.concatenate([np.pad(x := getattr(row, name), ((0, 0), (0, width - x.shape[1]))) for row in rows])

    types = None if rows[0].token_types is None else padded("token_types")
    wanted = [row.dimensions for row in rows if row.dimensions is not None]
    dimensions = np.concatenate(wanted) if wanted else None
    return Prompt("text", padded("tokens"), padded("mask"), padded("positions"), types, dimensions)
