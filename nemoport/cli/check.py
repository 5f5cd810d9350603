"""`check`, which is `repo check` too: what a server would refuse."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nemoport.cli.options import PATH, json_option, release_option
from nemoport.compatibility import Runtime


class TargetOption(click.ParamType[int | None]):
    """any, cpu or gpu:N, as a number of GPUs; None is any."""

    name = "target"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int | None:
        word, _, count = str(value).partition(":")
        if word == "gpu" and count.isdigit() and int(count):
            return int(count)
        if value not in ("any", "cpu"):
            self.fail(f"{value!r} is no target; write any, cpu or gpu:2", param, context)
        return 0 if value == "cpu" else None


@click.command()
@click.argument("directory", type=PATH, metavar="DIR|REPO")
@click.option("--model", metavar="NAME", help="Only this model of the repository.")
@click.option("--target", "gpus", type=TargetOption(), default="any", help="any, cpu or gpu:N: judge the hardware too.")
@release_option
@click.option("--format", "form", type=click.Choice(["text", "json", "sarif"]), default="text", show_default=True)
@click.option("--fix", is_flag=True, help="Repair what is mechanical, and show what was done.")
@json_option
def check(
    directory: Path,
    model: str | None,
    gpus: int | None,
    runtime: Runtime | None,
    form: str,
    fix: bool,
    as_json: bool,
) -> None:
    """Say what a server would refuse in a repository or an artifact, without a server and without a GPU."""
    from nemoport import show
    from nemoport.check import Request, check
    from nemoport.check.repair import repair
    from nemoport.check.sarif import sarif
    from nemoport.check.subject import Target

    request = Request(directory=directory, model=model, target=Target(gpus), runtime=runtime)
    report, done = repair(request) if fix else (check(request), ())
    if form == "sarif":
        show.json(sarif(report))
    elif as_json or form == "json":
        show.json(report.as_json() | {"repaired": [asdict(each) for each in done]})
    else:
        show.findings(report, done)
    if not report.passed:
        sys.exit(1)
