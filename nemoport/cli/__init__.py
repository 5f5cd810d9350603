"""The command line: one short function a verb. Parse, call, print; a verb's imports begin its body, so that --help
needs nothing but click."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from nemoport import __version__
from nemoport.cli.check import check
from nemoport.cli.compile import compile_
from nemoport.cli.convert import convert
from nemoport.cli.layout import layout
from nemoport.cli.options import (
    PATH,
    Size,
    Verbs,
    adapter_option,
    config,
    config_option,
    json_option,
    numbers,
    release_option,
)
from nemoport.cli.repo import repo
from nemoport.cli.serve import serve
from nemoport.compatibility import Runtime
from nemoport.errors import PolicyError


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nemoport")
def main() -> None:
    """From a NeMo or Megatron checkpoint to a Triton model repository that is known to work."""


@main.command()
@click.argument("path", type=PATH)
@config_option
@json_option
def inspect(path: Path, config_file: Path | None, as_json: bool) -> None:
    """Say what a checkpoint is: format, family, shapes, vocabulary, tokenizer, pickles, what would be skipped."""
    from nemoport import show
    from nemoport.exporters.inspect import inspect as look

    facts = look(path, config(config_file))
    show.json(facts) if as_json else show.facts(facts)
    if "refused" in facts:
        raise PolicyError(facts["refused"])


@main.command()
@click.argument("subject", type=PATH, metavar="ARTIFACT|REPOSITORY")
@click.option(
    "--against", type=PATH, metavar="CKPT", help="The source checkpoint; default: where it was converted from."
)
@config_option
@adapter_option
@click.option("--model", metavar="NAME", help="The model, when a repository is validated.")
@click.option("--version", metavar="VERSION", help="7 or staging-7; default: the newest.")
@click.option("--allow-cpu-fallback", is_flag=True, help="Run a model that asks for a GPU on the CPU, and say so.")
@click.option("--text", type=PATH, metavar="FILE", help="Judge a quantized artifact on it; as --calib of convert.")
@click.option("--report", "report_in", type=PATH, metavar="DIR", help="Leave report.json, junit.xml and report.html.")
@json_option
def validate(
    subject: Path,
    against: Path | None,
    config_file: Path | None,
    adapter: Path | None,
    model: str | None,
    version: str | None,
    allow_cpu_fallback: bool,
    text: Path | None,
    report_in: Path | None,
    as_json: bool,
) -> None:
    """Run it, compare it with the source checkpoint, print a verdict and store it as report.json.

    Of a repository without --model: every model, the live ones also served and asked over HTTP, gRPC and SSE.
    """
    from nemoport import show, validation

    with show.working("validating"):
        request = validation.Request(
            subject=subject,
            model=model,
            version=version,
            against=against,
            config=config(config_file),
            adapter=adapter,
            allow_cpu_fallback=allow_cpu_fallback,
            text=text,
        )
        found = validation.run(request)
        if report_in is not None:
            validation.documents.write(found, report_in)
    show.json(found.as_json()) if as_json else show.validation(found)
    if not found.passed:
        sys.exit(1)


@main.command("publish")
@click.argument("artifact", type=PATH)
@click.option("--model-repository", "--model-store", type=PATH, required=True, metavar="REPO")
@click.option("--name", required=True, help="The model's name in the repository.")
@click.option("--max-batch-size", "--max_batch_size", type=int, help="Of the model's first version. Default: 8.")
@release_option
@click.option("--promote", "promote_it", is_flag=True, help="Make it live at once, if its validation was green.")
@json_option
def publish_(
    artifact: Path,
    model_repository: Path,
    name: str,
    max_batch_size: int | None,
    runtime: Runtime | None,
    promote_it: bool,
    as_json: bool,
) -> None:
    """Stage an artifact as the next version of a model, with a generated config.

    One in pipeline stages becomes a model for each, NAME-stage0 and on, and their ensemble, NAME.
    """
    from nemoport import show
    from nemoport.repository.promote import promote
    from nemoport.repository.stages import publish_all

    rows = []
    for each in publish_all(artifact, model_repository, name, max_batch_size=max_batch_size, runtime=runtime):
        path = each.path
        if not as_json:
            show.line(f"{'found' if each.already else 'staged'} {each.model} version {each.version}: {path}")
        if promote_it:
            promoted = promote(model_repository, each.model, str(each.version))
            path = promoted.path
            if not as_json:
                show.line(f"promoted {each.model} version {promoted.version}; live: {numbers(promoted.live)}")
        state = "live" if promote_it else path.name
        said = {"version": each.version, "state": state, "path": str(path), "evidence": str(each.evidence)}
        rows.append({"model": each.model, **said})
    if as_json:
        *stages, last = rows
        show.json({**last, **({"stages": stages} if stages else {})})


@main.command()
@click.argument("pipeline", type=PATH)
@click.option("--only", multiple=True, metavar="NAME", help="A model of the file; repeatable.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Models at a time.")
@click.option("--max-memory", type=Size(), default="512MiB", show_default=True, help="Cap on memory, of a conversion.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@click.option("--summary", "summary_in", type=PATH, metavar="FILE", help="Leave what was done as Markdown.")
@json_option
def build(
    pipeline: Path,
    only: tuple[str, ...],
    jobs: int,
    max_memory: int,
    dry_run: bool,
    summary_in: Path | None,
    as_json: bool,
) -> None:
    """Make a whole repository from a file: convert, publish, validate, promote, check, push.

    What was done before is found and not done again; a killed build continues.
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from nemoport import pipeline as pipelines
    from nemoport import show

    wanted = pipelines.read(pipeline, only)
    planned = pipelines.plan(wanted, max_memory)
    needed = pipelines.need(wanted, planned)
    for each in planned:
        show.warnings([f"{each.wanted.name}: {warning}" for warning in each.job.output.warnings])
    if dry_run:
        plan = {
            "models": [each.as_json() for each in planned],
            "ensembles": [each.as_json() for each in wanted.ensembles],
            "bytes": needed.bytes,
            "seconds": needed.seconds,
        }
        show.json(plan) if as_json else show.pipeline(planned, wanted.ensembles, needed, max_memory)
        return
    with show.progress("building", needed.bytes) as advance:
        outcome = pipelines.run(wanted, planned, jobs=jobs, tell=show.step, progress=advance)
    if summary_in is not None:
        summary_in.write_text(pipelines.markdown(outcome))
    if as_json:
        show.json(outcome.as_json())
    if outcome.exit_code:
        sys.exit(outcome.exit_code)


@main.command("doctor")
@json_option
def doctor_(as_json: bool) -> None:
    """Say what this machine can do, and which extra or container adds the rest."""
    from nemoport import doctor, show

    machine = doctor.look(Path.cwd())
    show.json(doctor.as_json(machine)) if as_json else show.pairs(doctor.lines(machine))


for verb in (convert, compile_, layout, serve, check, repo):
    main.add_command(verb)
repo.add_command(check)
