"""Fields that an older Triton refuses: it reads no config with a field that it does not know.

Since when each field is there, from protobuf/model_config.proto of the release branches r20.10 to r26.07 of
triton-inference-server/common. What is not listed is older than all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemoport.check.finding import At, Problem
from nemoport.check.rules.row import Rule
from nemoport.check.subject import Subject

Release = tuple[int, int]

FIELDS: dict[str, Release] = {
    "ModelInstanceGroup.host_policy": (21, 6),
    "ModelInstanceGroup.passive": (21, 6),
    "ModelInstanceGroup.secondary_devices": (21, 6),
    "ModelSequenceBatching.Control.bool_false_true": (21, 9),
    "ModelConfig.response_cache": (21, 10),
    "ModelSequenceBatching.state": (21, 11),
    "ModelInput.optional": (22, 1),
    "ModelSequenceBatching.State.initial_state": (22, 1),
    "ModelWarmup.count": (22, 7),
    "ModelEnsembling.Step.model_namespace": (23, 3),
    "ModelSequenceBatching.StrategyOldest.preserve_ordering": (23, 8),
    "ModelSequenceBatching.State.use_growable_memory": (23, 11),
    "ModelSequenceBatching.State.use_same_buffer_for_input_output": (23, 11),
    "ModelSequenceBatching.iterative_sequence": (23, 11),
    "ModelConfig.runtime": (24, 1),
    "ModelInput.is_non_linear_format_io": (24, 8),
    "ModelOutput.is_non_linear_format_io": (24, 8),
    "ModelConfig.model_metrics": (24, 11),
    "ModelEnsembling.max_inflight_requests": (25, 11),
}
VALUES: dict[str, Release] = {
    "BATCH_ITEM_SHAPE": (22, 3),
    "BATCH_ITEM_SHAPE_FLATTEN": (22, 3),
    "TYPE_BF16": (22, 5),
}


def newer(subject: Subject) -> Iterator[Problem]:
    if subject.release is None or subject.model.written is None or subject.model.text is None:
        return
    for at, name, since in _dated(subject.model.written, ()):
        if since > subject.release:
            yield Problem(
                at,
                f"{name} came with Triton {_show(since)}",
                f"fields that {_show(subject.release)} knows",
                "take it away, or serve with a newer Triton",
            )


def _dated(message: Any, at: At) -> Iterator[tuple[At, str, Release]]:
    owner = message.DESCRIPTOR.full_name.removeprefix("inference.")
    for field, value in message.ListFields():
        place = (*at, field.name)
        if since := FIELDS.get(f"{owner}.{field.name}"):
            yield place, field.name, since
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            items: list[tuple[At, Any]] = [((*place, key, "value"), value[key]) for key in sorted(value)]
        else:
            items = (
                [((*place, number), item) for number, item in enumerate(value)]
                if field.is_repeated
                else [(place, value)]
            )
        for where, item in items:
            if hasattr(item, "ListFields"):
                yield from _dated(item, where)
            elif field.enum_type is not None and item in field.enum_type.values_by_number:
                name = field.enum_type.values_by_number[item].name
                if name in VALUES:
                    yield where, name, VALUES[name]


def _show(release: Release) -> str:
    return f"{release[0]}.{release[1]:02}"


RULES = (Rule("NP807", "error", "Every field is one that the Triton that is meant knows.", newer),)
