"""Writes the tables of the README that follow from the plug-ins, between their markers. `make docs` runs it, and a test
fails when they are stale."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from nemoport import plugins

README = Path(__file__).parent.parent / "README.md"
ROOM = "nemoport.exporters"


def tables() -> dict[str, str]:
    return {
        "readers": _table("reader | what it opens", _described("readers")),
        "adapters": _table("adapter | what it opens", _described("adapters")),
        "families": _table("family | what it covers | read from | written as", _families()),
        "targets": _table("`--to` | what it writes", _described("targets")),
    }


def inserted(text: str) -> str:
    for name, table in tables().items():
        pattern = re.compile(rf"(<!-- {name}: generated -->\n).*?(<!-- end -->)", re.DOTALL)
        assert pattern.search(text), f"README has no place for the table of {name}"
        text = pattern.sub(lambda match, table=table: match[1] + table + match[2], text)  # type: ignore[misc]
    return text


def _described(room: str) -> Iterator[str]:
    """The first sentence of each plug-in's docstring."""
    for name, module in plugins.load_all(f"{ROOM}.{room}").items():
        yield f"`{name}` | {_first_sentence(module.__doc__ or '')}"


def _families() -> Iterator[str]:
    for name, module in plugins.load_all(f"{ROOM}.families").items():
        columns = module.COLUMNS
        sources = [word for word in ("megatron", "huggingface") if word in columns]
        targets = ["`hf`"] * ("huggingface" in columns) + ["`trtllm`"] * ("trtllm" in columns) + ["`onnx`"]
        yield f"`{name}` | {_first_sentence(module.__doc__ or '')} | {', '.join(sources)} | {', '.join(targets)}"


def _first_sentence(text: str) -> str:
    sentence = " ".join(text.split("\n\n")[0].split())
    sentence = re.sub(r"^`\w+`: ", "", sentence)
    return re.split(r"(?<=\w\w)\. ", sentence)[0].rstrip(".")


def _table(header: str, rows: Iterator[str]) -> str:
    rule = "|".join("---" for _ in header.split("|"))
    return "\n".join([f"| {header} |", f"|{rule}|", *(f"| {row} |" for row in rows)]) + "\n"


if __name__ == "__main__":
    README.write_text(inserted(README.read_text()))
