"""A validation as one HTML page that needs nothing beside it."""

from __future__ import annotations

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from nemoport.validation import plots
from nemoport.validation.report import Section, Summary

TEMPLATE = "report.html"


def html(summary: Summary) -> str:
    loader = PackageLoader("nemoport", "templates")
    pages = Environment(loader=loader, undefined=StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    sections = [{"found": section, "plots": _plots(section), "facts": _facts(section)} for section in summary.sections]
    return pages.get_template(TEMPLATE).render(summary=summary, sections=sections)


def _plots(section: Section) -> dict[str, Markup]:
    """SVG of our own making, set in as it is."""
    made: dict[str, str] = {}
    if section.answers:
        if used := {each.name: each.used for each in section.answers.checks if each.used is not None}:
            made["How near each comparison came to its bound"] = plots.bounds(used)
        if section.answers.layers:
            made["What rounding the weights does, layer by layer"] = plots.by_layer(section.answers.layers)
    if section.service and section.service.latencies:
        made["Latency, one request at a time"] = plots.latencies(section.service.latencies)
    return {title: Markup(svg) for title, svg in made.items()}  # noqa: S704


def _facts(section: Section) -> dict[str, str]:
    facts: dict[str, str] = {}
    if report := section.answers:
        facts |= {"version": report.subject, "kind": report.kind, "executed by": report.executed_by}
        facts |= {f"source {word}": str(value) for word, value in report.source.items()}
        facts |= dict(report.environment)
    if service := section.service:
        if service.load_seconds is not None:
            facts["load"] = f"{service.load_seconds:.2f} s"
        if service.memory is not None:
            facts["memory"] = f"{service.memory / 2**20:+.0f} MiB"
        if service.first_seconds is not None:
            facts["first answer"] = f"{1e3 * service.first_seconds:.1f} ms"
        facts |= {f"latency {name}": f"{1e3 * value:.2f} ms" for name, value in service.percentiles.items()}
    return facts
