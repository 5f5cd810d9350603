"""`layout`: directories as others expect them."""

from __future__ import annotations

from pathlib import Path

import click

from nemoport.cli.options import PATH, Verbs, json_option
from nemoport.errors import UsageError


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
    planned = layouts.plan(engine, choices)
    layouts.write(planned, destination)
    if as_json:
        show.json({"path": str(destination), "max_batch_size": planned.batch, "ranks": planned.engine.ranks})
    else:
        show.line(f"wrote {destination}: serve it with {destination / 'serve.sh'}, where TensorRT-LLM is")
