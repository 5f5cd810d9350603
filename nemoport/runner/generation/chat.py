"""Messages to text by the chat template that belongs to a tokenizer, as transformers does it.

The template is a program from a checkpoint: it runs in jinja2's sandbox, which gives it no way to Python's objects.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from nemoport.runner.refusal import Refusal

FILE = "chat_template.jinja"


@dataclass(frozen=True)
class ChatTemplate:
    source: str
    special: Mapping[str, str]
    """`bos_token` and the like, as templates name them."""

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Up to where the assistant begins to speak."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(  # its text is for a model, not for a page
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        try:
            return environment.from_string(self.source).render(
                messages=messages, add_generation_prompt=True, **self.special
            )
        except Refusal:
            raise
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as error:
            raise Refusal(f"the chat template of the model cannot take these messages: {error}") from None


def chat_template(directory: Path, config: Mapping[str, Any], special: Mapping[str, str]) -> ChatTemplate | None:
    """A file of its own, or the one in `tokenizer_config.json`; of several, the one that is called `default`."""
    path = directory / FILE
    found: Any = path.read_text("utf-8") if path.is_file() else config.get("chat_template")
    if isinstance(found, list):
        named = {row.get("name"): row.get("template") for row in found if isinstance(row, dict)}
        found = named.get("default")
    return ChatTemplate(found, special) if isinstance(found, str) else None


def _refuse(message: str) -> NoReturn:
    raise Refusal(f"the chat template of the model refuses these messages: {message}")


def _json(value: Any, indent: int | None = None) -> str:
    """Without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
