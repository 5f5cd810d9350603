"""`convert`: a checkpoint as what a runtime loads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from nemoport.cli.options import PATH, Size, adapter_option, config, config_option, json_option, runtime_option
from nemoport.compatibility import Runtime
from nemoport.errors import UsageError


@click.command()
@click.argument("path", type=PATH)
@click.option("--to", required=True, metavar="TARGET", help="hf, vllm, llmapi, onnx, trtllm or torchscript.")
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
@click.option("--calib-batch", default=2, show_default=True, help="Rows to run at once; means are rounded after each.")
@click.option("--calib-stats", type=PATH, metavar="FILE", help="calibration.npz of an earlier run, or its directory.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Linears that stay as they are; repeatable.")
@click.option("--requantize", is_flag=True, help="Undo a quantization that the source has, to quantize it anew.")
@click.option("--vocab", type=click.Choice(["true", "padded"]), default="true", show_default=True, help="Rows to keep.")
@click.option("--max-memory", type=Size(), default="512MiB", show_default=True, help="Cap on memory in use.")
@runtime_option
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
    calib_batch: int,
    calib_stats: Path | None,
    exclude: tuple[str, ...],
    requantize: bool,
    max_memory: int,
    runtime: Runtime | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a checkpoint as what a runtime loads."""
    # numpy's BLAS reads it once: workers are a thread for each core already, and more get in each other's way.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from nemoport import show
    from nemoport.exporters import convert, loadable, stream
    from nemoport.spec import Plan, Recipe

    recipe, calibration = None, None
    if quantize:
        recipe = Recipe(method=quantize, kv_cache=kv_cache, exclude=exclude, group=group, requantize=requantize)
    elif kv_cache or calib or calib_stats or exclude or group or requantize:
        raise UsageError(
            "--kv-cache, --calib, --exclude, --group and --requantize go with --quantize METHOD; say which method"
        )
    said = {"vocab": vocab, "weights": weights, "dialect": dialect, "profile": profile}
    plan = Plan(tp=tp, pp=pp, ep=ep, dtype=dtype, recipe=recipe, **said)
    if runtime:
        loadable.foresee(to, plan, bool(calib or calib_stats), runtime)
    if recipe:
        limits = {"samples": calib_samples, "length": calib_length, "batch": calib_batch}
        calibration = _calibration(path, config_file, calib, calib_stats, limits)
    job = convert.plan(
        path,
        to,
        destination,
        config=config(config_file),
        plan=plan,
        adapter=adapter,
        adapter_mode=adapter_mode,
        calibration=calibration,
        max_memory=max_memory,
    )
    verdict = loadable.check(job, runtime) if runtime else None
    show.warnings(job.output.warnings)
    if not as_json:
        show.rows((*convert.summary(job), *([convert.Row("runtime", str(verdict))] if verdict else [])))
    artifact = None
    if not dry_run:
        with show.progress("converting", job.bytes) as advance:
            artifact = stream.run(job, advance)
    if as_json:
        show.json(convert.as_json(job, artifact) | {"runtime": verdict and verdict.as_json()})
    elif artifact:
        for each in convert.breaches(job):
            show.line(f"loaders expect otherwise: {each}")
        show.line(f"wrote {destination}: {len(artifact.files)} files, next: nemoport validate {destination}")


def _calibration(
    checkpoint: Path,
    config_file: Path | None,
    calib: Path | None,
    statistics: Path | None,
    limits: Mapping[str, int],
) -> Any:
    from nemoport import calibration

    if calib and statistics:
        raise UsageError("--calib and --calib-stats both say where scales come from; give one")
    if statistics:
        return calibration.from_statistics(statistics)
    if calib:
        return calibration.from_tokens(calib, checkpoint, config(config_file), calibration.Limits(**limits))
    return None
