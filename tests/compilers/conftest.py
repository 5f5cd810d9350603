"""Conversions are made once here too."""

from exporters.conftest import once

__all__ = ["once"]
