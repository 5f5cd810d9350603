"""What a quantized model is judged on beside its source, and by which measures: a model that writes by how it predicts
text, one that answers each text at once by its answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoport.exporters.checkpoint import Model
from nemoport.exporters.encoding import Encoding
from nemoport.spec import Classifier, Embedding, LanguageModel
from nemoport.validation import fidelity, likeness
from nemoport.validation.corpus import corpus
from nemoport.validation.fidelity import Answers
from nemoport.validation.passages import passages
from nemoport.validation.report import Check, Measured


@dataclass(frozen=True, kw_only=True)
class Verdict:
    found: Measured
    floor: Measured
    """The same of the source in 16 bits."""
    checks: tuple[Check, ...]


@dataclass(frozen=True, kw_only=True)
class Judge:
    source: str
    """Of its texts, for people."""
    digest: str
    """Of their tokens."""
    judged: Callable[[Answers, Answers, Answers], Verdict]
    """The source's answers, the artifact's, and the source's in 16 bits."""


def judge(
    model: Model,
    encoding: Encoding,
    batch: int,
    text: Path | None,
    calibration: Mapping[str, Any] | None,
    seen: str | None,
) -> Judge:
    """`text` is the user's; `calibration` and its digest `seen` tell what is left of the text of that."""
    match model.spec.head:
        case LanguageModel():
            return _of_text(model, fidelity.gate(encoding), batch, text, calibration, seen)
        case head:
            return _of_answers(model, head, batch, text)


def _of_text(
    model: Model,
    gate: fidelity.Gate,
    batch: int,
    text: Path | None,
    calibration: Mapping[str, Any] | None,
    seen: str | None,
) -> Judge:
    found = passages(model, text, calibration, seen)
    asked = tuple(found.prompts(batch, model.spec.vocab_size))

    def judged(source: Answers, *others: Answers) -> Verdict:
        ours, floor = fidelity.fidelities(asked, source, others)
        return Verdict(found=ours, floor=floor, checks=tuple(fidelity.checks(ours, gate, found)))

    return Judge(source=found.source, digest=found.tokens.digest, judged=judged)


def _of_answers(model: Model, head: Embedding | Classifier, batch: int, text: Path | None) -> Judge:
    found = corpus(model, text)
    asked = tuple(found.prompts(batch))

    def judged(*answers: Answers) -> Verdict:
        ours, floor = likeness.likenesses(asked, head, *answers)
        return Verdict(found=ours, floor=floor, checks=tuple(likeness.checks(ours, found.source)))

    return Judge(source=found.source, digest=found.digest, judged=judged)
