"""What `--report DIR` leaves: report.json for programs, junit.xml for CI, report.html for people."""

from __future__ import annotations

from pathlib import Path

from nemoport import artifact
from nemoport.validation import junit, page
from nemoport.validation.report import Summary


def write(summary: Summary, directory: Path) -> None:
    documents = {
        "report.json": artifact.json_bytes(summary.as_json()),
        "junit.xml": junit.xml(summary),
        "report.html": page.html(summary).encode(),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in documents.items():
        artifact.write_atomically(directory / name, content)
