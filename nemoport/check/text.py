"""A config's text with the place of every field: one pass over the tokens, led by Triton's schema.

    max_batch_size: 8                 ("max_batch_size",)
    input [ { dims: [ 3, -1 ] } ]     ("input", 0, "dims", 1)
    input_map { key: "X" value: "x" } ("input_map", "X", "value")

The scan knows just enough of protobuf's text format to keep positions: it stops, without a word, where the text is
broken, because the real parser says better what is wrong there. Names that the schema lacks are collected, all of
them, where the parser stops at the first.
https://protobuf.dev/reference/protobuf/textformat-spec/
"""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from google.protobuf import text_format
from google.protobuf.text_encoding import CUnescape
from tritonclient.grpc.model_config_pb2 import ModelConfig

from nemoport.check.finding import At, Step

_TOKEN = re.compile(
    r"""(?P<space>[\s]+|\#[^\n]*)
      | (?P<string>"(?:[^"\n\\]|\\.)*"|'(?:[^'\n\\]|\\.)*')
      | (?P<word>[A-Za-z_][\w]*)
      | (?P<number>-?[0-9.][\w.+]*)
      | (?P<mark>.)""",
    re.VERBOSE | re.DOTALL,
)
MAX_MISSPELT = 50
"""More of them say that the file is something else."""
_CLOSING = {"{": "}", "<": ">", "[": "]"}


@dataclass(frozen=True)
class Span:
    start: int
    end: int


@dataclass(frozen=True)
class Place:
    name: Span
    """The field's name; the items of a list share it."""
    value: Span
    anchor: int
    """Where to point: at a message's name, at a value or an item of a list otherwise."""


@dataclass(frozen=True)
class Misspelt:
    """A name that the schema lacks."""

    span: Span
    word: str
    owner: str
    """The message or enum, as the schema calls it."""
    known: tuple[str, ...]
    is_enum: bool


@dataclass(frozen=True)
class SyntaxProblem:
    offset: int
    message: str


@dataclass(frozen=True)
class Text:
    content: str
    places: Mapping[At, Place]
    misspelt: tuple[Misspelt, ...]
    syntax: SyntaxProblem | None
    """What the parser said, unless that is a name in `misspelt`."""
    config: ModelConfig | None
    """None where the text is not one."""

    def find(self, at: At) -> Place | None:
        """The place of a field, or of the nearest thing around it that the text says."""
        while at not in self.places and at:
            at = at[:-1]
        return self.places.get(at)

    def offset(self, at: At) -> int:
        place = self.find(at)
        return place.anchor if place else 0

    def position(self, offset: int) -> tuple[int, int]:
        line = bisect_right(self._lines, offset)
        return line, offset - self._lines[line - 1] + 1

    def at_position(self, line: int, column: int) -> int:
        line = min(max(line, 1), len(self._lines))
        return min(self._lines[line - 1] + max(column, 1) - 1, len(self.content))

    @cached_property
    def _lines(self) -> list[int]:
        """Where each line begins."""
        return [0, *(match.end() for match in re.finditer("\n", self.content))]


def read(content: str) -> Text:
    scan = _Scan(content)
    scan.run()
    bare = Text(content, scan.places, tuple(scan.misspelt), None, None)
    try:
        config = text_format.Parse(content, ModelConfig())
    except text_format.ParseError as error:
        line, column = error.GetLine() or 1, error.GetColumn() or 1
        offset = bare.at_position(line, column)
        known = {each.span.start for each in scan.misspelt}
        message = re.sub(r"^\d+:\d+ : ", "", str(error))
        message = re.sub(r"^'.*': (?=[A-Z])", "", message, flags=re.DOTALL)
        syntax = None if offset in known else SyntaxProblem(offset, message)
        return Text(content, scan.places, tuple(scan.misspelt), syntax, None)
    except (ValueError, RecursionError) as error:
        return Text(content, scan.places, bare.misspelt, SyntaxProblem(0, str(error)), None)
    return Text(content, scan.places, bare.misspelt, None, config)


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str
    start: int
    end: int


class _Broken(Exception):
    """The text is not what the format allows; the parser will say so."""


class _Scan:
    def __init__(self, content: str) -> None:
        self.places: dict[At, Place] = {}
        self.misspelt: list[Misspelt] = []
        self._tokens = _tokens(content)
        self._token = next(self._tokens)
        self._last = 0
        """Where the token before this one ended."""
        self._strings: dict[int, str] = {}
        """The strings read so far, by where they begin."""

    def run(self) -> None:
        with contextlib.suppress(_Broken):
            self._message(ModelConfig.DESCRIPTOR, (), "")

    def _message(self, schema: Any, at: At, closing: str) -> None:
        seen: dict[str, int] = {}
        while self._token.text != closing or self._token.kind == "string":
            if self._token.kind != "word":
                raise _Broken
            name = self._next()
            field = schema.fields_by_name.get(name.text)
            if field is None:
                self._add_misspelt(name, schema.full_name, tuple(schema.fields_by_name), is_enum=False)
                self._skip_value()
            else:
                self._field(field, at, name, seen)
            while self._token.text in (",", ";"):
                self._next()

    def _field(self, field: Any, at: At, name: _Token, seen: dict[str, int]) -> None:
        if self._token.text == ":":
            self._next()
        if not field.is_repeated:
            self._value(field, (*at, field.name), name)
            return
        start = self._token.start
        listed = self._token.text == "["
        if listed:
            self._next()
        while not (listed and self._token.text == "]"):
            index = seen.get(field.name, 0)
            seen[field.name] = index + 1
            self._value(field, (*at, field.name, index), name, listed=listed)
            if not listed:
                break
            if self._token.text == ",":
                self._next()
        if listed:
            self._next()
        first = self.places.get((*at, field.name))
        whole = Span(first.value.start if first else start, self._last)
        self.places[(*at, field.name)] = Place(Span(name.start, name.end), whole, first.anchor if first else name.start)

    def _value(self, field: Any, at: At, name: _Token, *, listed: bool = False) -> None:
        start = self._token.start
        if field.message_type is None:
            token = self._scalar()
            if field.enum_type is not None and token.kind == "word":
                self._check_enum(field.enum_type, token)
        else:
            closing = _CLOSING.get(self._token.text)
            if closing is None:
                raise _Broken
            self._next()
            self._message(field.message_type, at, closing)
            self._next()
        anchor = start if listed or field.message_type is None else name.start
        self.places[at] = Place(Span(name.start, name.end), Span(start, self._last), anchor)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            self._name_by_key(at)

    def _name_by_key(self, at: At) -> None:
        """A map's entry is found by its key, not by its number."""
        key = self.places.get((*at, "key"))
        word: Step = self._strings.get(key.value.start, "") if key else ""
        for old in list(takewhile(lambda old: old[: len(at)] == at, reversed(self.places))):
            self.places[(*at[:-1], word, *old[len(at) :])] = self.places.pop(old)

    def _scalar(self) -> _Token:
        token = self._next()
        if token.kind == "mark":
            raise _Broken
        if token.kind == "string":
            text = _unquoted(token)
            while self._token.kind == "string":
                text += _unquoted(self._next())
            self._strings[token.start] = text
        return token

    def _check_enum(self, enum: Any, token: _Token) -> None:
        if token.text not in enum.values_by_name:
            self._add_misspelt(token, enum.full_name, tuple(enum.values_by_name), is_enum=True)

    def _add_misspelt(self, token: _Token, owner: str, known: tuple[str, ...], *, is_enum: bool) -> None:
        if len(self.misspelt) < MAX_MISSPELT:
            self.misspelt.append(Misspelt(Span(token.start, token.end), token.text, owner, known, is_enum))

    def _skip_value(self) -> None:
        if self._token.text == ":":
            self._next()
        open_ones: list[str] = []
        while True:
            token = self._next()
            if token.kind == "mark" and token.text in _CLOSING:
                open_ones.append(_CLOSING[token.text])
            elif token.kind == "mark" and open_ones and token.text == open_ones[-1]:
                open_ones.pop()
            if not open_ones:
                return

    def _next(self) -> _Token:
        token = self._token
        if token.kind == "end":
            raise _Broken
        self._last = token.end
        self._token = next(self._tokens)
        return token


def _unquoted(token: _Token) -> str:
    try:
        plain: str = CUnescape(token.text[1:-1]).decode("utf-8", "replace")
        return plain
    except ValueError:
        return token.text[1:-1]


def _tokens(content: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(content):
        if match.lastgroup != "space":
            yield _Token(match.lastgroup or "", match.group(), match.start(), match.end())
    yield _Token("end", "", len(content), len(content))
