"""A validation as JUnit's XML, which every CI system shows: a suite for each model, a case for each check; what was
found, and notes, are what the suite prints.

Source: the schema of Apache Ant's JUnit report task, as Jenkins and GitLab read it.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree

from nemoport.validation.report import Check, Section, Summary

_NO_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""XML 1.0, section 2.2, "Characters"."""


def xml(summary: Summary) -> bytes:
    root = ElementTree.Element("testsuites", name=_text(f"nemoport validate {summary.subject}"))
    for section in summary.sections:
        root.append(_suite(section))
    ElementTree.indent(root)
    text: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return text + b"\n"


def _suite(section: Section) -> ElementTree.Element:
    failures = sum(not check.passed for check in section.checks)
    counts = {"tests": len(section.checks), "failures": failures, "errors": 0, "skipped": 0}
    suite = ElementTree.Element("testsuite", {"name": _text(section.model)} | {k: str(v) for k, v in counts.items()})
    for check in section.checks:
        suite.append(_case(section, check))
    told = [f"{check.name}: {check.found}" for check in section.checks]
    told += section.answers.notes if section.answers else ()
    ElementTree.SubElement(suite, "system-out").text = _text("\n".join(told))
    return suite


def _case(section: Section, check: Check) -> ElementTree.Element:
    case = ElementTree.Element("testcase", classname=_text(section.model), name=_text(check.name))
    if not check.passed:
        message = _text(f"found: {check.found}; needed: {check.needed}")
        ElementTree.SubElement(case, "failure", type="CheckFailed", message=message)
    return case


def _text(words: str) -> str:
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}", words)
