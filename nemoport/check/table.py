"""Every code that a finding can have, with what it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemoport.check import artifacts, nim, rules
from nemoport.check.rules.row import Rule

_RULES: tuple[Rule[Any], ...] = (*rules.TEXT, *rules.CONFIG, *artifacts.RULES, *nim.RULES)
TABLE: Mapping[str, Rule[Any]] = {rule.code: rule for rule in sorted(_RULES, key=lambda rule: rule.code)}
