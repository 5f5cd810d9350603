"""Patterns of linears that a description says are not quantized."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase


def excludes(pattern: str, linear: str) -> bool:
    """Names, names with `*` (ModelOpt), or regular expressions after `re:` (compressed-tensors)."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], linear) is not None
        except re.error:
            return False
    return fnmatchcase(linear, pattern) or linear.startswith(f"{pattern}.")
