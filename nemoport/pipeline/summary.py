"""A build as Markdown, to be pasted under a pull request."""

from __future__ import annotations

from nemoport.pipeline.run import Outcome

_MARKS = {"did": "done", "found done": "as before", "failed": "**failed**"}


def markdown(outcome: Outcome) -> str:
    failed = [step for step in outcome.steps if step.status == "failed"]
    verdict = f"failed: {len(failed)} of {len(outcome.steps)} steps" if failed else "passed"
    lines = [
        f"### nemoport build {outcome.pipeline.path.name}: {verdict}",
        "",
        "| model | step | | |",
        "|---|---|---|---|",
    ]
    for step in outcome.steps:
        said = step.said.replace("|", "\\|").replace("\n", " ")
        model, mark = step.model or "(repository)", _MARKS[step.status]
        lines.append(f"| {model} | {step.verb} | {mark}, {step.seconds:.1f} s | {said} |")
    return "\n".join(lines) + "\n"
