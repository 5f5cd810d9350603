"""What a config says of its inputs and outputs, by itself. Triton's own checks: `ValidateModelIOConfig` of its core."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from nemoport.check.finding import At, Problem
from nemoport.check.rules.row import Rule, did_you_mean
from nemoport.check.subject import Subject, type_name


def nameless(subject: Subject) -> Iterator[Problem]:
    for at, tensor in every(subject):
        if not tensor.name:
            yield Problem(at, f"an {at[0]} without a name", "a name", "write its name as the model has it")


def typeless(subject: Subject) -> Iterator[Problem]:
    for at, tensor in every(subject):
        if not tensor.data_type:
            yield Problem(at, f"{tensor.name} has no data_type", "data_type: TYPE_...", "write its type")


def unnamed_type(subject: Subject) -> Iterator[Problem]:
    """A number in the place of an enum's name may be one that the schema lacks."""
    for at, tensor in every(subject):
        if type_name(tensor).isdigit():
            yield Problem((*at, "data_type"), f"data_type {tensor.data_type} has no name", "TYPE_...", "write its name")


def dimless(subject: Subject) -> Iterator[Problem]:
    batching = subject.model.config is not None and subject.model.config.max_batch_size > 0
    fix = "write dims: [ 1 ], with reshape { shape: [] } for one number an item" if batching else "write dims: [ 1 ]"
    for at, tensor in every(subject):
        if not tensor.dims:
            yield Problem((*at, "dims"), f"{tensor.name} has no dims", "one axis or more", fix)


def bad_dim(subject: Subject) -> Iterator[Problem]:
    for at, tensor in every(subject):
        for field, dims in (("dims", tensor.dims), ("reshape", tensor.reshape.shape)):
            for axis, dim in enumerate(dims):
                if dim < 1 and dim != -1:
                    place = (*at, field, axis) if field == "dims" else (*at, "reshape", "shape", axis)
                    yield Problem(
                        place, f"{tensor.name} has an axis of {dim}", "1 or more, or -1", "write -1 if it varies"
                    )


def reshape_differs(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    for at, tensor in every(subject):
        if config is None or not tensor.HasField("reshape"):
            continue
        dims, shape = list(tensor.dims), list(tensor.reshape.shape)
        if not shape and config.max_batch_size == 0:
            yield Problem(
                (*at, "reshape"),
                f"{tensor.name} is reshaped to a scalar, and the model does not batch",
                "an axis or more",
                "write shape: [ 1 ], or take the reshape away",
            )
        elif dims and _chunks(dims) != _chunks(shape):
            yield Problem(
                (*at, "reshape"),
                f"{tensor.name} is reshaped from {dims} to {shape}",
                "as many elements, with as many axes of -1 and the same between them",
                "correct one of the two",
            )


def image_format(subject: Subject) -> Iterator[Problem]:
    for at, tensor in every(subject):
        if at[0] == "input" and tensor.format and len(tensor.dims) != 3:
            yield Problem(
                (*at, "format"), f"{tensor.name} has {len(tensor.dims)} dims", "3 for NCHW and NHWC", "take it away"
            )


def only_for_tensorrt(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if config is None or config.platform == "tensorrt_plan":
        return
    for at, tensor in every(subject):
        for field in ("is_shape_tensor", "is_non_linear_format_io"):
            if getattr(tensor, field):
                yield Problem((*at, field), f"{tensor.name} has {field}", "a TensorRT plan", "take it away")


def same_name(subject: Subject) -> Iterator[Problem]:
    """Triton takes the last one and says nothing."""
    seen: set[tuple[Any, str]] = set()
    for at, tensor in every(subject):
        if tensor.name and (at[0], tensor.name) in seen:
            yield Problem((*at, "name"), f"two {at[0]}s are called {tensor.name}", "one", "take one away, or rename it")
        seen.add((at[0], tensor.name))


def batch_tensors(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if config is None:
        return
    inputs, outputs = [tensor.name for tensor in config.input], [tensor.name for tensor in config.output]
    for field, rows in (("batch_input", config.batch_input), ("batch_output", config.batch_output)):
        for number, row in enumerate(rows):
            at: At = (field, number)
            if len(row.source_input) != 1:
                yield Problem(at, f"{len(row.source_input)} source inputs", "one", "name one input")
            for which, name in enumerate(row.source_input):
                if name not in inputs:
                    fix = did_you_mean(name, inputs, "name an input")
                    yield Problem((*at, "source_input", which), f"there is no input {name}", "an input", fix)
            if field == "batch_input" and type_name(row) not in ("TYPE_INT32", "TYPE_FP32"):
                yield Problem(at, f"data_type {type_name(row)}", "TYPE_INT32 or TYPE_FP32", "write one of them")
            targets = list(row.target_name) if field == "batch_output" else []
            for which, name in enumerate(targets):
                if name not in outputs or name in targets[:which]:
                    fix = did_you_mean(name, outputs, "name each output once")
                    yield Problem((*at, "target_name", which), f"{name} is no output, or said twice", "an output", fix)


def every(subject: Subject) -> Iterator[tuple[At, Any]]:
    """Each input and output with its place."""
    config = subject.model.config
    for field in ("input", "output"):
        for number, tensor in enumerate(getattr(config, field) if config is not None else ()):
            yield (field, number), tensor


def _chunks(shape: Sequence[int]) -> list[int]:
    """Elements between the axes that vary: [2, 4, -1, 6] is [8, 6], as is [8, -1, 6]."""
    cuts = [at for at, dim in enumerate(shape) if dim == -1]
    starts, ends = [0, *(cut + 1 for cut in cuts)], [*cuts, len(shape)]
    return [math.prod(shape[start:end]) for start, end in zip(starts, ends, strict=True)]


RULES = (
    Rule("NP401", "error", "Every tensor has a name.", nameless),
    Rule("NP402", "error", "Every tensor has a data type.", typeless),
    Rule("NP403", "error", "A data type is one with a name.", unnamed_type),
    Rule("NP404", "error", "Every tensor has dims.", dimless),
    Rule("NP405", "error", "An axis is 1 or more, or -1 where it varies.", bad_dim),
    Rule("NP406", "error", "A reshape keeps the number of elements.", reshape_differs),
    Rule("NP407", "error", "NCHW and NHWC are for three dims.", image_format),
    Rule("NP408", "error", "Shape tensors and non-linear formats are for TensorRT plans.", only_for_tensorrt),
    Rule("NP409", "error", "No two inputs, and no two outputs, have one name.", same_name),
    Rule("NP410", "error", "Batch inputs and outputs name tensors that are there.", batch_tensors),
)
