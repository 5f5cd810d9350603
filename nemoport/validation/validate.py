"""The verb `validate`."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemoport import __version__, artifact
from nemoport.artifact import Artifact
from nemoport.errors import CheckFailed, DamagedInput, InputError, UnsupportedInput, UsageError
from nemoport.exporters import requantize, source
from nemoport.exporters.checkpoint import Model, Quantized
from nemoport.exporters.dequantized import all_dequantized
from nemoport.exporters.tensor import LazyTensor
from nemoport.repository.kinds import built_for
from nemoport.runner.model import LoadOptions
from nemoport.spec import LanguageModel, Mixture, Recipe
from nemoport.validation import chain, checks, layers, worded
from nemoport.validation.checks import Expected, counted
from nemoport.validation.executions import EXECUTIONS, Execution, answering
from nemoport.validation.judge import Judge, judge
from nemoport.validation.measures import distance, each_position, farthest
from nemoport.validation.prompts import LONGEST, Prompt, prompts, windows
from nemoport.validation.recipe import requantized
from nemoport.validation.report import Check, Quantization, Report
from nemoport.validation.rounding import roundings
from nemoport.validation.subject import Origin, Subject, is_artifact, of_artifact, of_repository, origin, verify
from nemoport.validation.texts import LONGEST as LONGEST_TEXT
from nemoport.validation.texts import texts
from nemoport.validation.weights import rounded

FLOOR = "bfloat16"
"""What the source itself is computed in, beside a quantization of it."""


@dataclass(frozen=True, kw_only=True)
class Request:
    subject: Path
    model: str | None = None
    version: str | None = None
    against: Path | None = None
    config: Mapping[str, Any] | None = None
    adapter: Path | None = None
    """Of `against`."""
    allow_cpu_fallback: bool = False
    text: Path | None = None
    """What a quantized model is judged on; None is what the source itself says."""


def validate(request: Request) -> Report:
    """Run it, compare it, store the verdict beside the manifest."""
    subject = _subject(request)
    kinds = (*EXECUTIONS, *JUDGES)
    if subject.artifact.kind not in kinds:
        raise UnsupportedInput(f"{subject.name} is of kind {subject.artifact.kind}; {', '.join(kinds)} are validated")
    made = Origin(request.against) if request.against else origin(subject)
    config, adapter = request.config or made.config, request.adapter or made.adapter
    plan = subject.artifact.plan
    model = source.model(made.path, config, plan.vocab, adapter, plan.weights)
    if recipe := plan.recipe:
        model = requantize.plain(model, recipe)
    report = _report(subject, model, request, made)
    artifact.write_atomically(subject.evidence / artifact.REPORT, artifact.json_bytes(report.as_json()))
    return report


def _subject(request: Request) -> Subject:
    if not request.subject.exists():
        raise UsageError(f"{request.subject} does not exist")
    if request.model is not None:
        return of_repository(request.subject, request.model, request.version)
    if not is_artifact(request.subject):
        raise UsageError(f"{request.subject} is no artifact; for a repository, name the model with --model NAME")
    return of_artifact(request.subject)


def _report(subject: Subject, model: Model, request: Request, made: Origin) -> Report:
    """Cheapest checks first; one that makes the next ones meaningless is the last."""
    recipe, report = subject.artifact.plan.recipe, _begun(subject, model)
    whole, same = _files_match(subject), checks.same_model(subject.artifact.spec, model.spec)
    report = replace(report, checks=(whole, same))
    if not report.passed:
        return report
    options = LoadOptions(allow_cpu_fallback=request.allow_cpu_fallback)
    chained = chain.is_chain(subject.artifact)
    if (worded_by := JUDGES.get(subject.artifact.kind)) and not chained:
        judged = worded_by(subject, model, options)
        return replace(report, executed_by=judged.by, checks=(whole, same, *judged.checks), notes=judged.notes)
    with ExitStack() as stack:
        try:
            executed = chain.chained if chained else EXECUTIONS[subject.artifact.kind]
            execution = stack.enter_context(executed(subject, options))
        except InputError as error:
            refused = Check(name="it loads", passed=False, found=str(error), needed="a model that answers")
            return replace(report, checks=(whole, same, refused))
        wanted = requantized(model, subject, recipe) if recipe else model
        of = checks.RECIPE if recipe else checks.SOURCE
        known = min(model.spec.max_positions, subject.artifact.spec.max_positions, *at_once(subject.artifact))
        questions = prompts if isinstance(model.spec.head, LanguageModel) else texts
        asked = questions(replace(model.spec, max_positions=known), execution.batch)
        held = rounded(wanted, execution.holds)
        expected = _expected(wanted, held, execution, asked)
        report = replace(
            report,
            executed_by=execution.by,
            checks=(whole, same, checks.weights(wanted, execution, of), *checks.answers(execution, expected, of)),
            noise_floor={prompt.name: each.floor for prompt, each in expected.items() if each.floor},
            notes=(*execution.notes, *_notes(model)),
        )
        if wanted.quantized is None or recipe is None:
            return replace(report, layers=layers.of_rounding(model, held, asked[0]))
        asked_of = judge(
            model, wanted.quantized.encoding, execution.batch, request.text, made.calibration, recipe.calibration
        )
        report = replace(report, layers=layers.errors(model, held, asked[0]))
        return _with_cost(report, model, wanted.quantized, recipe, execution, asked_of)


def _with_cost(
    report: Report, model: Model, made: Quantized, recipe: Recipe, execution: Execution, asked: Judge
) -> Report:
    """What the quantization cost, beside the source as it was."""
    plain = all_dequantized(model.tensors)
    try:
        verdict = asked.judged(answering(model.spec, plain), execution.logits, answering(model.spec, plain, FLOOR))
    except (CheckFailed, InputError) as error:
        unanswered = Check(name=f"text is answered: {asked.source}", passed=False, found=str(error), needed="an answer")
        return replace(report, checks=(*report.checks, unanswered))
    quantization = Quantization(
        method=recipe.method,
        algorithm=made.said["algorithm"],
        calibration=recipe.calibration,
        excluded=made.excluded,
        text=asked.source,
        digest=asked.digest,
        found=verdict.found,
        floor=verdict.floor,
        linears=roundings(model, execution.holds),
    )
    return replace(report, checks=(*report.checks, *verdict.checks), quantization=quantization)


def at_once(made: Artifact) -> tuple[int, ...]:
    """The tokens that a plan was built for, the most at once; of what takes all, nothing."""
    return built_for(made).get("sequence", ())[2:]


JUDGES = {"tokenizer": worded.tokenizer, "ensemble": worded.joined}
"""Of what is asked in text."""


def _files_match(subject: Subject) -> Check:
    name, needed = "files match the manifest", "every digest equal"
    try:
        verify(subject)
    except DamagedInput as error:
        return Check(name=name, passed=False, found=str(error), needed=needed)
    return Check(name=name, passed=True, found=f"{len(subject.artifact.files)} files", needed=needed)


def _expected(
    model: Model, weights: Mapping[str, LazyTensor], execution: Execution, asked: tuple[Prompt, ...]
) -> dict[Prompt, Expected]:
    """The source in float32, with its weights rounded as the artifact holds them; where the artifact rounds more than
    them, computed so too."""
    exact = answering(model.spec, weights)
    wanted = {prompt: exact(prompt) for prompt in asked}
    if execution.computes_in == "float32" and not execution.sight:
        return {prompt: Expected(logits=logits) for prompt, logits in wanted.items()}
    noisy = answering(model.spec, weights, execution.computes_in, execution.sight)
    pairs = {prompt: (counted(prompt, noisy(prompt)), counted(prompt, logits)) for prompt, logits in wanted.items()}
    floors = {prompt: distance(*pair) for prompt, pair in pairs.items()}
    worst = None
    if any(isinstance(block.ffn, Mixture) for block in model.spec.blocks):
        worst = farthest(each for pair in pairs.values() for each in each_position(*pair))
    elif execution.sight or not isinstance(model.spec.head, LanguageModel):
        worst = farthest(floors.values())
    return {prompt: Expected(logits=logits, floor=floors[prompt], farthest=worst) for prompt, logits in wanted.items()}


def _notes(model: Model) -> tuple[str, ...]:
    """What no prompt can show."""
    if not isinstance(model.spec.head, LanguageModel):
        far = f"texts of more than {LONGEST_TEXT} tokens were not run; the model takes {model.spec.longest}"
        return (far,) if model.spec.longest > LONGEST_TEXT else ()
    return tuple(
        f"a window of {window} is longer than every prompt ({LONGEST} tokens): whether it is kept was not seen"
        for window in windows(model.spec)
        if window >= LONGEST
    )


def _begun(subject: Subject, model: Model) -> Report:
    return Report(
        subject=subject.name,
        kind=subject.artifact.kind,
        artifact=artifact.identity(subject.evidence),
        source={
            "path": str(model.checkpoint.path),
            "format": model.checkpoint.format,
            "family": model.spec.family,
            **({"adapter": model.adapter} if model.adapter else {}),
        },
        executed_by="nothing",
        checks=(),
        environment={"nemoport": __version__, "python": platform.python_version(), "machine": platform.machine()}
        | {name: found for name in ("numpy", "torch", "onnxruntime") if (found := _installed(name))},
    )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
