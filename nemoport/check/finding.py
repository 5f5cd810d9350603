"""What a check finds, as values: where, what was found, what was needed, the way out, and how it could be repaired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning", "note"]
"""error: a server refuses it or serves something else than was meant; warning: it loads, and is likely a mistake."""

Step = str | int
At = tuple[Step, ...]
"""A field of a config: ("input", 0, "dims", 1), ("parameters", "tokenizer_dir", "value", "string_value")."""


@dataclass(frozen=True)
class Rewrite:
    """Other text for a part of a config, as offsets of characters."""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class NewDirectory:
    """An empty directory that is missing, relative to what is checked."""

    path: str


Repair = Rewrite | NewDirectory


@dataclass(frozen=True)
class Problem:
    """What one rule says of one model."""

    at: At | str | int
    """A field of the config, a file relative to what is checked, or an offset in the config's text."""
    found: str
    needed: str
    fix: str
    repair: Repair | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    code: str
    severity: Severity
    model: str
    file: str
    """Relative to what is checked."""
    line: int
    column: int
    """Both count from 1, in characters; 1:1 where a whole file or directory is meant."""
    found: str
    needed: str
    fix: str
    repair: Repair | None = None

    @property
    def place(self) -> str:
        return f":{self.line}:{self.column}"

    @property
    def sentence(self) -> str:
        return f"{self.severity} {self.code}: {self.found}; needed: {self.needed}; fix: {self.fix}"
