"""The verb `convert`: plan everything, refuse what cannot be, then stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemoport import plugins
from nemoport.artifact import Artifact
from nemoport.errors import UsageError
from nemoport.exporters import source, stream
from nemoport.spec import DTYPES, Plan, parameter_count

TARGETS = "nemoport.exporters.targets"


def plan(
    path: Path,
    to: str,
    destination: Path,
    *,
    config: Mapping[str, Any] | None = None,
    plan: Plan,
    max_memory: int = stream.DEFAULT_MEMORY,
) -> stream.Job:
    """Everything that the conversion will do, checked; no tensor has been read and nothing written."""
    if plan.dtype is not None and plan.dtype not in DTYPES:
        raise UsageError(f"--dtype {plan.dtype} is not known; use {', '.join(DTYPES)}")
    if min(plan.tp, plan.pp) < 1:
        raise UsageError(f"tp={plan.tp} pp={plan.pp}: both count ranks, from 1 on")
    target = plugins.load(TARGETS, to)
    if destination.resolve() == path.resolve() or path.resolve() in destination.resolve().parents:
        raise UsageError(f"{destination} lies inside the checkpoint; choose a directory outside of it with -o")
    model = source.model(path, config, plan.vocab)
    return stream.Job(
        kind=to,
        model=model,
        plan=plan,
        output=target.output(model, plan),
        destination=destination,
        config=config,
        workers=stream.workers_within(max_memory),
    )


@dataclass(frozen=True)
class Row:
    """A line of the plan or the summary."""

    what: str
    value: str


def summary(job: stream.Job) -> tuple[Row, ...]:
    checkpoint, spec = job.model.checkpoint, job.model.spec
    layout = ", ".join(f"{key} {value}" for key, value in checkpoint.trained.items()) or "not recorded"
    slots = sum(len(file.slots) for file in job.output.files)
    return (
        Row("source", f"{checkpoint.path} ({checkpoint.format}, written by {checkpoint.writer})"),
        Row("model", f"{spec.family}, {parameter_count(spec):,} parameters, {job.model.dtype}"),
        Row("trained at", layout),
        Row("tensors", f"{len(checkpoint.tensors)} stored, {len(checkpoint.skipped)} skipped, {slots} written"),
        Row("target", f"{job.kind}, tp {job.plan.tp}, pp {job.plan.pp}, {job.output.dtype}"),
        Row("writes", f"{len(job.output.files)} tensor files, {job.bytes:,} bytes, to {job.destination}"),
        Row("loaded by", "; ".join(job.output.loads)),
    )


def as_json(job: stream.Job, artifact: Artifact | None) -> dict[str, Any]:
    """The plan, and what came of it, for `--json`."""
    checkpoint, spec = job.model.checkpoint, job.model.spec
    return {
        "source": {"path": str(checkpoint.path), "format": checkpoint.format, "writer": checkpoint.writer},
        "family": spec.family,
        "parameters": parameter_count(spec),
        "target": job.kind,
        "tp": job.plan.tp,
        "pp": job.plan.pp,
        "dtype": job.output.dtype,
        "tensors": {
            "stored": len(checkpoint.tensors),
            "skipped": len(checkpoint.skipped),
            "written": sum(len(file.slots) for file in job.output.files),
        },
        "bytes": job.bytes,
        "output": str(job.destination),
        "loads": job.output.loads,
        "files": [{"path": file.path, "size": file.size, "blake3": file.blake3} for file in artifact.files]
        if artifact
        else None,
    }
