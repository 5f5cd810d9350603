"""Batching, sequences, priorities, caches, warm-up. Triton's own checks: `ValidateModelConfig` of its core."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from nemoport.check.finding import At, Problem
from nemoport.check.rules.row import Rule
from nemoport.check.subject import Subject


def negative_batch(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if config is not None and config.max_batch_size < 0:
        yield Problem(
            ("max_batch_size",), f"max_batch_size is {config.max_batch_size}", "0 or more", "write 0 for none"
        )


def preferred_size(subject: Subject) -> Iterator[Problem]:
    config = subject.model.written
    if config is None or config.max_batch_size < 0:
        return
    where: tuple[tuple[At, Any], ...] = (
        (("dynamic_batching",), config.dynamic_batching),
        (("sequence_batching", "oldest"), config.sequence_batching.oldest),
    )
    for at, batching in where:
        for number, size in enumerate(batching.preferred_batch_size):
            if not 0 < size <= config.max_batch_size:
                yield Problem(
                    (*at, "preferred_batch_size", number),
                    f"a preferred batch of {size}",
                    f"1 to max_batch_size, which is {config.max_batch_size}",
                    "raise max_batch_size, or take the size away",
                )


def batching_without_batches(subject: Subject) -> Iterator[Problem]:
    config = subject.model.written
    if config is None or not (subject.model.text and config.HasField("dynamic_batching")) or config.max_batch_size:
        return
    if not (config.input and config.output):
        return  # Triton completes the config, and max_batch_size with it
    yield Problem(
        ("dynamic_batching",),
        "dynamic_batching with max_batch_size 0 never batches",
        "max_batch_size of 1 or more",
        "write max_batch_size, or take dynamic_batching away",
    )


def priorities(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    batching = config.dynamic_batching if config is not None else None
    if batching is None or not batching.priority_levels:
        return
    levels = batching.priority_levels
    if not 1 <= batching.default_priority_level <= levels:
        yield Problem(
            ("dynamic_batching", "default_priority_level"),
            f"default_priority_level is {batching.default_priority_level}",
            f"1 to {levels}",
            "write the level of requests that name none",
        )
    for level in sorted(batching.priority_queue_policy):
        if not 1 <= level <= levels:
            yield Problem(
                ("dynamic_batching", "priority_queue_policy"),
                f"a queue policy for level {level}",
                f"1 to {levels}",
                "take it away, or raise priority_levels",
            )


def order(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if config is None or not config.dynamic_batching.preserve_ordering:
        return
    batching = config.dynamic_batching
    at: At = ("dynamic_batching", "preserve_ordering")
    if batching.priority_levels > 1:
        yield Problem(
            at, f"{batching.priority_levels} priority levels", "one, to keep the order", "take one of the two away"
        )
    policies = (batching.default_queue_policy, *batching.priority_queue_policy.values())
    if any(each.default_timeout_microseconds and each.timeout_action for each in policies):
        yield Problem(at, "a timeout of action DELAY", "REJECT, to keep the order", "take one of the two away")


def controls(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if config is None or not config.HasField("sequence_batching"):
        return
    kinds: Counter[int] = Counter()
    names: Counter[str] = Counter()
    for number, tensor in enumerate(config.sequence_batching.control_input):
        at: At = ("sequence_batching", "control_input", number)
        names[tensor.name] += 1
        if not tensor.name or names[tensor.name] > 1:
            yield Problem(at, f"control tensor {tensor.name!r} without a name of its own", "one", "name it")
        for which, control in enumerate(tensor.control):
            kinds[control.kind] += 1
            yield from _control((*at, "control", which), control, kinds[control.kind])
    slots = config.sequence_batching.direct.minimum_slot_utilization
    if not 0 <= slots <= 1:
        place = ("sequence_batching", "direct", "minimum_slot_utilization")
        yield Problem(place, f"minimum_slot_utilization is {slots}", "0 to 1", "write a fraction")


def cache(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if config is None or not config.response_cache.enable:
        return
    for field, there in (
        ("sequence_batching", config.HasField("sequence_batching")),
        ("model_transaction_policy", config.model_transaction_policy.decoupled),
    ):
        if there:
            yield Problem(("response_cache",), f"a response cache with {field}", "one of them", "take the cache away")


def warm_up(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if config is None or subject.model.is_ensemble:
        return
    for number, sample in enumerate(config.model_warmup):
        at: At = ("model_warmup", number)
        if not sample.batch_size:
            yield Problem(at, "a sample of batch_size 0 warms nothing up", "1 or more", "write batch_size: 1")
        for name, tensor in sorted(sample.inputs.items()):
            place = (*at, "inputs", name)
            if any(dim < 0 for dim in tensor.dims):
                yield Problem(place, f"dims {list(tensor.dims)}", "numbers only", "write the size to warm up with")
            if tensor.WhichOneof("input_data_type") is None:
                yield Problem(place, "no data", "zero_data, random_data or input_data_file", "write zero_data: true")
        yield from _warm_up_names(at, sample, config)


def _warm_up_names(at: At, sample: Any, config: Any) -> Iterator[Problem]:
    needed = {tensor.name for tensor in config.input if not tensor.optional}
    if missing := sorted(needed - set(sample.inputs)) if sample.batch_size else []:
        yield Problem(at, f"the sample lacks the input {missing[0]}", "every input", "give it")


def _control(at: At, control: Any, count: int) -> Iterator[Problem]:
    name = type(control).Kind.Name(control.kind)
    given = [
        field for field in ("int32_false_true", "fp32_false_true", "bool_false_true") if len(getattr(control, field))
    ]
    if count > 1:
        yield Problem(at, f"two tensors for {name}", "one", "take one away")
    if name == "CONTROL_SEQUENCE_CORRID":
        allowed = ("TYPE_UINT64", "TYPE_INT64", "TYPE_UINT32", "TYPE_INT32", "TYPE_STRING")
        found = control.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number.get(control.data_type)
        if given or found is None or found.name not in allowed:
            yield Problem(
                at,
                f"{name} of {found.name if found else 'no type'}",
                "a type of whole numbers or TYPE_STRING",
                "write its data_type, and no false_true",
            )
    elif len(given) != 1 or len(getattr(control, given[0])) != 2:
        yield Problem(
            at,
            f"{name} with {' and '.join(given) or 'no values'}",
            "two values of one type",
            "write int32_false_true: [ 0, 1 ]",
        )


RULES = (
    Rule("NP501", "error", "max_batch_size is 0 or more.", negative_batch),
    Rule("NP502", "error", "A preferred batch is within max_batch_size.", preferred_size),
    Rule("NP503", "warning", "Dynamic batching needs a max_batch_size.", batching_without_batches),
    Rule("NP504", "error", "Priority levels are within their number.", priorities),
    Rule("NP505", "error", "Keeping the order excludes priorities and delays.", order),
    Rule("NP506", "error", "Sequence controls are whole, and each is there once.", controls),
    Rule("NP507", "error", "A response cache excludes sequences and decoupled answers.", cache),
    Rule("NP508", "error", "A warm-up sample has all inputs, with data and sizes.", warm_up),
)
