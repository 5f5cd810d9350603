"""What the verbs share: how they fail, and the options that several of them have."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import click

from nemoport.compatibility import Runtime, runtime
from nemoport.errors import NemoportError, UsageError


class Verbs(click.Group):
    """A group whose errors are one sentence on stderr and the exit code of their class."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except NemoportError as error:
            _fail(str(error), error.exit_code)
        except OSError as error:
            _fail(f"{error.filename or 'a file'}: {error.strerror or error}", 4)
        except KeyboardInterrupt:
            _fail("interrupted; the same command continues where it stopped", 130)


UNITS = {"": 1, "B": 1}
UNITS |= {f"{letter}{i}B": (1024 if i else 1000) ** n for n, letter in enumerate("KMGT", 1) for i in ("", "I")}


class Size(click.ParamType[int]):
    """A number of bytes with a unit: 512MiB, 2GB, 1073741824."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        text = str(value).strip().upper()
        number = text.rstrip("KMGTIB")
        try:
            return int(float(number) * UNITS[text[len(number) :]])
        except (KeyError, ValueError):
            self.fail(f"{value!r} is no size; write 512MiB or 2GB", param, context)


class RuntimeOption(click.ParamType[Runtime]):
    """NAME[:RELEASE][@GPU], where a release alone is Triton's."""

    name = "runtime"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Runtime:
        try:
            found = runtime(str(value))
        except UsageError as error:
            self.fail(str(error), param, context)
        if found.note:
            click.echo(f"Warning: {found.note}", err=True)
        return found


PATH = click.Path(path_type=Path)
runtime_option = click.option(
    "--runtime",
    type=RuntimeOption(),
    metavar="NAME[:RELEASE]",
    help="What shall load it, such as tritonserver:26.07-trtllm or nim:1.15; refused where that cannot.",
)
release_option = click.option(
    "--triton-release",
    "--runtime",
    "runtime",
    type=RuntimeOption(),
    metavar="YY.MM",
    help="The release of Triton that shall load it; a runtime, such as tritonserver:26.07-trtllm, names one too.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout; logs go to stderr.")
config_option = click.option(
    "--config",
    "config_file",
    type=PATH,
    metavar="FILE",
    help="The architecture, JSON or YAML, in Megatron-core's words.",
)


adapter_option = click.option(
    "--adapter", type=PATH, metavar="DIR", help="A LoRA of this checkpoint: Megatron-Bridge, NeMo 2.0 or PEFT."
)
keys_option = click.option(
    "--key", "keys", type=PATH, multiple=True, metavar="PEM", help="A public key that must have signed; repeatable."
)


def numbers(versions: tuple[int, ...]) -> str:
    return ", ".join(str(version) for version in versions) or "none"


def config(path: Path | None) -> Mapping[str, Any] | None:
    """What --config says."""
    if path is None:
        return None
    from nemoport.exporters.formats.structured import mapping

    if not path.is_file():
        raise UsageError(f"--config {path} is no file")
    return mapping(path)


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)
