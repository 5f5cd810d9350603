"""The verb `validate`."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from nemoport import __version__, artifact, reference
from nemoport.errors import DamagedInput, UnsupportedInput, UsageError
from nemoport.exporters import source
from nemoport.exporters.checkpoint import Model
from nemoport.exporters.tensor import cast
from nemoport.runner.model import LoadOptions
from nemoport.validation.executions import EXECUTIONS, Execution
from nemoport.validation.measures import Distance, Logits, distance
from nemoport.validation.prompts import Prompt, prompts
from nemoport.validation.report import Check, Report
from nemoport.validation.subject import Subject, is_artifact, of_artifact, of_repository, origin

RELATIVE = 1e-5
"""float32 against float32: what another order of summation may make of it."""
DECODE = 1e-5
"""A cached step against the same position of a prefill, relative to the largest logit."""
OVER_FLOOR, KL_OVER_FLOOR = 1.5, 2.0
"""In 16 bits, no worse than this many times what the source itself loses in that dtype (specs of validation practice:
an absolute bound would judge the dtype and not the export)."""
STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Request:
    subject: Path
    model: str | None = None
    version: str | None = None
    against: Path | None = None
    config: Mapping[str, Any] | None = None
    allow_cpu_fallback: bool = False


def validate(request: Request) -> Report:
    """Run it, compare it, store the verdict beside the manifest."""
    subject = _subject(request)
    if subject.artifact.kind not in EXECUTIONS:
        raise UnsupportedInput(
            f"{subject.name} is of kind {subject.artifact.kind}; {', '.join(EXECUTIONS)} are validated"
        )
    path, config = (request.against, request.config) if request.against else origin(subject)
    model = source.model(path, request.config or config, subject.artifact.plan.vocab)
    report = _report(subject, model, LoadOptions(allow_cpu_fallback=request.allow_cpu_fallback))
    artifact.write_atomically(subject.evidence / artifact.REPORT, artifact.json_bytes(report.as_json()))
    return report


def _subject(request: Request) -> Subject:
    if request.model is not None:
        return of_repository(request.subject, request.model, request.version)
    if not is_artifact(request.subject):
        raise UsageError(f"{request.subject} is no artifact; for a repository, name the model with --model NAME")
    return of_artifact(request.subject)


def _report(subject: Subject, model: Model, options: LoadOptions) -> Report:
    identity = artifact.identity(subject.evidence)
    try:
        artifact.verify(subject.files, subject.artifact)
    except DamagedInput as error:
        checks = (Check(name="files match the manifest", passed=False, found=str(error), needed="every digest equal"),)
        return _as_report(subject, model, identity, "nothing: the files are not the ones that were written", checks)
    whole = Check(
        name="files match the manifest",
        passed=True,
        found=f"{len(subject.artifact.files)} files",
        needed="every digest equal",
    )
    with EXECUTIONS[subject.artifact.kind](subject, options) as execution:
        wanted = {prompt.name: _source_logits(model, prompt, subject.artifact.dtype) for prompt in prompts(model.spec)}
        floor = _noise_floor(model, execution, wanted)
        checks = (whole, *_checks(model, execution, wanted, floor))
        report = _as_report(subject, model, identity, execution.by, checks)
        return replace(report, noise_floor=floor, notes=execution.notes)


def _checks(
    model: Model, execution: Execution, wanted: Mapping[str, Logits], floor: Mapping[str, Distance]
) -> Iterator[Check]:
    for prompt in prompts(model.spec):
        answer = execution.logits(prompt)
        yield _against(prompt, _real(answer, prompt), _real(wanted[prompt.name], prompt), floor.get(prompt.name))
        if len(prompt.tokens) > 1:
            order = np.arange(len(prompt.tokens))[::-1]
            turned = replace(prompt, tokens=prompt.tokens[order], mask=prompt.mask[order])
            yield _same("rows in another order", prompt, execution.logits(turned)[order], answer)
        if execution.decode and prompt.real.all() and prompt.tokens.shape[1] > 1:
            steps = min(STEPS, prompt.tokens.shape[1] - 1)
            yield _same("token by token", prompt, execution.decode(prompt, steps), answer, floor.get(prompt.name))


def _against(prompt: Prompt, found: Logits, wanted: Logits, floor: Distance | None) -> Check:
    """Against the source: the gate is absolute in float32, and relative to the noise floor below that."""
    apart = distance(found, wanted)
    bound = OVER_FLOOR * floor.relative if floor else RELATIVE
    kl_bound = KL_OVER_FLOOR * floor.kl_mean + 1e-9 if floor else RELATIVE
    top1 = floor.top1 - 0.02 if floor else 1.0
    return Check(
        name=f"logits of the source: {prompt.name}",
        passed=apart.relative <= bound and apart.kl_mean <= kl_bound and apart.top1 >= top1,
        found=f"relative {apart.relative:.1e}, KL {apart.kl_mean:.1e}, top-1 {apart.top1:.3f}",
        needed=f"relative {bound:.1e}, KL {kl_bound:.1e}, top-1 {top1:.3f}",
        distance=apart,
    )


def _same(what: str, prompt: Prompt, found: Logits, wanted: Logits, floor: Distance | None = None) -> Check:
    """Against the artifact itself, asked in another way."""
    apart = distance(_real(found, prompt), _real(wanted, prompt))
    bound = max(DECODE, floor.relative if floor else 0.0)
    return Check(
        name=f"{what}: {prompt.name}",
        passed=apart.relative <= bound,
        found=f"relative {apart.relative:.1e}",
        needed=f"relative {bound:.1e}",
        distance=apart,
    )


def _source_logits(model: Model, prompt: Prompt, dtype: str) -> Logits:
    """The source in float32, its weights rounded to the artifact's dtype."""
    rounded = {name: cast(tensor, dtype) for name, tensor in model.tensors.items()}
    return reference.logits(model.spec, rounded, prompt.tokens, mask=prompt.mask)


def _noise_floor(model: Model, execution: Execution, wanted: Mapping[str, Logits]) -> dict[str, Distance]:
    """What the source loses when it is itself computed in the artifact's dtype; nothing to say of float32."""
    dtype = execution.computes_in
    if dtype == "float32":
        return {}
    floor = {}
    for prompt in prompts(model.spec):
        noisy = reference.logits(model.spec, model.tensors, prompt.tokens, mask=prompt.mask, dtype=dtype)
        floor[prompt.name] = distance(_real(noisy, prompt), _real(wanted[prompt.name], prompt))
    return floor


def _real(logits: Logits, prompt: Prompt) -> Logits:
    """[real positions, vocabulary]."""
    return logits[prompt.real]


def _as_report(subject: Subject, model: Model, identity: str, by: str, checks: tuple[Check, ...]) -> Report:
    return Report(
        subject=subject.name,
        kind=subject.artifact.kind,
        artifact=identity,
        source={"path": str(model.checkpoint.path), "format": model.checkpoint.format, "family": model.spec.family},
        executed_by=by,
        checks=checks,
        environment={"nemoport": __version__, "python": platform.python_version(), "machine": platform.machine()}
        | {name: found for name in ("numpy", "torch", "onnxruntime") if (found := _installed(name))},
    )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
