"""The text of a config: what the parser refuses, and what a template left in it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nemoport.check.finding import Problem, Rewrite
from nemoport.check.rules.row import Rule, nearest, some
from nemoport.check.subject import Subject
from nemoport.check.text import Misspelt

_PLACEHOLDER = re.compile(r"\$\{[^}\n]{0,200}\}?|\{\{[^{}\n]{1,200}\}\}")
_COMMENT = re.compile(r"""("(?:[^"\n\\]|\\.)*"|'(?:[^'\n\\]|\\.)*')|\#[^\n]*""")
_COMMA = 'Expected ",".'
_TWICE = ("should not have multiple", "another member of oneof")


def placeholders(subject: Subject) -> Iterator[Problem]:
    text = subject.model.text
    if text is None:
        return
    spoken = _COMMENT.sub(lambda match: match[1] or " " * len(match[0]), text.content)
    for match in _PLACEHOLDER.finditer(spoken):
        yield Problem(
            match.start(), f"{match[0]} is still in the config", "a value", "fill the template in, or write the value"
        )


def unknown_fields(subject: Subject) -> Iterator[Problem]:
    yield from (_unknown(each) for each in _misspelt(subject) if not each.is_enum)


def unknown_values(subject: Subject) -> Iterator[Problem]:
    yield from (_unknown(each) for each in _misspelt(subject) if each.is_enum)


def twice(subject: Subject) -> Iterator[Problem]:
    for offset, message in _syntax(subject):
        if any(words in message for words in _TWICE):
            yield Problem(offset, _as_clause(message), "one of them", "take the other away")


def missing_comma(subject: Subject) -> Iterator[Problem]:
    for offset, message in _syntax(subject):
        if message == _COMMA:
            repair = _comma(subject.model.text.content, offset) if subject.model.text else None
            yield Problem(offset, "two items of a list without a comma between them", "a comma", "write it", repair)


def other_syntax(subject: Subject) -> Iterator[Problem]:
    for offset, message in _syntax(subject):
        if message != _COMMA and not any(words in message for words in _TWICE):
            yield Problem(
                offset, _as_clause(message), "protobuf's text format, as Triton reads it", "correct the text here"
            )


def _misspelt(subject: Subject) -> tuple[Misspelt, ...]:
    return subject.model.text.misspelt if subject.model.text else ()


def _syntax(subject: Subject) -> Iterator[tuple[int, str]]:
    text = subject.model.text
    if text and text.syntax and not _PLACEHOLDER.match(text.content, text.syntax.offset):
        yield text.syntax.offset, text.syntax.message


def _unknown(each: Misspelt) -> Problem:
    near = _prefixed(each) if each.is_enum else nearest(each.word, each.known)
    owner = each.owner.removeprefix("inference.")
    return Problem(
        each.span.start,
        f"{owner} has no {'value' if each.is_enum else 'field'} {each.word}",
        f"one of {some(each.known)}",
        f"write {near}" if near else "take it away, or look for the name in Triton's model_config.proto",
        Rewrite(each.span.start, each.span.end, near) if near else None,
    )


def _prefixed(each: Misspelt) -> str | None:
    """FP32 is TYPE_FP32, cpu is KIND_CPU, float32 is none of them by its letters."""
    prefix = each.known[0].partition("_")[0] + "_"
    whole = each.word.upper() if each.word.upper().startswith(prefix) else prefix + each.word.upper()
    return whole if whole in each.known else nearest(whole, each.known)


def _comma(content: str, offset: int) -> Rewrite | None:
    """After the item before, unless a comment may be in between."""
    if not re.match(r"[\w\"'{<.-]", content[offset : offset + 1]):
        return None
    after = len(content[:offset].rstrip())
    at = offset if "#" in content[content.rfind("\n", 0, after) + 1 : after] else after
    return Rewrite(at, at, ",")


def _as_clause(message: str) -> str:
    return message.replace('"inference.', '"').rstrip(".")


RULES = (
    Rule("NP103", "error", "A config is protobuf's text format.", other_syntax),
    Rule("NP104", "error", "Every field is one that Triton's schema has.", unknown_fields),
    Rule("NP105", "error", "Every enum value is one that Triton's schema has.", unknown_values),
    Rule("NP106", "error", "A field is said once, and one of those that exclude each other.", twice),
    Rule("NP107", "error", "Items of a list have commas between them.", missing_comma),
    Rule("NP108", "error", "No placeholder of a template is left.", placeholders),
)
