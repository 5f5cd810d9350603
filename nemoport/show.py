"""What a person sees: tables, one-line results, progress. Data goes to stdout, everything else to stderr."""

from __future__ import annotations

import json as _json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

if TYPE_CHECKING:
    from nemoport.check import Report as Checked
    from nemoport.check.repair import Done
    from nemoport.exporters.convert import Row
    from nemoport.pipeline import Joined, Need, Planned
    from nemoport.pipeline.run import Step
    from nemoport.validation.report import Check, Measured, Quantization, Report, Service, Summary

_out = Console(highlight=False)
if not _out.is_terminal:  # a log or a pipe has no width, and a line in it is a line
    _out = Console(highlight=False, width=200)
_err = Console(stderr=True, highlight=False)


def line(text: str) -> None:
    _out.print(escape(text), soft_wrap=True)


def warnings(found: Sequence[str]) -> None:
    for each in found:
        _err.print(f"Warning: {escape(each)}", soft_wrap=True)


def json(data: Mapping[str, Any]) -> None:
    """One object, and nothing else on stdout."""
    print(_json.dumps(data, indent=2, ensure_ascii=False))  # noqa: T201


def rows(found: Sequence[Row]) -> None:
    pairs((row.what, row.value) for row in found)


def pairs(found: Iterator[tuple[str, str]] | Sequence[tuple[str, str]]) -> None:
    grid = Table.grid(padding=(0, 2))
    for what, value in found:
        grid.add_row(f"[bold]{escape(what)}[/bold]", escape(value))
    _out.print(grid)


def facts(found: Mapping[str, Any]) -> None:
    """What `inspect` says, for people."""
    if "refused" in found:
        pairs([("format", found["format"]), *_pickles(found)])
        return
    tokenizer, vocabulary = found["tokenizer"], found.get("vocabulary")
    versions = "".join(f", {program} {version}" for program, version in found["versions"].items())
    lines = [
        ("format", f"{found['format']}, written by {found['writer']}{versions}"),
        ("family", f"{found['family']}, {found['parameters']:,} parameters, {found['dtype']}")
        if "family" in found
        else ("family", f"unknown, {found['elements']:,} numbers"),
        ("stored", f"{found['tensors']} tensors, {found['bytes']:,} bytes, {_counts(found['dtypes'])}"),
    ]
    if adapter := found.get("adapter"):
        lines[1] = ("adapter", f"{'; '.join(adapter['scaling'])} on {_counts(adapter['linears'])}")
    if vocabulary and vocabulary["padded"]:
        lines.append(("vocabulary", f"{vocabulary['true'] or 'unknown'}, stored in {vocabulary['padded']} rows"))
    if how := found.get("quantization"):
        words = (
            how["algorithm"] or "unnamed",
            how["kv_cache"] and f"KV cache {how['kv_cache']}",
            f"by {how['producer']}",
        )
        lines.append(("quantized", ", ".join(word for word in words if word)))
    if count := found.get("adapters"):
        lines.append(("adapter", f"{count} tensors beside the model's own"))
    if count := found.get("masters"):
        lines.append(("optimizer", f"float32 copies of {count} tensors, for --weights optimizer"))
    sizes = (f"{key} {size}{' (inferred)' * (key in found['inferred'])}" for key, size in found["trained"].items())
    lines += [
        ("trained at", ", ".join(sizes) or "not recorded"),
        ("skipped", _counts(found["skipped"]) or "nothing"),
        ("tokenizer", f"{', '.join(tokenizer['files'])} ({tokenizer['ids']} ids)" if tokenizer else "none"),
        *_pickles(found),
    ]
    if "problem" in found:
        lines.append(("problem", found["problem"]))
    pairs(lines)


def _pickles(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The clean ones counted, each of the others with what it would import."""
    clean = sum(each["verdict"] == "clean" for each in found["pickles"])
    unopened = f", {found['archives']} in .distcp files that are never opened" if found["archives"] else ""
    if found["pickles"] or unopened:
        yield "pickles", f"{clean} clean{unopened}"
    for each in found["pickles"]:
        if each["verdict"] != "clean":
            why = [f"would import {name}" for name in each["globals"][:3]] + [each["note"]] * bool(each["note"])
            more = f" and {len(each['globals']) - 3} more" if len(each["globals"]) > 3 else ""
            yield "", f"{each['verdict']}: {each['path']} {', '.join(why)}{more}"


def table(found: Sequence[Mapping[str, Any]]) -> None:
    if not found:
        line("nothing")
        return
    grid = Table(*found[0], box=None, header_style="bold", pad_edge=False)
    for row in found:
        grid.add_row(*(escape(_cell(value)) for value in row.values()))
    _out.print(grid)


def validation(found: Summary) -> None:
    for section in found.sections:
        if section.service:
            _service(section.model, section.service)
        if section.answers:
            _answers(section.answers)
    if len(found.sections) > 1:
        table([{"model": each.model, "verdict": _verdict(each.passed)} for each in found.sections])
    _out.print(f"[{'green' if found.passed else 'red'}]{_verdict(found.passed)}")


def _answers(found: Report) -> None:
    pairs([("subject", f"{found.subject} ({found.kind})"), ("executed by", found.executed_by)])
    _checks(found.checks)
    if found.quantization:
        _quantization(found.quantization)
    for note in found.notes:
        line(f"note: {note}")


def _quantization(found: Quantization) -> None:
    seen = f", calibrated ({found.calibration[:12]})" if found.calibration else ""
    excluded = f"{len(found.excluded)}: {', '.join(found.excluded)}" if found.excluded else "no linear of a layer"
    rows = [("quantized", f"{found.method} ({found.algorithm}){seen}"), ("left plain", excluded)]
    pairs([*rows, ("artifact", _measures(found.found)), ("source in bfloat16", _measures(found.floor))])
    table(
        [
            {"worst linears": name, "relative error": f"{each.relative:.1e}", "SQNR": f"{each.sqnr:.1f} dB"}
            for name, each in found.worst.items()
        ]
    )


def _measures(found: Measured) -> str:
    return ", ".join(f"{name} {said}" for name, said in found.measures.items())


def _service(model: str, found: Service) -> None:
    measured = [f"loaded in {found.load_seconds:.2f} s"] if found.load_seconds is not None else []
    measured += [f"{found.memory / 2**20:.0f} MiB more"] if found.memory is not None else []
    measured += [f"first answer {1e3 * found.first_seconds:.1f} ms"] if found.first_seconds is not None else []
    measured += [f"{name} {1e3 * value:.2f} ms" for name, value in found.percentiles.items()]
    pairs([("model", model), ("served", ", ".join(measured) or "not at all")])
    _checks(found.checks)


def _checks(found: Sequence[Check]) -> None:
    grid = Table("", "check", "of its bound", "found", box=None, header_style="bold", pad_edge=False)
    for check in found:
        mark = "[green]ok[/green]" if check.passed else "[red]FAILED[/red]"
        used = "" if check.used is None else f"{check.used:.0%}" if check.used < 100 else "beyond"
        said = check.found if check.passed else f"{check.found}; needed: {check.needed}"
        grid.add_row(mark, escape(check.name), used, escape(said))
    _out.print(grid)


def _verdict(passed: bool) -> str:
    return "passed" if passed else "failed"


def findings(found: Checked, done: Sequence[Done]) -> None:
    for each in done:
        line(each.diff or f"made the directory {each.file}")
    for finding in found.findings:
        line(f"{found.root / finding.file}{finding.place}: {finding.sentence}")
    if found.findings:
        counts = {severity: found.count(severity) for severity in ("error", "warning", "note")}
        said = ", ".join(f"{count} {severity}{'s' * (count > 1)}" for severity, count in counts.items() if count)
    else:
        said = "nothing found"
    line(f"{said} in {len(found.looked_at)} looked at: {found.root}")


def pipeline(planned: Sequence[Planned], ensembles: Sequence[Joined], needed: Need, max_memory: int) -> None:
    """What a build will do."""
    table(
        [
            {
                "model": each.wanted.name,
                "to": each.wanted.to,
                "writes": "in the cache" if each.converted else f"{each.job.bytes:,} bytes",
                "steps": ", ".join(each.steps),
            }
            for each in planned
        ]
        + [
            {"model": each.name, "to": "ensemble", "writes": " -> ".join(each.steps), "steps": ", ".join(each.does)}
            for each in ensembles
        ]
    )
    line(
        f"{needed.bytes:,} bytes to convert, {needed.free:,} free; at least {needed.seconds:.0f} s; memory within "
        f"{max_memory / 2**20:.0f} MiB for a conversion, and what the reference needs to validate"
    )


def step(found: Step) -> None:
    """One step of a build, when it ends, on stderr: stdout is for data."""
    mark = {"did": "[green]done[/green]", "found done": "as before", "failed": "[red]FAILED[/red]"}[found.status]
    what = f"{found.model or 'repository'}: {found.verb}"
    _err.print(f"{escape(what)} {mark} {escape(found.said)} ({found.seconds:.1f} s)", soft_wrap=True)


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar of bytes on stderr, where a terminal is there."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count: bar.advance(task, count)


@contextmanager
def working(what: str) -> Iterator[None]:
    """A sign of life on stderr for work whose length is not known."""
    if not _err.is_terminal:
        yield
        return
    with _err.status(what):
        yield


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in found.items())


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(each) for each in value) or "-"
    return "-" if value is None else str(value)
