"""What Triton refuses in an ensemble, in its words: first what the config alone shows, then against its members."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nemoport.errors import DamagedInput
from nemoport.runner.contract import Contract, TensorContract
from nemoport.runner.model_config import ModelConfig
from nemoport.runner.refusal import Refusal
from nemoport.runner.tensors import show


class BadEnsemble(DamagedInput):
    """An ensemble whose config makes sense and does not fit its members."""


def is_ensemble(config: ModelConfig) -> bool:
    return bool(config.platform == "ensemble")


def members(config: ModelConfig) -> tuple[str, ...]:
    return tuple(dict.fromkeys(step.model_name for step in config.ensemble_scheduling.step))


def version_of(step: Any) -> int | None:
    """-1 in a config is the latest; a step that says nothing says 0, which is a version like others."""
    return None if step.model_version == -1 else int(step.model_version)


def needed_steps(config: ModelConfig, wanted: Iterable[str]) -> list[Any]:
    """The steps without which the wanted outputs cannot be made, in the config's order."""
    steps, needed = list(config.ensemble_scheduling.step), set(wanted)
    chosen: set[int] = set()
    while more := [at for at, s in enumerate(steps) if at not in chosen and needed & set(s.output_map.values())]:
        chosen.update(more)
        needed.update(tensor for at in more for tensor in steps[at].input_map.values())
    return [steps[at] for at in sorted(chosen)]


def check_wiring(config: ModelConfig) -> None:
    """Every tensor has one source, everything that is made is used, and every output can be reached."""
    name, steps = config.name, config.ensemble_scheduling.step
    if config.instance_group:
        raise DamagedInput(f"instance group should not be specified for ensemble '{name}'")
    if not steps:
        raise DamagedInput(f"must specify 'step' for ensemble '{name}'")
    inputs, outputs = [tensor.name for tensor in config.input], [tensor.name for tensor in config.output]
    made, used = set(inputs), set(outputs)
    for at, step in enumerate(steps):
        for field in ("model_name", "input_map", "output_map"):
            if not getattr(step, field):
                raise DamagedInput(f"must specify '{field}' in step {at} of ensemble '{name}'")
        used.update(step.input_map.values())
        for tensor in step.output_map.values():
            if tensor in made:
                raise DamagedInput(
                    f"ensemble tensor '{tensor}' can appear in an output map only once for ensemble '{name}' step {at}"
                )
            made.add(tensor)
    for tensor in inputs:
        if all(tensor not in step.input_map.values() for step in steps):
            raise DamagedInput(f"ensemble input '{tensor}' for ensemble {name}' is not used")
    for tensor in outputs:
        if tensor not in made:
            raise DamagedInput(f"ensemble output '{tensor}' for ensemble {name}' is not used")
    reached = _reached(config)
    for tensor in outputs:
        if tensor not in reached:
            missing = sorted((used - reached) - set(outputs)) or [tensor]
            raise DamagedInput(
                f"output '{tensor}' for ensemble '{name}' is not written: at least one of its depending tensors, "
                f"'{missing[0]}', is not connected"
            )
    for tensor in sorted(made - used):
        raise DamagedInput(f"ensemble tensor '{tensor}' is unused in ensemble '{name}'")


def check_members(config: ModelConfig, contract: Contract, find: Callable[[str, int | None], Any]) -> bool:
    """Whether the ensemble may answer any number of times, as one of its members does."""
    name = config.name
    own = {**contract.inputs, **contract.outputs}
    shown = {tensor: (name, contract.client_shape(of), of) for tensor, of in own.items()}
    for step in config.ensemble_scheduling.step:
        try:
            member = find(step.model_name, version_of(step))
        except Refusal:
            raise BadEnsemble(_absent(config, step, find)) from None
        limit = member.contract.max_batch_size
        if 0 < limit < config.max_batch_size:  # a member without batching fits where the whole shapes agree
            raise BadEnsemble(
                f"ensemble {name} allows maximum batch size {config.max_batch_size}, but it contains model "
                f"{member.name} which only allows maximum batch size to be {limit}"
            )
        for kind, mapped, there in (
            ("mapping to non-existing input", step.input_map, member.contract.inputs),
            ("mapped from non-existing output", step.output_map, member.contract.outputs),
        ):
            for its, ours in sorted(mapped.items()):
                if its not in there:
                    raise BadEnsemble(
                        f"in ensemble {name}, ensemble tensor {ours} is {kind} {its} in model {member.name}"
                    )
                seen = member.name, member.contract.client_shape(there[its]), there[its]
                _check_same(name, ours, shown.setdefault(ours, seen), seen)
        for its, tensor in member.contract.inputs.items():
            if its not in step.input_map and not tensor.optional:
                raise BadEnsemble(
                    f"in ensemble {name}, input {its} in model {member.name} is not mapped to any ensemble tensors"
                )
    return is_decoupled(config, lambda model: bool(find(model, None).decoupled))


def is_decoupled(config: ModelConfig, decoupled: Callable[[str], bool]) -> bool:
    """Whether a member is, which `decoupled` says by its name. Each of its answers goes on alone, so what meets in a
    step, or in the ensemble's answer, has to stem from answers of one member (Triton's core,
    `ValidateEnsembleConfig`). The wiring is one that `check_wiring` passes."""
    stems: dict[str, int | None] = dict.fromkeys(tensor.name for tensor in config.input)
    """The decoupled step that each tensor stems from last."""
    known_from = _known_from(config)
    for at, step in _in_order(config):
        stem = _one_stem(config.name, stems, step.input_map.values(), known_from[min(step.output_map.values())])
        stems.update(dict.fromkeys(step.output_map.values(), at if decoupled(step.model_name) else stem))
    return _one_stem(config.name, stems, [tensor.name for tensor in config.output], config.name) is not None


def _known_from(config: ModelConfig) -> dict[str, str]:
    """Of each tensor, the model whose config tells of it first."""
    known = dict.fromkeys((tensor.name for tensor in (*config.input, *config.output)), str(config.name))
    for step in config.ensemble_scheduling.step:
        for tensor in (*step.input_map.values(), *step.output_map.values()):
            known.setdefault(tensor, step.model_name)
    return known


def _one_stem(ensemble: str, stems: dict[str, int | None], tensors: Iterable[str], model: str) -> int | None:
    stem, *others = {stems[tensor] for tensor in tensors}
    if others:
        raise BadEnsemble(
            f"in ensemble {ensemble}, step of model '{model}' receives inputs originated from different decoupled "
            "models"
        )
    return stem


def _absent(config: ModelConfig, step: Any, find: Callable[[str, int | None], Any]) -> str:
    try:
        find(step.model_name, None)
    except Refusal:
        return f"ensemble {config.name} contains models that are not available or ambiguous: {step.model_name}"
    return (
        f"ensemble '{config.name}' depends on '{step.model_name}' whose required version {step.model_version} "
        "is not loaded."
    )


_Seen = tuple[str, tuple[int, ...], TensorContract]


def _check_same(ensemble: str, tensor: str, one: _Seen, other: _Seen) -> None:
    """Shapes agree with their batch axis, or without it: a real one leaves the rest to the requests."""
    for what, mine, its in (
        ("data type", one[2].datatype.config, other[2].datatype.config),
        ("shape", show(one[1]), show(other[1])),
    ):
        if mine != its and not (what == "shape" and _agree(one, other)):
            raise BadEnsemble(
                f"in ensemble {ensemble}, ensemble tensor {tensor}: inconsistent {what}: {mine} is inferred from model "
                f"{one[0]} while {its} is inferred from model {other[0]}"
            )


def _agree(one: _Seen, other: _Seen) -> bool:
    return may_be_equal(one[1], other[1]) or may_be_equal(one[2].dims, other[2].dims)


def may_be_equal(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _reached(config: ModelConfig) -> set[str]:
    """The tensors that get a value when the inputs have theirs."""
    made = {tensor for _, step in _in_order(config) for tensor in step.output_map.values()}
    return made.union(tensor.name for tensor in config.input)


def _in_order(config: ModelConfig) -> Iterator[tuple[int, Any]]:
    """The steps that come to their turn, with their places in the config, each after those that it needs."""
    reached = {tensor.name for tensor in config.input}
    steps = dict(enumerate(config.ensemble_scheduling.step))
    while ready := [at for at, step in steps.items() if set(step.input_map.values()) <= reached]:
        for at in ready:
            step = steps.pop(at)
            reached.update(step.output_map.values())
            yield at, step
