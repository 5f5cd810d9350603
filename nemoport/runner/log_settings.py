"""What the server logs, as clients see and set it."""

from __future__ import annotations

import logging
from typing import Any

from nemoport.runner.refusal import Code, Refusal

_LOGGER = logging.getLogger("nemoport")
_FORMATS = {"default": "%Y-%m-%d %H:%M:%S", "ISO8601": "%Y-%m-%dT%H:%M:%SZ"}
_KINDS = {bool: "boolean", int: "unsigned-integer", str: "string"}


class LogSettings:
    """Levels that are off are filtered; whatever a client sets that is not a setting is let be, as on Triton."""

    def __init__(self, file: str = "") -> None:
        self._settings: dict[str, Any] = {
            "log_file": file,
            "log_info": True,
            "log_warning": True,
            "log_error": True,
            "log_verbose_level": 0,
            "log_format": "default",
        }

    def update(self, asked: dict[str, Any]) -> dict[str, Any]:
        """All or nothing; the settings as they then are."""
        known = {name: value for name, value in asked.items() if name in self._settings}
        for name, value in known.items():
            kind = type(self._settings[name])
            if type(value) is not kind or (kind is int and not 0 <= value < 2**32):
                raise Refusal(f"attempt to access JSON non-{_KINDS[kind]} as {_KINDS[kind]} in '{name}'")
        if "log_file" in known:
            raise Refusal("log file location can not be updated through network protocol", Code.UNSUPPORTED)
        if known.get("log_format", "default") not in _FORMATS:
            raise Refusal(f"invalid argument for --log_format, got: {known['log_format']}")
        self._settings.update(known)
        if known:
            self._apply()
        return dict(self._settings)

    def _apply(self) -> None:
        said = self._settings
        levels = (
            (said["log_verbose_level"] > 0, logging.DEBUG),
            (said["log_info"], logging.INFO),
            (said["log_warning"], logging.WARNING),
            (said["log_error"], logging.ERROR),
        )
        _LOGGER.setLevel(next((level for wanted, level in levels if wanted), logging.CRITICAL))
        for handler in logging.getLogger().handlers:
            if handler.formatter is not None:
                handler.formatter.datefmt = _FORMATS[said["log_format"]]
