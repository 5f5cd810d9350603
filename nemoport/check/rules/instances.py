"""Where instances run: on what, on how many devices, and, when a target is named, whether it has them.

What Triton's core refuses, in `ValidateInstanceGroup`. A model that spans several devices has to say KIND_MODEL: its
backend takes the devices itself, where KIND_GPU would pin each instance to one (vLLM's backend refuses that).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nemoport.check.finding import At, Problem
from nemoport.check.rules.files import served
from nemoport.check.rules.row import Rule
from nemoport.check.subject import Subject

_SPANS = {"vllm": ("KIND_MODEL",), "python": ("KIND_MODEL", "KIND_CPU")}
"""Backends whose instance of KIND_GPU has one device, and the kinds with which a model spans several; the process of a
python model needs none where it starts ranks of its own. tensorrtllm always starts them."""
_ONLY_ON_GPU = ("tensorrt", "tensorrtllm")


def gpus_without_gpu(subject: Subject) -> Iterator[Problem]:
    for at, group in _groups(subject):
        kind = _kind(group)
        if kind in ("KIND_CPU", "KIND_MODEL") and group.gpus:
            yield Problem(
                (*at, "gpus"), f"{kind} with gpus {list(group.gpus)}", "no gpus", "take them away, or write KIND_GPU"
            )


def profiles(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    for at, group in _groups(subject):
        for number, profile in enumerate(group.profile):
            if config is not None and config.platform != "tensorrt_plan":
                yield Problem((*at, "profile", number), "a profile", "a TensorRT plan", "take it away")
            elif not profile.isdigit():
                yield Problem(
                    (*at, "profile", number), f"the profile {profile!r}", "a whole number", "write its number"
                )


def several_devices(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if config is None or config.backend not in _SPANS:
        return
    for version in served(subject):
        for at, group in _groups(subject):
            if version.ranks and version.ranks > 1 and _kind(group) not in _SPANS[config.backend]:
                yield Problem(
                    (*at, "kind") if group.kind else at,
                    f"{_kind(group)}, and {version.ranks_from} spans {version.ranks} devices",
                    "KIND_MODEL, which lets the model take its devices itself",
                    "write kind: KIND_MODEL",
                )
        if version.ranks and version.ranks > 1 and not config.instance_group:
            yield Problem(
                (),
                f"no instance_group, and {version.ranks_from} spans {version.ranks} devices",
                "KIND_MODEL, which lets the model take its devices itself",
                "write instance_group [ { kind: KIND_MODEL count: 1 } ]",
            )


def no_gpu(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if subject.target.gpus != 0 or config is None:
        return
    for at, group in _groups(subject):
        if _kind(group) == "KIND_GPU":
            yield Problem(
                (*at, "kind"), "KIND_GPU", "KIND_CPU or KIND_AUTO, on a machine without GPU", "write KIND_AUTO"
            )
        elif _kind(group) == "KIND_AUTO" and group.gpus:
            yield Problem((*at, "gpus"), f"gpus {list(group.gpus)}", "none, on a machine without GPU", "take them away")
    if config.backend in _ONLY_ON_GPU:
        at = ("backend",) if subject.model.written and subject.model.written.backend else ("platform",)
        yield Problem(
            at, f"{config.backend} runs on GPUs only", "a machine with a GPU", "serve it elsewhere, or publish ONNX"
        )


def no_such_gpu(subject: Subject) -> Iterator[Problem]:
    gpus = subject.target.gpus
    if not gpus:
        return
    for at, group in _groups(subject):
        for number, gpu in enumerate(group.gpus):
            if gpu >= gpus and _kind(group) in ("KIND_GPU", "KIND_AUTO"):
                yield Problem((*at, "gpus", number), f"gpu {gpu}", f"0 to {gpus - 1}", "name a GPU that is there")


def too_many_devices(subject: Subject) -> Iterator[Problem]:
    gpus = subject.target.gpus
    for version in served(subject) if gpus is not None else ():
        if version.ranks and version.ranks > max(gpus or 0, 1):
            yield Problem(
                version.path,
                f"{version.ranks_from} spans {version.ranks} devices",
                f"no more than the target's, {gpus or 'which has no GPU'}",
                "convert for fewer ranks",
            )


def _groups(subject: Subject) -> Iterator[tuple[At, Any]]:
    for number, group in enumerate(subject.model.config.instance_group if subject.model.config is not None else ()):
        yield ("instance_group", number), group


def _kind(group: Any) -> str:
    value = group.DESCRIPTOR.fields_by_name["kind"].enum_type.values_by_number.get(group.kind)
    return value.name if value else str(group.kind)


RULES = (
    Rule("NP801", "error", "Only instances on GPUs name GPUs.", gpus_without_gpu),
    Rule("NP802", "error", "Profiles are numbers, of a TensorRT plan.", profiles),
    Rule("NP803", "error", "A model that spans several devices is KIND_MODEL.", several_devices),
    Rule("NP804", "error", "Nothing asks for a GPU, where the target has none.", no_gpu),
    Rule("NP805", "error", "Every GPU that is named is one of the target's.", no_such_gpu),
    Rule("NP806", "error", "The target has a device for every rank.", too_many_devices),
)
