"""The command line: one short function a verb. Parse, call, print; a verb's imports begin its body, so that --help
needs nothing but click."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from nemoport import __version__
from nemoport.cli.options import PATH, Size, Verbs, adapter_option, config_option, json_option, numbers
from nemoport.cli.repo import repo
from nemoport.errors import PolicyError, UsageError
from nemoport.runner.flags import FLAGS, KINDS, LACKING, Flag


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

    facts = look(path, _config(config_file))
    show.json(facts) if as_json else show.facts(facts)
    if "refused" in facts:
        raise PolicyError(facts["refused"])


@main.command()
@click.argument("path", type=PATH)
@click.option("--to", required=True, metavar="TARGET", help="hf, vllm, llmapi, onnx or trtllm.")
@click.option("-o", "--output", "destination", type=PATH, required=True, metavar="DIR", help="Where to write.")
@config_option
@click.option("--tp", "--tp_size", default=1, show_default=True, help="Ranks of tensor parallelism.")
@click.option("--pp", "--pp_size", default=1, show_default=True, help="Stages of pipeline parallelism.")
@click.option("--ep", "--ep_size", default=1, show_default=True, help="Of the tp ranks, how many have other experts.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Default: as stored.")
@adapter_option
@click.option(
    "--adapter-mode",
    type=click.Choice(["merge", "carry"]),
    default="merge",
    show_default=True,
    help="Into the weights, or as a PEFT directory beside them (hf).",
)
@click.option(
    "--weights",
    type=click.Choice(["model", "optimizer"]),
    default="model",
    show_default=True,
    help="Those that the model computed with, or the optimizer's float32 copies of them.",
)
@click.option(
    "--quantize", metavar="METHOD", help="Round weights to fp8, int8, int4_awq, nvfp4 and more: see the docs."
)
@click.option(
    "--dialect", type=click.Choice(["modelopt", "compressed-tensors"]), help="Whose layout hf has, when quantized."
)
@click.option("--group", type=int, metavar="N", help="Inputs that share a scale: int4 in ONNX takes 128, 64, 32 or 16.")
@click.option(
    "--profile",
    type=click.Choice(["portable", "ort"]),
    default="portable",
    show_default=True,
    help="Quantized ONNX in ONNX's operators, or in ONNX Runtime's own.",
)
@click.option("--kv-cache", type=click.Choice(["fp8"]), help="Scales for a cache in fewer bits.")
@click.option("--calib", type=PATH, metavar="FILE", help="Text, JSONL with `text`, or token ids in .npz.")
@click.option("--calib-samples", default=512, show_default=True, help="Rows of tokens to calibrate on, at most.")
@click.option("--calib-length", default=512, show_default=True, help="Tokens of a row, at most.")
@click.option("--calib-stats", type=PATH, metavar="FILE", help="calibration.npz of an earlier run, or its directory.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Linears that stay as they are; repeatable.")
@click.option("--requantize", is_flag=True, help="Undo a quantization that the source has, to quantize it anew.")
@click.option("--vocab", type=click.Choice(["true", "padded"]), default="true", show_default=True, help="Rows to keep.")
@click.option("--max-memory", type=Size(), default="512MiB", show_default=True, help="Cap on memory in use.")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, write nothing.")
@json_option
def convert(
    path: Path,
    to: str,
    destination: Path,
    config_file: Path | None,
    tp: int,
    pp: int,
    ep: int,
    dtype: str | None,
    adapter: Path | None,
    adapter_mode: Any,
    weights: Any,
    vocab: Any,
    quantize: str | None,
    dialect: str | None,
    group: int | None,
    profile: Any,
    kv_cache: str | None,
    calib: Path | None,
    calib_samples: int,
    calib_length: int,
    calib_stats: Path | None,
    exclude: tuple[str, ...],
    requantize: bool,
    max_memory: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint as what a runtime loads."""
    # numpy's BLAS reads it once: workers are a thread for each core already, and more get in each other's way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from nemoport import show
    from nemoport.exporters import convert, stream
    from nemoport.spec import Plan, Recipe

    recipe, calibration = None, None
    if quantize:
        recipe = Recipe(method=quantize, kv_cache=kv_cache, exclude=exclude, group=group, requantize=requantize)
        calibration = _calibration(path, config_file, calib, calib_samples, calib_length, calib_stats)
    elif kv_cache or calib or calib_stats or exclude or group or requantize:
        raise UsageError(
            "--kv-cache, --calib, --exclude, --group and --requantize go with --quantize METHOD; say which method"
        )
    said = {"vocab": vocab, "weights": weights, "dialect": dialect, "profile": profile}
    plan = Plan(tp=tp, pp=pp, ep=ep, dtype=dtype, recipe=recipe, **said)
    job = convert.plan(
        path,
        to,
        destination,
        config=_config(config_file),
        plan=plan,
        adapter=adapter,
        adapter_mode=adapter_mode,
        calibration=calibration,
        max_memory=max_memory,
    )
    if not as_json:
        show.rows(convert.summary(job))
    artifact = None
    if not dry_run:
        with show.progress("converting", job.bytes) as advance:
            artifact = stream.run(job, advance)
    if as_json:
        show.json(convert.as_json(job, artifact))
    elif artifact:
        for each in convert.breaches(job):
            show.line(f"loaders expect otherwise: {each}")
        show.line(f"wrote {destination}: {len(artifact.files)} files, next: nemoport validate {destination}")


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
            config=_config(config_file),
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
@click.option("--triton-release", metavar="YY.MM", help="The release that shall load it, for the first version.")
@click.option("--promote", "promote_it", is_flag=True, help="Make it live at once, if its validation was green.")
@json_option
def publish_(
    artifact: Path,
    model_repository: Path,
    name: str,
    max_batch_size: int | None,
    triton_release: str | None,
    promote_it: bool,
    as_json: bool,
) -> None:
    """Stage an artifact as the next version of a model, with a generated config."""
    from nemoport import show
    from nemoport.repository.promote import promote
    from nemoport.repository.publish import publish

    published = publish(artifact, model_repository, name, max_batch_size=max_batch_size, triton_release=triton_release)
    if not as_json:
        show.line(f"{'found' if published.already else 'staged'} {name} version {published.version}: {published.path}")
    if promote_it:
        promoted = promote(model_repository, name, str(published.version))
        if not as_json:
            show.line(f"promoted {name} version {promoted.version}; live: {numbers(promoted.live)}")
    if as_json:
        show.json(
            {"model": name, "version": published.version, "state": "live" if promote_it else published.path.name}
            | {"path": str(promoted.path if promote_it else published.path), "evidence": str(published.evidence)}
        )


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


@main.command(cls=Serve)
@click.argument("repositories", type=PATH, nargs=-1, metavar="[REPO]...")
def serve(repositories: tuple[Path, ...], model_repository: tuple[Path, ...], **options: Any) -> None:
    """Serve repositories over HTTP and gRPC as tritonserver would, with its flags.

    A flag of tritonserver that does nothing here is accepted, and a warning says so.
    """
    from nemoport.runner.serve import ServeOptions
    from nemoport.runner.serve import serve as run

    require_verified, keys = options.pop("require_verified"), options.pop("key")
    if require_verified or keys:
        from functools import partial

        from nemoport.repository import signing
        from nemoport.repository.verify import admit

        options["admit"] = partial(admit, keys=[signing.public_key(key) for key in keys])
    lacking = {name: options.pop(name.removeprefix("--").replace("-", "_")) for name in LACKING}
    given = tuple(name for name, value in lacking.items() if value)
    run(ServeOptions(model_repository=(*repositories, *model_repository), not_done=given, **options))


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


class Release(click.ParamType[tuple[int, int]]):
    """A Triton release as its containers are called: 24.10."""

    name = "release"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[int, int]:
        year, _, month = str(value).partition(".")
        if not (year.isdigit() and month.isdigit() and len(year) == len(month) == 2):
            self.fail(f"{value!r} is no release; write YY.MM, such as 24.10", param, context)
        return int(year), int(month)


@main.command("check")
@click.argument("directory", type=PATH, metavar="DIR|REPO")
@click.option("--model", metavar="NAME", help="Only this model of the repository.")
@click.option("--target", "gpus", type=TargetOption(), default="any", help="any, cpu or gpu:N: judge the hardware too.")
@click.option("--triton-release", type=Release(), metavar="YY.MM", help="Refuse fields that this release lacks.")
@click.option("--format", "form", type=click.Choice(["text", "json", "sarif"]), default="text", show_default=True)
@click.option("--fix", is_flag=True, help="Repair what is mechanical, and show what was done.")
@json_option
def check_(
    directory: Path,
    model: str | None,
    gpus: int | None,
    triton_release: tuple[int, int] | None,
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

    request = Request(directory=directory, model=model, target=Target(gpus), release=triton_release)
    report, done = repair(request) if fix else (check(request), ())
    if form == "sarif":
        show.json(sarif(report))
    elif as_json or form == "json":
        show.json(report.as_json() | {"repaired": [asdict(each) for each in done]})
    else:
        show.findings(report, done)
    if not report.passed:
        sys.exit(1)


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


main.add_command(repo)
repo.add_command(check_)


def _calibration(
    checkpoint: Path, config_file: Path | None, calib: Path | None, samples: int, length: int, statistics: Path | None
) -> Any:
    from nemoport import calibration

    if calib and statistics:
        raise UsageError("--calib and --calib-stats both say where scales come from; give one")
    if statistics:
        return calibration.from_statistics(statistics)
    if calib:
        limits = calibration.Limits(samples=samples, length=length)
        return calibration.from_tokens(calib, checkpoint, _config(config_file), limits)
    return None


def _config(path: Path | None) -> Mapping[str, Any] | None:
    if path is None:
        return None
    from nemoport.exporters.formats.structured import mapping

    if not path.is_file():
        raise UsageError(f"--config {path} is no file")
    return mapping(path)
