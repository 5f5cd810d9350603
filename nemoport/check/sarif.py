"""Findings as SARIF 2.1.0, which code hosts show beside the lines of a change.

https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/sarif-v2.1.0-os.html
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nemoport import __version__
from nemoport.check import Report
from nemoport.check.finding import Finding
from nemoport.check.table import TABLE

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def sarif(report: Report) -> Mapping[str, Any]:
    codes = sorted({each.code for each in report.findings})
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {"name": "nemoport", "version": __version__, "rules": [_rule(code) for code in codes]}
                },
                "columnKind": "unicodeCodePoints",
                "results": [_result(report.root, each, codes.index(each.code)) for each in report.findings],
            }
        ],
    }


def _rule(code: str) -> Mapping[str, Any]:
    row = TABLE[code]
    return {
        "id": code,
        "shortDescription": {"text": row.sentence},
        "defaultConfiguration": {"level": row.severity},
    }


def _result(root: Path, finding: Finding, index: int) -> Mapping[str, Any]:
    return {
        "ruleId": finding.code,
        "ruleIndex": index,
        "level": finding.severity,
        "message": {"text": f"{finding.found}; needed: {finding.needed}; fix: {finding.fix}"},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": _uri(root / finding.file)},
                    "region": {"startLine": finding.line, "startColumn": finding.column},
                }
            }
        ],
    }


def _uri(path: Path) -> str:
    return path.as_uri() if path.is_absolute() else quote(path.as_posix())
