"""The verb `convert`: plan everything, refuse what cannot be, then stream."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from nemoport import plugins
from nemoport.artifact import Artifact, check_outside
from nemoport.errors import UnsupportedInput, UsageError
from nemoport.exporters import contract, quantize, requantize, serving, source, statistics, stream, translated
from nemoport.exporters.adapters import huggingface as peft
from nemoport.exporters.checkpoint import Model, Output
from nemoport.exporters.computed import Once
from nemoport.exporters.job import Job
from nemoport.exporters.statistics import Statistics
from nemoport.spec import DTYPES, LanguageModel, Plan, parameter_count

TARGETS = "nemoport.exporters.targets"
NOT_WRITTEN = {
    "pt2": "Triton's pytorch backend (26.03 or later, platform torch_aoti) takes of that format only what AOTInductor "
    "has compiled for one kind of processor, and does not batch it yet; use --to torchscript or onnx",
}
"""Formats that may be asked for, and why there is no target of that name."""
AdapterMode = Literal["merge", "carry"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Where statistics of activations come from."""

    digest: str
    """Of the tokens, or of the statistics that were given."""
    statistics: Callable[[Model, tuple[str, ...]], Statistics]
    """Of a model, those that are needed: may run it."""
    taken: Mapping[str, Any] | None = None
    """The `path` of the file, and the `samples`, `length` and `batch` that were asked for."""


def plan(
    path: Path,
    to: str,
    destination: Path,
    *,
    config: Mapping[str, Any] | None = None,
    plan: Plan,
    adapter: Path | None = None,
    adapter_mode: AdapterMode = "merge",
    calibration: Calibration | None = None,
    max_memory: int = stream.DEFAULT_MEMORY,
) -> Job:
    """Everything that the conversion will do, checked; no tensor has been read and nothing written."""
    if plan.recipe and calibration:
        plan = replace(plan, recipe=replace(plan.recipe, calibration=calibration.digest))
    if plan.dtype is not None and plan.dtype not in DTYPES:
        raise UsageError(f"--dtype {plan.dtype} is not known; use {', '.join(DTYPES)}")
    if min(plan.tp, plan.pp, plan.ep) < 1:
        raise UsageError(f"tp={plan.tp} pp={plan.pp} ep={plan.ep}: they count ranks, from 1 on")
    if to in NOT_WRITTEN:
        raise UnsupportedInput(f"--to {to} is not written: {NOT_WRITTEN[to]}")
    target = plugins.load(TARGETS, to)
    if plan.profile != "portable" and to != "onnx":
        raise UsageError(f"--profile {plan.profile} is of ONNX graphs; leave it out with --to {to}, or use --to onnx")
    for place, what in ((path, "checkpoint"), (adapter, "adapter")):
        if place:
            check_outside(destination, place, what)
    _check_dialect(plan, to, target)
    chosen = quantize.chosen(plan.recipe, to, target, calibration is not None, plan.dialect) if plan.recipe else None
    seen: Once[Statistics] | None = None
    if adapter and adapter_mode == "carry":
        _check_carries(plan)
        model, output = _carrying(path, adapter, to, target, config, plan)
    else:
        model = source.model(path, config, plan.vocab, adapter, plan.weights)
        if chosen:
            _check_encoder(model, to, chosen)
            model = requantize.plain(model, chosen.recipe)
            if calibration and chosen.needs:
                seen = Once(partial(calibration.statistics, model, chosen.needs))
            model = quantize.quantized(model, chosen, plan, seen)
        else:
            _check_quantized(model, to, target, plan)
            model = translated.in_dialect(model, _dialect(model, target, plan)) if model.quantized else model
        output = target.output(model, plan)
        if seen:
            output = replace(output, late={statistics.FILE: partial(_as_file, seen)})
    job = Job(
        kind=to,
        model=model,
        plan=plan,
        output=output,
        destination=destination,
        config=config,
        adapter=adapter,
        calibration=calibration.taken if calibration else None,
        workers=stream.workers_within(max_memory),
        prepare=seen or _nothing,
    )
    stream.check_destination(job)
    return job


def _check_dialect(plan: Plan, to: str, target: ModuleType) -> None:
    dialects: tuple[str, ...] = getattr(target, "DIALECTS", ())
    if plan.dialect is not None and plan.dialect not in dialects:
        has = f"has {', '.join(dialects)}" if dialects else "writes nothing quantized"
        raise UsageError(f"--dialect {plan.dialect} is not written by --to {to}, which {has}; leave it out")


def _dialect(model: Model, target: ModuleType, plan: Plan) -> str:
    """What a quantized model is written in: what was asked for, else its own where the target writes that."""
    assert model.quantized is not None
    own, known = model.quantized.dialect, (*target.DIALECTS, *getattr(target, "PASSES", ()))
    return plan.dialect or (own if own in known else target.DIALECTS[0])


def _nothing() -> None:
    """No first pass over the whole model."""


def _as_file(seen: Once[Statistics]) -> bytes:
    return statistics.to_bytes(seen())


def _check_encoder(model: Model, to: str, chosen: quantize.Chosen) -> None:
    """Norms of an encoder may stand after what they norm, where pre-scales cannot be folded into them, and no loader of
    quantized encoders is known here but ONNX's runtimes. At 4 bits vectors turn too far: of all-MiniLM-L6-v2 to a
    cosine of 0.956."""
    if isinstance(model.spec.head, LanguageModel):
        return
    what = f"--quantize {chosen.recipe.method} --to {to} is written for models that give text, and {model.spec.family} "
    if to != "onnx":
        raise UnsupportedInput(f"{what}is none; use --to onnx with int8 or int8_dynamic, or leave it out")
    if chosen.encoding.bits != 8:
        raise UnsupportedInput(f"{what}is none, whose vectors 4 bits turn too far; use int8 or int8_dynamic")


def _check_carries(plan: Plan) -> None:
    if plan.recipe:
        raise UsageError(
            "--quantize does not go with --adapter-mode carry yet: the adapter was trained on the weights from before; "
            "use --adapter-mode merge"
        )


def _check_quantized(model: Model, to: str, target: ModuleType, plan: Plan) -> None:
    """Refuse what could pass a quantized model on only by undoing its quantization."""
    if model.quantized is None:
        if plan.dialect:
            raise UsageError(f"{model.checkpoint.path} is not quantized; --dialect goes with --quantize METHOD")
        return
    method = f"{model.checkpoint.path} is quantized ({model.quantized.encoding.method})"
    dialects: tuple[str, ...] = getattr(target, "DIALECTS", ())
    if plan.dtype is not None and "onnx" not in dialects:
        raise UsageError(f"{method}, and its numbers have the dtypes they were rounded to; leave --dtype out")
    if not dialects:
        raise UnsupportedInput(
            f"{method}, and --to {to} takes plain numbers only, which nemoport does not silently make of them; "
            "use --to hf, or give the checkpoint that it came from"
        )
    dialect = _dialect(model, target, plan)
    if dialect not in model.quantized.encoding.loads:
        why = model.quantized.encoding.refused.get(dialect, f"--to {to} has no words for it")
        raise UnsupportedInput(f"{method}: {why}; use --to hf")


def _carrying(
    path: Path, adapter: Path, to: str, target: ModuleType, config: Mapping[str, Any] | None, plan: Plan
) -> tuple[Model, Output]:
    """The base as it is, with the adapter beside it."""
    peft.check_plan(to, plan.dtype)
    base, bound = source.with_adapter(path, adapter, config, plan.vocab, plan.weights)
    names = source.column(base.spec.family, "huggingface", "use --adapter-mode merge")
    return peft.carried(base, target.output(base, plan), bound, names)


def breaches(job: Job) -> tuple[contract.Breach, ...]:
    """What loaders would say of what a conversion has written; of plain numbers, nothing."""
    directory = serving.huggingface(job.destination, job.kind)
    return contract.breaches(directory) if directory and job.model.quantized else ()


@dataclass(frozen=True)
class Row:
    """A line of the plan or the summary."""

    what: str
    value: str


def summary(job: Job) -> tuple[Row, ...]:
    checkpoint, spec = job.model.checkpoint, job.model.spec
    layout = ", ".join(f"{key} {value}" for key, value in checkpoint.trained.items()) or "not recorded"
    slots = sum(len(file.slots) for file in job.output.files)
    return (
        Row("source", f"{checkpoint.path} ({checkpoint.format}, written by {checkpoint.writer})"),
        Row("model", f"{spec.family}, {parameter_count(spec):,} parameters, {job.model.dtype}"),
        *_adapter_row(job),
        *_quantized_row(job),
        *_recipe_row(job),
        Row("trained at", layout),
        Row("tensors", f"{len(checkpoint.tensors)} stored, {len(checkpoint.skipped)} skipped, {slots} written"),
        Row("target", f"{job.kind}, {_layout(job.plan)}, {job.output.dtype}"),
        Row("writes", f"{len(job.output.files)} tensor files, {job.bytes:,} bytes, to {job.destination}"),
        Row("loaded by", "; ".join(job.output.loads)),
    )


def _layout(plan: Plan) -> str:
    experts = f", ep {plan.ep}" if plan.ep > 1 else ""
    return f"tp {plan.tp}, pp {plan.pp}{experts}"


def _adapter_row(job: Job) -> tuple[Row, ...]:
    if (found := job.model.adapter) is None:
        return ()
    words = f"{job.adapter} (written by {found['writer']}; {'; '.join(found['scaling'])}), {found['mode']}"
    return (Row("adapter", words),)


def _quantized_row(job: Job) -> tuple[Row, ...]:
    if found := job.model.undone:
        return (Row("was quantized", f"{found.get('algorithm')} by {found['producer']}, and is undone"),)
    if (kept := job.model.quantized) is None or job.plan.recipe:
        return ()
    return (Row("quantized", f"{kept.said.get('algorithm')} by {kept.said['producer']}, kept as it is"),)


def _recipe_row(job: Job) -> tuple[Row, ...]:
    if (recipe := job.plan.recipe) is None or (made := job.model.quantized) is None:
        return ()
    seen = f", calibrated ({recipe.calibration[:12]})" if recipe.calibration else ""
    cache = f", KV cache {made.kv_cache}" if made.kv_cache else ""
    return (Row("quantizes", f"{made.encoding.method} ({made.said['algorithm']}){cache}{seen}"),)


def as_json(job: Job, artifact: Artifact | None) -> dict[str, Any]:
    """The plan, and what came of it, for `--json`."""
    checkpoint, spec = job.model.checkpoint, job.model.spec
    return {
        "source": {"path": str(checkpoint.path), "format": checkpoint.format, "writer": checkpoint.writer},
        "adapter": {"path": str(job.adapter), **job.model.adapter} if job.model.adapter else None,
        "quantization": job.model.quantized.said if job.model.quantized else None,
        "requantized": job.model.undone,
        "family": spec.family,
        "parameters": parameter_count(spec),
        "target": job.kind,
        "tp": job.plan.tp,
        "pp": job.plan.pp,
        "ep": job.plan.ep,
        "dtype": job.output.dtype,
        "tensors": {
            "stored": len(checkpoint.tensors),
            "skipped": len(checkpoint.skipped),
            "written": sum(len(file.slots) for file in job.output.files),
        },
        "bytes": job.bytes,
        "output": str(job.destination),
        "loads": job.output.loads,
        "warnings": list(job.output.warnings),
        "contract": [str(each) for each in breaches(job)] if artifact else None,
        "files": [{"path": file.path, "size": file.size, "blake3": file.blake3} for file in artifact.files]
        if artifact
        else None,
    }
