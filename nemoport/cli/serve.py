"""`serve`: the runner, with tritonserver's flags."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from nemoport.cli.options import PATH
from nemoport.runner.flags import FLAGS, KINDS, LACKING, Flag

_POLLED_IN_PLACE = ("GRPC_EXPERIMENTS", "-event_engine_listener")
"""The thread that takes gRPC's calls reads the sockets itself, where by default other threads hand it on: half the
processor time of an empty call. gRPC reads this when it is imported."""


class Serve(click.Command):
    """Its options come from the rows of `runner/flags.py`, and its help shows them in tritonserver's groups."""

    def __init__(self, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.params += [_option(flag) for group in FLAGS.values() for flag in group]

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        for title, group in FLAGS.items():
            names = {flag.option for flag in group}
            records = [param.get_help_record(context) for param in self.params if param.name in names]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record])


def _option(flag: Flag) -> click.Option:
    names = [flag.name, *filter(None, [flag.also]), flag.option]
    if flag.kind == "flag":
        return click.Option(names, is_flag=True, help=flag.help)
    told = f"Accepted with a warning: this server lacks {flag.lacks}." if flag.lacks else flag.help
    default = flag.default if flag.default is not None or not flag.many else ()
    return click.Option(
        names,
        type=KINDS[flag.kind],
        default=default,
        multiple=flag.many,
        help=told,
        metavar=f"<{flag.kind}>",
        show_default=not flag.many and default not in (None, ""),
    )


@click.command(cls=Serve)
@click.argument("repositories", type=PATH, nargs=-1, metavar="[REPO]...")
def serve(repositories: tuple[Path, ...], model_repository: tuple[Path, ...], **options: Any) -> None:
    """Serve repositories over HTTP and gRPC as tritonserver would, with its flags.

    A flag of tritonserver that does nothing here is accepted, and a warning says so.
    """
    os.environ.setdefault(*_POLLED_IN_PLACE)
    from nemoport.runner.serve import ServeOptions
    from nemoport.runner.serve import serve as run

    require_verified, keys = options.pop("require_verified"), options.pop("key")
    options["admit"] = _admission(require_verified, keys)
    lacking = {name: options.pop(name.removeprefix("--").replace("-", "_")) for name in LACKING}
    given = tuple(name for name, value in lacking.items() if value)
    run(ServeOptions(model_repository=(*repositories, *model_repository), not_done=given, **options))


def _admission(require_verified: bool, keys: tuple[Path, ...]) -> Callable[[Path], None]:
    """What every model's directory must pass before it is loaded."""
    from nemoport import doctor
    from nemoport.repository import signing, stamps, verify

    machine, public = doctor.look(Path.cwd()), [signing.public_key(key) for key in keys]

    def admit(model: Path) -> None:
        stamps.admit(model, doctor.engines(machine), machine.sms)
        if require_verified or keys:
            verify.admit(model, public)

    return admit
