"""Repairs of what is mechanical: the text is changed at the places that findings name, and looked at again, until
nothing is left that can be repaired so. Doing it twice changes nothing more."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemoport.artifact import write_atomically
from nemoport.check import Report, Request, check
from nemoport.check.finding import Finding, NewDirectory, Rewrite

MAX_ROUNDS = 20


@dataclass(frozen=True)
class Done:
    file: str
    codes: tuple[str, ...]
    diff: str
    """What was changed, as a unified diff; a new directory has none."""


def repair(request: Request) -> tuple[Report, tuple[Done, ...]]:
    """What is left, and what was done."""
    done: list[Done] = []
    report = check(request)
    for _ in range(MAX_ROUNDS):
        ready = [each for each in report.findings if each.repair is not None]
        if not ready:
            break
        done += _apply(report.root, ready)
        report = check(request)
    return report, tuple(done)


def rewritten(content: str, rewrites: Iterable[Rewrite]) -> str:
    """From the end to the start, so that offsets hold; of two that overlap, the first in the text."""
    chosen: list[Rewrite] = []
    for each in sorted(set(rewrites), key=lambda rewrite: (rewrite.start, rewrite.end, rewrite.text)):
        if not chosen or each.start >= chosen[-1].end:
            chosen.append(each)
    for each in reversed(chosen):
        content = content[: each.start] + each.text + content[each.end :]
    return content


def _apply(root: Path, findings: Sequence[Finding]) -> list[Done]:
    done = []
    for file in dict.fromkeys(each.file for each in findings):
        here = [each for each in findings if each.file == file]
        codes = tuple(sorted({each.code for each in here}))
        for each in here:
            if isinstance(each.repair, NewDirectory):
                (root / each.repair.path).mkdir()
                done.append(Done(each.repair.path, (each.code,), ""))
        rewrites = [each.repair for each in here if isinstance(each.repair, Rewrite)]
        if rewrites:
            before = (root / file).read_bytes().decode()
            after = rewritten(before, rewrites)
            write_atomically(root / file, after.encode())
            lines = difflib.unified_diff(before.splitlines(), after.splitlines(), file, file, "", "", 0, "")
            done.append(Done(file, codes, "\n".join(lines)))
    return done
