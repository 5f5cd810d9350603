"""`layout`: directories as others expect them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from nemoport.cli.options import PATH, Verbs, json_option
from nemoport.errors import UsageError

if TYPE_CHECKING:
    from nemoport.artifact import Artifact


@click.group("layout", cls=Verbs)
def layout() -> None:
    """Lay out an artifact as another server wants to find it."""


@layout.command("inflight_batcher_llm")
@click.argument("engine", type=PATH)
@click.option("-o", "--output", "destination", type=PATH, required=True, metavar="REPO", help="Where to write.")
@click.option("--tokenizer", type=PATH, metavar="DIR", help="Where tokenizer.json lies, if not with the engine.")
@click.option("--draft", type=PATH, metavar="ENGINE", help="An engine that proposes tokens to this one.")
@click.option("--max-batch-size", "--max_batch_size", type=click.IntRange(1), help="Default: what it was built for.")
@click.option("--decoupled/--no-decoupled", default=True, show_default=True, help="Whether answers may be streams.")
@click.option("--accumulate-tokens", is_flag=True, help="A piece of a stream is the whole text until then.")
@click.option(
    "--set", "given", multiple=True, metavar="NAME=VALUE", help="A parameter of the backend; draft.NAME for --draft's."
)
@json_option
def inflight_batcher_llm(
    engine: Path,
    destination: Path,
    tokenizer: Path | None,
    draft: Path | None,
    max_batch_size: int | None,
    decoupled: bool,
    accumulate_tokens: bool,
    given: tuple[str, ...],
    as_json: bool,
) -> None:
    """The whole repository for an engine of TensorRT-LLM up to 1.2: preprocessing, tensorrt_llm, postprocessing,
    ensemble, tensorrt_llm_bls. docs/compile.md lists what --set takes."""
    from nemoport import show
    from nemoport.repository.layouts import inflight_batcher_llm as layouts

    pairs = [text.partition("=") for text in given]
    for name, equals, _ in pairs:
        if not equals:
            raise UsageError(f"--set {name} is not NAME=VALUE")
    choices = layouts.Choices(
        tokenizer=tokenizer,
        draft=draft,
        max_batch_size=max_batch_size,
        decoupled=decoupled,
        accumulate_tokens=accumulate_tokens,
        given={name: value for name, _, value in pairs},
    )
    planned = layouts.plan(engine, destination, choices)
    layouts.write(planned)
    if as_json:
        show.json({"path": str(destination), "max_batch_size": planned.batch, "ranks": planned.engine.ranks})
    else:
        show.line(f"wrote {destination}: serve it with {destination / 'serve.sh'}, where TensorRT-LLM is")


@layout.command("nim")
@click.argument("artifact", type=PATH)
@click.option("-o", "--output", "destination", type=PATH, required=True, metavar="DIR", help="Where to write.")
@click.option("--nim", "line", type=click.Choice(["1.x", "2.x"]), required=True, help="The line of NIM for LLMs.")
@click.option("--name", metavar="NAME", help="What clients call the model. Default: the directory's name.")
@click.option("--tp", "--tp_size", type=click.IntRange(1), help="GPUs of one model. Default: what it was cut for.")
@click.option("--hf", "described_by", type=PATH, metavar="DIR", help="Take the root's config.json from there.")
@json_option
def nim(
    artifact: Path,
    destination: Path,
    line: str,
    name: str | None,
    tp: int | None,
    described_by: Path | None,
    as_json: bool,
) -> None:
    """A directory that NIM serves, of an hf artifact, or for 1.x a trtllm one or its engines.

    Beside it, DIR.nim has the environment and what `nemoport check DIR` compares with.
    """
    from nemoport import show
    from nemoport.repository.layouts import nim as layouts

    def described(made: Artifact) -> Mapping[str, bytes]:
        from nemoport.exporters.formats.tree import Directory
        from nemoport.exporters.targets import hf

        if described_by is not None:
            return {each: (described_by / each).read_bytes() for each in layouts.HUGGING_FACE}
        return hf.described(made.spec, made.dtype, Directory(artifact))

    served_name = name or destination.resolve().name
    planned = layouts.plan(artifact, line, destination, served_name=served_name, tp=tp, described=described)
    files = layouts.write(planned)
    if as_json:
        said = {"path": str(destination), "nim": line, "served_name": planned.served_name, "profile": planned.profile}
        show.json({**said, "environment": dict(planned.environment), "files": list(files)})
    else:
        show.line(
            f"wrote {destination}: {len(files)} files, its environment beside it; next: nemoport check {destination}"
        )
