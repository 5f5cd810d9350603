"""`compile`: an artifact as engines for one kind of GPU, or the job that builds them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nemoport.cli.options import PATH, json_option, runtime_option
from nemoport.compatibility import Runtime

if TYPE_CHECKING:
    from nemoport.compilers.build import Option


class Compile(click.Command):
    """Its options are those of all builders, which are imported when they are asked for."""

    def get_params(self, context: click.Context) -> list[click.Parameter]:
        from nemoport.compilers.compile import options

        return [*super().get_params(context), *(_option(row, takers) for row, takers in options().items())]


def _option(row: Option, takers: tuple[str, ...]) -> click.Option:
    flag = f"--{row.name.replace('_', '-')}"
    also = [f"--{row.name}"] if "_" in row.name else []
    kind = PATH if row.kind is Path else click.Choice(row.kind) if isinstance(row.kind, tuple) else row.kind
    return click.Option(
        [flag, *also, row.name],
        type=None if row.flag else kind,
        is_flag=row.flag,
        default=None,
        multiple=row.many,
        metavar=row.metavar,
        help=f"{row.help} ({', '.join(takers)})",
    )


@click.command("compile", cls=Compile)
@click.argument("artifact", type=PATH)
@click.option("--to", required=True, metavar="BUILDER", help="What to build; an option names in brackets who takes it.")
@click.option("-o", "--output", "destination", type=PATH, required=True, metavar="DIR", help="Where to write.")
@runtime_option
@click.option("--job", "only_job", is_flag=True, help="Only write the build job, DIR.job.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the commands, write nothing.")
@json_option
def compile_(
    artifact: Path,
    to: str,
    destination: Path,
    runtime: Runtime | None,
    only_job: bool,
    dry_run: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Build engines from an artifact, or write the job that does where this machine cannot.

    The job, DIR.job, runs in a container on the machine that has what is missing; the same command then finishes DIR.
    Exit code 4: the job was written, and DIR waits for it.
    """
    import shlex

    from nemoport import show
    from nemoport.compilers import compile as compiling

    said = {name: value for name, value in given.items() if value not in (None, ())}
    planned = compiling.plan(artifact, to, destination, said, runtime)
    finished = None
    if not as_json:
        for command in planned.build.commands:
            show.line(shlex.join(command))
    if only_job and not dry_run:
        compiling.write_job(planned)
    elif not dry_run:
        finished = compiling.run(planned)
    if as_json:
        show.json(compiling.as_json(planned, finished))
    elif finished:
        show.line(f"wrote {destination}: {len(finished.files)} files, loaded by {'; '.join(finished.loads)}")
    elif only_job and not dry_run:
        show.line(f"wrote the build job {planned.job}: run its build.sh, then this command without --job")
