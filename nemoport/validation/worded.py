"""What takes text: a tokenizer, token for token, and an ensemble that begins with one, vector for vector, both on the
runner over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from nemoport import artifact
from nemoport.errors import CheckFailed, InputError, UnsupportedInput, UsageError
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.targets.tokenizer import TEXT
from nemoport.repository import config, ensemble, versions
from nemoport.runner.client import Array, Client
from nemoport.runner.model import LoadOptions, load_version
from nemoport.runner.serve import serving
from nemoport.runner.server import Server
from nemoport.spec import Classifier, Embedding, ModelSpec
from nemoport.validation.executions import ANY, answering
from nemoport.validation.measures import NOWHERE, Logits, distance
from nemoport.validation.report import Check
from nemoport.validation.sentences import Item, Tokenizer, tokenizer_of
from nemoport.validation.subject import Subject, in_repository
from nemoport.validation.texts import LONGEST, answer_of

Items = Mapping[str, int]
DIMENSIONS = "dimensions"
COSINE = 0.9999
RELATIVE = 0.0142
"""How far apart two vectors of one length lie at this cosine: the square root of 2 (1 - cosine). It bounds lengths
too."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    by: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Door:
    """A model that is served; the texts of a request become its outputs."""

    ask: Callable[[Sequence[Item]], dict[str, Array]]
    batch: int


def tokenizer(subject: Subject, model: Model, options: LoadOptions) -> Judged:
    known = tokenizer_of(model)
    return _judged(lambda: _tokenizer_served(subject, options), lambda door: _tokens(door, known, _items(model.spec)))


def joined(subject: Subject, model: Model, options: LoadOptions) -> Judged:
    known = tokenizer_of(model)
    live = members(subject)
    if not live.passed:
        return Judged(by="nothing", checks=(live,))
    judged = _judged(lambda: _ensemble_served(subject, options), lambda door: _answers(door, known, model))
    uncut = f"texts are cut at {known.longest} tokens, and none was asked that is so long"
    return Judged(by=judged.by, checks=(live, *judged.checks), notes=(uncut,) if known.longest > 2 * LONGEST else ())


def _judged(served: Callable[[], AbstractContextManager[Door]], judge: Callable[[Door], Iterator[Check]]) -> Judged:
    checks: list[Check] = []
    by = "nothing"
    try:
        with served() as door:
            by = "the runner over HTTP"
            checks.extend(judge(door))
    except (CheckFailed, InputError) as error:
        name = "every text is answered" if by != "nothing" else "it loads"
        checks.append(Check(name=name, passed=False, found=str(error), needed="a model that answers"))
    return Judged(by=by, checks=tuple(checks))


@contextmanager
def _tokenizer_served(subject: Subject, options: LoadOptions) -> Iterator[Door]:
    with in_repository(subject) as (model, version):
        loaded = load_version(model, version, options)
        server = Server()
        server.adopt(loaded)
        with serving(server, http_max_input_size=ANY) as address, Client(address) as client:
            yield Door(lambda texts: client.infer(loaded.name, {TEXT: _strings(texts)}), loaded.config.max_batch_size)


@contextmanager
def _ensemble_served(subject: Subject, options: LoadOptions) -> Iterator[Door]:
    """This version under its own config, beside its members as they are live."""
    assert subject.model, "an ensemble is judged in a repository"
    assert subject.repository, "an ensemble is judged in a repository"
    more, spec = _more_inputs(subject), subject.artifact.spec
    with TemporaryDirectory(prefix="nemoport-") as scratch:
        root, name, number = Path(scratch), subject.model.name, versions.number_of(subject.files.name)
        for step in ensemble.steps(subject.artifact):
            (root / step["model"]).symlink_to((subject.repository / step["model"]).resolve(), target_is_directory=True)
        (root / name).mkdir()
        (root / name / str(number)).symlink_to(subject.files.resolve(), target_is_directory=True)
        text = (subject.model / config.FILE).read_text()
        (root / name / config.FILE).write_text(config.with_versions(text, (number,), str(subject.model / config.FILE)))
        server = Server([root], options, explicit=True)
        try:
            server.load(name)
            with serving(server, http_max_input_size=ANY) as address, Client(address) as client:

                def ask(texts: Sequence[Item]) -> dict[str, Array]:
                    whole = {each: np.full((len(texts), 1), spec.hidden_size) for each in more}
                    return client.infer(name, {TEXT: _strings(texts), **whole})

                yield Door(ask, server.find(name).config.max_batch_size)
        finally:
            server.close()


def _more_inputs(subject: Subject) -> tuple[str, ...]:
    """Beside the text, only how much of a vector is asked for."""
    assert subject.artifact.signature
    names = tuple(tensor.name for tensor in subject.artifact.signature.inputs)
    unknown = set(names) - {TEXT, DIMENSIONS}
    if TEXT not in names or unknown:
        raise UnsupportedInput(
            f"{subject.name} takes {', '.join(sorted(unknown)) or 'no ' + TEXT}; only {TEXT} can be validated"
        )
    return tuple(name for name in names if name != TEXT)


def members(subject: Subject) -> Check:
    """Whether those that are served are those that it was made of."""
    if subject.repository is None:
        raise UsageError(
            f"{subject.name} is an ensemble, whose members live in a repository; publish it there, name it with --model"
        )
    steps, wrong = ensemble.steps(subject.artifact), []
    for step in steps:
        name = step["model"]
        served = versions.state(subject.repository, name).served if versions.is_live(subject.repository, name) else None
        if served is None:
            wrong.append(f"{name} is not live")
        elif artifact.identity(versions.evidence_of(subject.repository, name) / str(served)) != step["artifact"]:
            wrong.append(f"version {served} of {name} is served, which is another")
    found = ", ".join(wrong) or ", ".join(step["model"] for step in steps)
    return Check(
        name="members it was made of", passed=not wrong, found=found, needed="every one live, these very bytes"
    )


def _tokens(door: Door, known: Tokenizer, items: Items) -> Iterator[Check]:
    """Every text by itself, and in batches; then every pair."""
    for what, batches in _ways(door, known, items):
        wrong, count = [], 0
        for texts in batches:
            answer, count = door.ask(texts), count + len(texts)
            wrong += [text for row, text in enumerate(texts) if not _same(answer, row, known.tokens(text))]
        found = f"{wrong[0][0][:40]!r} has others ({len(wrong)} of {count})" if wrong else f"{count} items"
        yield Check(name=f"tokens of the source: {what}", passed=not wrong, found=found, needed="every token equal")


def _same(answer: dict[str, Array], row: int, wanted: object) -> bool:
    """The tokens that count, and their types where the model wants them; padding counts for nothing."""
    real = answer["attention_mask"][row].astype(bool)
    names = {"input_ids": "ids", "token_type_ids": "type_ids"}
    return all(answer[name][row][real].tolist() == getattr(wanted, names[name]) for name in names if name in answer)


def _answers(door: Door, known: Tokenizer, model: Model) -> Iterator[Check]:
    """The source in float32 tokenizes and computes each item by itself."""
    spec, name, exact = model.spec, answer_of(model.spec), answering(model.spec, model.tensors)
    for what, batches in _ways(door, known, _items(spec)):
        wanted = [exact(known.prompt(item, spec.token_types)) for items in batches for item in items]
        found = np.concatenate([door.ask(items)[name].astype(np.float32) for items in batches])
        yield _compared(f"{name} of the source: {what}", found, np.concatenate(wanted))
    if isinstance(spec.head, Embedding) and spec.head.normalized:
        lengths = np.linalg.norm(found, axis=-1)
        unit = bool(np.abs(lengths - 1).max() < 1e-3)
        said = f"{found.shape[-1]} wide, of length {lengths.min():.5f} to {lengths.max():.5f}"
        yield Check(name="vectors of length 1", passed=unit, found=said, needed="of length 1, within 0.001")


def _items(spec: ModelSpec) -> Items:
    """What is asked, and how many texts it has: a classifier may compare two."""
    return {"text": 1, "pair": 2} if isinstance(spec.head, Classifier) else {"text": 1}


def _ways(door: Door, known: Tokenizer, items: Items) -> Iterator[tuple[str, list[Sequence[Item]]]]:
    for word, texts in items.items():
        asked = known.asked(texts)
        yield f"each {word} alone", _batches(asked, 1)
        yield f"{word}s in batches", _batches(asked, door.batch)


def _compared(name: str, found: Logits, wanted: Logits) -> Check:
    apart = distance(found, wanted) if found.shape == wanted.shape else NOWHERE
    used = max((1 - apart.cosine) / (1 - COSINE), apart.relative / RELATIVE)
    return Check(
        name=name,
        passed=used <= 1,
        found=f"cosine from {apart.cosine:.7f}, relative {apart.relative:.1e}, {list(found.shape)}",
        needed=f"cosine {COSINE}, relative {RELATIVE}, {list(wanted.shape)}",
        distance=apart,
        used=used,
    )


def _batches(texts: Sequence[Item], size: int) -> list[Sequence[Item]]:
    size = size or len(texts)
    return [texts[start : start + size] for start in range(0, len(texts), size)]


def _strings(items: Sequence[Item]) -> Array:
    return np.array([[text.encode() for text in item] for item in items], np.object_)
