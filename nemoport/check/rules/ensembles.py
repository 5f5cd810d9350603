"""Ensembles: how their steps are wired, by themselves and against the models they name.

What Triton's core refuses, in `ValidateEnsembleSchedulingConfig` and `ValidateEnsembleConfig`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from nemoport.check.finding import At, Problem
from nemoport.check.rules.row import Rule, did_you_mean, some
from nemoport.check.subject import Interface, Subject
from nemoport.errors import DamagedInput
from nemoport.runner.ensembles.wiring import BadEnsemble, check_wiring, is_decoupled

_STEPS: At = ("ensemble_scheduling", "step")
_NOT_THERE = ("instance_group", "optimization", "model_warmup")


def out_of_place(subject: Subject) -> Iterator[Problem]:
    config = subject.model.written
    said = {field.name for field, _ in config.ListFields()} if config is not None and _is_ensemble(subject) else set()
    for field in _NOT_THERE:
        if field in said:
            yield Problem((field,), f"an ensemble has {field}", "none: its members have theirs", "take it away")


def whole_steps(subject: Subject) -> Iterator[Problem]:
    if _is_ensemble(subject) and not list(_steps(subject)):
        yield Problem(("ensemble_scheduling",), "an ensemble without steps", "one or more", "write its steps")
    for at, step in _steps(subject):
        for field in ("model_name", "input_map", "output_map"):
            if not getattr(step, field):
                yield Problem(at, f"a step without {field}", field, "write it")


def made_once(subject: Subject) -> Iterator[Problem]:
    made: Counter[str] = Counter()
    inputs = _names(subject, "input")
    for at, step in _steps(subject):
        for key, tensor in sorted(step.output_map.items()):
            made[tensor] += 1
            if made[tensor] > 1 or tensor in inputs:
                other = "an input of the ensemble" if tensor in inputs else "made by another step"
                yield Problem((*at, "output_map", key), f"{tensor} is {other}", "one source", "give it another name")


def connected(subject: Subject) -> Iterator[Problem]:
    """Whatever a step or an output wants is an input, or made by a step that comes to its turn."""
    made = {tensor for _, step in _steps(subject) for tensor in step.output_map.values()}
    known = made | _names(subject, "input")
    circles = _circles(subject)
    for at, step in _steps(subject):
        for key, tensor in sorted(step.input_map.items()):
            place = (*at, "input_map", key)
            if tensor not in known:
                yield Problem(
                    place,
                    f"nothing makes {tensor}",
                    f"one of {some(sorted(known))}",
                    did_you_mean(tensor, known, "make it in a step"),
                )
            elif tensor in circles and circles & set(step.output_map.values()):
                yield Problem(
                    place,
                    f"{tensor} needs itself: its steps wait for each other",
                    "steps without a circle",
                    "cut the circle",
                )
    for number, output in enumerate(
        subject.model.config.output if _is_ensemble(subject) and subject.model.config else ()
    ):
        if output.name not in known:
            fix = did_you_mean(output.name, made, "make it in a step")
            yield Problem(
                ("output", number, "name"), f"nothing makes {output.name}", f"one of {some(sorted(made))}", fix
            )


def used(subject: Subject) -> Iterator[Problem]:
    if not list(_steps(subject)):
        return
    wanted = {tensor for _, step in _steps(subject) for tensor in step.input_map.values()}
    outputs = _names(subject, "output")
    for number, tensor in enumerate(subject.model.config.input if subject.model.config else ()):
        if tensor.name not in wanted:
            fix = did_you_mean(tensor.name, wanted, "map it, or take it away")
            yield Problem(("input", number, "name"), f"no step takes {tensor.name}", "a step that does", fix)
    for at, step in _steps(subject):
        for key, tensor in sorted(step.output_map.items()):
            if tensor not in wanted | outputs:
                yield Problem(
                    (*at, "output_map", key), f"{tensor} is made and not used", "a use", "take it out of the map"
                )


def members(subject: Subject) -> Iterator[Problem]:
    for at, step in _steps(subject):
        if step.model_name and step.model_name not in subject.models:
            others = [name for name in subject.models if name != subject.model.name]
            fix = did_you_mean(step.model_name, others, "bring the model")
            yield Problem(
                (*at, "model_name"), f"there is no model {step.model_name}", f"one of {some(sorted(others))}", fix
            )
        elif step.model_name in _ancestors(subject):
            yield Problem(
                (*at, "model_name"),
                f"the ensemble contains itself, through {step.model_name}",
                "no circle",
                "take the step out",
            )


def member_version(subject: Subject) -> Iterator[Problem]:
    for at, step in _steps(subject):
        member = subject.models.get(step.model_name)
        if (
            member is not None
            and member.served
            and step.model_version != -1
            and step.model_version not in member.served
        ):
            said = (*at, "model_version") if step.model_version else at
            yield Problem(
                said,
                f"the step wants version {step.model_version} of {member.name}",
                f"-1 for the latest, or one of {some(map(str, member.served))}, which are served",
                "write model_version: -1, or serve that version",
            )


def broken_member(subject: Subject) -> Iterator[Problem]:
    for at, step in _steps(subject):
        if step.model_name in subject.broken:
            yield Problem(
                (*at, "model_name"), f"{step.model_name} does not load", "members that load", "see what is said of it"
            )


def mapped(subject: Subject) -> Iterator[Problem]:
    for at, step, member in _known_members(subject):
        for field, mapping, ports in (
            ("input_map", step.input_map, member.inputs),
            ("output_map", step.output_map, member.outputs),
        ):
            kind = field.removesuffix("_map")
            for key in sorted(mapping):
                if key not in ports:
                    fix = did_you_mean(key, ports, f"take it out of {field}")
                    yield Problem(
                        (*at, field, key), f"{step.model_name} has no {kind} {key}", f"one of {some(ports)}", fix
                    )
        for name, port in member.inputs.items():
            if name not in step.input_map and not port.optional:
                fix = f'write input_map {{ key: "{name}" value: "..." }}'
                yield Problem(
                    at, f"the input {name} of {step.model_name} is not mapped", "every input that is not optional", fix
                )


def same_kind(subject: Subject) -> Iterator[Problem]:
    """A tensor has one type and one shape, at whichever end it is looked at. -1 agrees with any number."""
    own = subject.model.interface
    seen = (
        {}
        if own is None
        else {name: (subject.model.name, port) for name, port in (*own.inputs.items(), *own.outputs.items())}
    )
    for at, step, member in _known_members(subject):
        for field, mapping, ports in (
            ("input_map", step.input_map, member.inputs),
            ("output_map", step.output_map, member.outputs),
        ):
            for key, tensor in sorted(mapping.items()):
                if key not in ports:
                    continue
                other, port = seen.setdefault(tensor, (step.model_name, ports[key]))
                here = ports[key]
                for what, ours, theirs, agree in (
                    ("type", here.data_type, port.data_type, here.data_type == port.data_type),
                    ("shape", here.full, port.full, _alike(here.dims, port.dims) or _alike(here.full, port.full)),
                ):
                    if not agree:
                        yield Problem(
                            (*at, field, key),
                            f"{tensor} has {what} {_word(ours)} in {step.model_name}, and {_word(theirs)} in {other}",
                            f"one {what}",
                            "correct the config that is wrong, or convert between them in a step",
                        )


def member_batch(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    for _at, step, member in _known_members(subject):
        assert config is not None
        if 0 < member.max_batch_size < config.max_batch_size:
            yield Problem(
                ("max_batch_size",),
                f"batches of {config.max_batch_size}, and of {member.max_batch_size} in {step.model_name}",
                f"{member.max_batch_size} or less",
                f"write max_batch_size: {member.max_batch_size}",
            )


def one_answer(subject: Subject) -> Iterator[Problem]:
    """Of ensembles whose wiring, and whose members' wiring, is whole: the rest is told by other rules."""
    config = subject.model.config
    if config is None or not _is_ensemble(subject) or not config.output:
        return
    try:
        check_wiring(config)
    except DamagedInput:
        return
    if any(step.model_name not in subject.models or step.model_name in subject.broken for _, step in _steps(subject)):
        return
    if _ancestors(subject):
        return
    try:
        is_decoupled(config, partial(_decoupled, subject))
    except BadEnsemble as error:
        yield Problem(
            _STEPS[:1],
            str(error),
            "tensors in each step, and in the answer, that stem from answers of one decoupled model",
            "make them in one model, or take the other tensor from before the decoupled step",
        )


def _decoupled(subject: Subject, name: str) -> bool:
    """As far as its config says; a model.py may say more when it is loaded."""
    config = subject.models[name].config
    if config is None:
        return False
    if subject.models[name].is_ensemble:
        return is_decoupled(config, partial(_decoupled, subject))
    return bool(config.model_transaction_policy.decoupled)


def _is_ensemble(subject: Subject) -> bool:
    return subject.model.config is not None and subject.model.config.HasField("ensemble_scheduling")


def _steps(subject: Subject) -> Iterator[tuple[At, Any]]:
    for number, step in enumerate(
        subject.model.config.ensemble_scheduling.step if subject.model.config is not None else ()
    ):
        yield (*_STEPS, number), step


def _known_members(subject: Subject) -> Iterator[tuple[At, Any, Interface]]:
    for at, step in _steps(subject):
        member = subject.models.get(step.model_name)
        if member is not None and step.model_name not in subject.broken and member.interface is not None:
            yield at, step, member.interface


def _names(subject: Subject, field: str) -> set[str]:
    config = subject.model.config
    return {tensor.name for tensor in getattr(config, field)} if config is not None else set()


def _circles(subject: Subject) -> set[str]:
    """The tensors that need themselves, or lie between two circles: what is left when those that need nothing of the
    rest are gone, and then those that nothing of the rest needs."""
    sources: dict[str, set[str]] = {}
    for _, step in _steps(subject):
        for made in step.output_map.values():
            sources.setdefault(made, set()).update(step.input_map.values())
    rest = set(sources)
    while gone := {tensor for tensor in rest if not sources[tensor] & rest}:
        rest -= gone
    while gone := rest - {tensor for made in rest for tensor in sources[made]}:
        rest -= gone
    return rest


def _ancestors(subject: Subject) -> set[str]:
    """The ensembles, from this one on, whose steps lead to this one again."""
    leads: set[str] = set()
    for name in {step.model_name for _, step in _steps(subject)}:
        seen, waiting = set(), [name]
        while waiting:
            at = waiting.pop()
            seen.add(at)
            model = subject.models.get(at)
            config = model.config if model else None
            waiting += (
                [step.model_name for step in config.ensemble_scheduling.step if step.model_name not in seen]
                if config
                else []
            )
        if subject.model.name in seen:
            leads.add(name)
    return leads


def _alike(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _word(value: str | tuple[int, ...]) -> str:
    return value if isinstance(value, str) else str(list(value))


RULES = (
    Rule("NP701", "error", "An ensemble has no instances, optimization or warm-up of its own.", out_of_place),
    Rule("NP702", "error", "Every step names a model, its inputs and its outputs.", whole_steps),
    Rule("NP703", "error", "A tensor of an ensemble has one source.", made_once),
    Rule("NP704", "error", "Every tensor that is wanted is made, and not by itself.", connected),
    Rule("NP705", "error", "Every input and every tensor is used.", used),
    Rule("NP706", "error", "Every member is in the repository, and no ensemble is in itself.", members),
    Rule("NP707", "error", "The version that a step wants is served.", member_version),
    Rule("NP708", "error", "Every member loads.", broken_member),
    Rule("NP709", "error", "Maps name what the member has, and all inputs that it needs.", mapped),
    Rule("NP710", "error", "A tensor has one type and shape on its way.", same_kind),
    Rule("NP711", "error", "No member takes smaller batches than the ensemble.", member_batch),
    Rule("NP712", "error", "What meets in a step stems from answers of one decoupled model.", one_answer),
)
