"""Values of a config's parameters, which are text: read as Triton's backends read them, and refused in their words."""

from __future__ import annotations

import re
from collections.abc import Callable

from nemoport.errors import DamagedInput

Read = Callable[[str], object]
"""Of the text of one parameter; raises DamagedInput."""

_BOOLEANS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}
_WHOLE = re.compile(r"[+-]?[0-9]{1,20}")  # as many digits as 64 bits have


def boolean(text: str) -> bool:
    """True or false in any letters, on and off, 1 and 0."""
    if text.lower() not in _BOOLEANS:
        raise DamagedInput(f"failed to convert '{text}' to boolean")
    return _BOOLEANS[text.lower()]


def integer(text: str) -> int:
    """Of 32 bits. Triton's backends also take `12abc` for 12; this does not."""
    return _number(text, range(-(2**31), 2**31), "integral number")


def unsigned(text: str) -> int:
    """Of 64 bits."""
    return _number(text, range(2**64), "unsigned long long integral number")


def anything(text: str) -> str:
    return text


def _number(text: str, known: range, kind: str) -> int:
    if not _WHOLE.fullmatch(text) or int(text) not in known:
        raise DamagedInput(f"failed to convert '{text}' to {kind}")
    return int(text)
