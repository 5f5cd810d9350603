"""Configs as rows: our word, their key, so that one table reads a config and writes it.

A `Dialect` is one program's way of saying the words of `words.py`: what marks the config as this dialect's, the words
that follow from that alone, and rows for the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from nemoport.errors import DamagedInput, UnsupportedInput
from nemoport.exporters.words import PLAIN, PerLayer, Words, differing, relevant, spec_of, words_of
from nemoport.spec import ModelSpec

Config = Mapping[str, Any]
REQUIRED = object()
_ODD = (TypeError, ValueError, LookupError, AttributeError, OverflowError)
"""What a value of the wrong kind raises, wherever it is looked at."""
LARGEST = 2**31 - 1
MOST_LAYERS = 10_000


def _same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class Key:
    """One key for one word."""

    word: str
    key: str
    default: Any = REQUIRED
    """What an absent or null key means: a value, or a function of the words read so far."""
    into: Callable[[Any], Any] = _same
    """The value as our word has it, ValueError if it cannot be."""
    out: Callable[[Any], Any] = _same
    """The inverse of `into`."""

    def read(self, config: Config, words: Words) -> Any:
        if (value := config.get(self.key)) is None:
            if self.default is REQUIRED:
                raise DamagedInput(f"the config does not say {self.key}; add it with --config FILE")
            return self.default(words) if callable(self.default) else self.default
        try:
            return self.into(value)
        except _ODD as error:
            raise DamagedInput(f"the config says {self.key}: {value!r}, which is no {self.word}") from error

    def write(self, value: Any) -> dict[str, Any]:
        return {self.key: self.out(value)}


def choice(word: str, key: str, names: Mapping[str, Any], default: Any = REQUIRED) -> Key:
    """A key whose values are names. Of several for one value the first is written."""
    ours = {value: name for name, value in reversed(list(names.items()))}
    return Key(word, key, default, names.__getitem__, ours.get)


@dataclass(frozen=True)
class Keys:
    """Several keys for one word."""

    word: str
    of: Callable[[Config], Any]
    write: Callable[[Any], dict[str, Any]]

    def read(self, config: Config, words: Words) -> Any:
        try:
            return self.of(config)
        except _ODD as error:
            raise DamagedInput(f"what the config says of {self.word} is not usable ({error!r}); correct it") from error


@dataclass(frozen=True)
class Together:
    """Keys that say several words at once, the only ones that may differ from layer to layer."""

    words: tuple[str, ...]
    of: Callable[[Config], Words]
    write: Callable[[Words], dict[str, Any]]

    def read(self, config: Config, words: Words) -> Words:
        try:
            return self.of(config)
        except _ODD as error:
            said = ", ".join(self.words)
            raise DamagedInput(f"what the config says of {said} is not usable ({error!r}); correct it") from error


Row = Key | Keys | Together


class AnyOf(tuple[Any, ...]):
    """Values of a mark, of which a row tells which it is."""


class NoneOf(tuple[Any, ...]):
    """Values that a mark must not have."""


PRESENT = object()
"""The value of a mark that only has to be there; a row tells what it is."""


@dataclass(frozen=True)
class Mark:
    """A key by which a config is known as this dialect's. An absent or null key counts as `absent`."""

    key: str
    value: Any
    absent: Any = None

    def found(self, config: Config) -> Any:
        value = config.get(self.key)
        return self.absent if value is None else value

    def differs(self, config: Config) -> str:
        found = self.found(config)
        if self.value is PRESENT:
            return f"{self.key} is missing" if found is None else ""
        if isinstance(self.value, AnyOf):
            wanted = " or ".join(repr(value) for value in self.value)
            return "" if found in self.value else f"{self.key} is {found!r}, not {wanted}"
        if isinstance(self.value, NoneOf):
            return f"{self.key} is {found!r}" if found in self.value else ""
        return "" if found == self.value else f"{self.key} is {found!r}, not {self.value!r}"


@dataclass(frozen=True, kw_only=True)
class Dialect:
    marks: tuple[Mark, ...]
    rows: Sequence[Row]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Words that every config of this dialect means without saying them, where that is not the plain thing."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Keys that are written and never read."""

    def mismatches(self, config: Config) -> list[str]:
        return [differs for mark in self.marks if (differs := mark.differs(config))]

    def read(self, config: Config) -> Words:
        words: Words = {**PLAIN, **self.fixed}
        for row in self.rows:
            words |= row.read(config, words) if isinstance(row, Together) else {row.word: row.read(config, words)}
        return relevant(words)

    def write(self, words: Words) -> dict[str, Any] | None:
        """None where layers differ in what this dialect says once."""
        config: dict[str, Any] = {
            mark.key: mark.value
            for mark in self.marks
            if mark.value is not PRESENT and not isinstance(mark.value, AnyOf | NoneOf)
        } | dict(self.constants)
        for row in self.rows:
            if not any(word in words for word in (row.words if isinstance(row, Together) else (row.word,))):
                continue  # of a part that no layer has
            if isinstance(row, Together):
                config |= row.write(words)
            elif isinstance(value := words[row.word], PerLayer):
                return None
            else:
                config |= row.write(value)
        return config

    def unknown(self, config: Config) -> list[str]:
        """The keys that say something of a model and that no mark or row looks at."""
        asked = _Asked(config)
        self.mismatches(asked)
        words: Words = {**PLAIN, **self.fixed}
        for row in self.rows:
            with suppress(DamagedInput, UnsupportedInput, *_ODD):
                read = row.read(asked, words)
                words |= read if isinstance(row, Together) else {row.word: read}
        said = [key for key, value in config.items() if value not in (None, False, 0, "", [], {})]
        known = asked.keys_asked | self.constants.keys()
        return [key for key in said if key not in known and not any(fnmatchcase(key, odd) for odd in _OF_NO_MODEL)]

    def saying(self, words: Words) -> dict[str, Any] | None:
        """The config that says exactly these words, if there is one: what is written must read back equal."""
        try:
            config = self.write(words)
            return config if config and not self.mismatches(config) and self.read(config) == words else None
        except DamagedInput:  # a word that has no value in this dialect
            return None


_OF_NO_MODEL = (
    "*dropout*",
    "*token*",
    "*dtype*",
    "*init*",
    "_*",
    "*version*",
    "auto_map",
    "use_cache",
    "architectures",
)
"""Keys of configs that training, generation and storage have."""


class _Asked(dict[str, Any]):
    """A config that remembers which of its keys were looked at."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.keys_asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)


def read(family: str, dialects: Sequence[Dialect], config: Config) -> ModelSpec:
    """The model that a config describes; one of the dialects must be its own."""
    (dialect, *_) = (dialect for dialect in dialects if not dialect.mismatches(config))
    return spec_of(family, dialect.read(config))


def write(dialects: Sequence[Dialect], spec: ModelSpec, otherwise: str) -> dict[str, Any]:
    """The config in the first dialect that says exactly this model: what is written must read back equal. `otherwise`
    ends the error when none does."""
    words = words_of(spec)
    for dialect in dialects:
        if config := dialect.saying(words):
            return config
    raise UnsupportedInput(f"no config of this format says this {spec.family} model ({differing(spec)}); {otherwise}")


def whole_number(value: Any) -> int:
    """A positive integer of a sane size; configs are also written by hand."""
    if isinstance(value, bool) or int(value) != value or not 1 <= value <= LARGEST:
        raise ValueError(value)
    return int(value)


def layers(value: Any) -> int:
    if (count := whole_number(value)) > MOST_LAYERS:
        raise ValueError(value)
    return count


def number(value: Any) -> float:
    """A positive, finite number."""
    if isinstance(value, bool) or not 0 < float(value) < float("inf"):
        raise ValueError(value)
    return float(value)


def flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value
