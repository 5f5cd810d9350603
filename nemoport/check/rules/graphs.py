"""The config against what the model says of itself: its ONNX graph, or the manifest of the artifact it came from.

A number may stand over an axis that varies in an input; an output repeats the graph's dims. Where the model batches,
the batch axis is the first of every tensor and is left out of the dims.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nemoport.check.finding import At, Problem, Rewrite
from nemoport.check.graph import Graph, Tensor
from nemoport.check.rules.files import served
from nemoport.check.rules.row import Rule, nearest, some
from nemoport.check.rules.tensors import every
from nemoport.check.subject import Subject, type_name


def no_graph(subject: Subject) -> Iterator[Problem]:
    for version in served(subject):
        if version.bad_graph:
            yield Problem(version.bad_graph.path, version.bad_graph.reason, "an ONNX graph", "export or copy it again")


def no_such_tensor(subject: Subject) -> Iterator[Problem]:
    for graph in graphs(subject):
        for at, tensor in every(subject):
            there = [each.name for each in _side(graph, at)]
            if tensor.name and tensor.name not in there:
                configured = {other.name for _, other in every(subject)}
                near = nearest(tensor.name, [name for name in there if name not in configured])
                yield Problem(
                    (*at, "name"),
                    f"{graph.source} has no {at[0]} {tensor.name}",
                    f"one of {some(there)}",
                    f"write {near}" if near else "take it away",
                    _rewrite(subject, (*at, "name"), f'"{near}"') if near else None,
                )


def missing_input(subject: Subject) -> Iterator[Problem]:
    """Triton completes a config without any input, and refuses one that has some."""
    config = subject.model.written
    if config is None or not config.input:
        return
    listed = {tensor.name for tensor in config.input}
    for graph in graphs(subject):
        there = [tensor.name for tensor in graph.inputs]
        strangers = [name for name in listed if name not in there]
        for name in there:
            if name not in listed and nearest(name, strangers) is None:
                yield Problem(
                    ("input",),
                    f"the input {name} of {graph.source} is not in the config",
                    "every input, if there is any",
                    f"add {name}, or take all inputs away so that Triton reads them from the graph",
                )


def other_type(subject: Subject) -> Iterator[Problem]:
    for graph, at, tensor, found in pairs(subject):
        wanted = found.data_type
        if tensor.data_type and wanted != type_name(tensor):
            yield Problem(
                (*at, "data_type"),
                f"{tensor.name} is {type_name(tensor)}, and {wanted or 'a type that Triton lacks'} in {graph.source}",
                wanted or "a type that Triton has",
                f"write {wanted}" if wanted else "export the model with another type",
                _rewrite(subject, (*at, "data_type"), wanted) if wanted else None,
            )


def fixed_batch(subject: Subject) -> Iterator[Problem]:
    config = subject.model.config
    if config is None or config.max_batch_size <= 0:
        return
    for graph in graphs(subject):
        fixed = [each for each in (*graph.inputs, *graph.outputs) if each.dims is not None and each.dims[:1] != (-1,)]
        if fixed:
            yield Problem(
                ("max_batch_size",),
                f"batches of {config.max_batch_size}, and {fixed[0].name} is {_show(fixed[0])} in {graph.source}",
                "a first axis that varies, in every tensor",
                "write max_batch_size: 0 with the whole shapes as dims, or export the model with a batch axis",
            )


def batch_axis_repeated(subject: Subject) -> Iterator[Problem]:
    for graph, at, tensor, found in _other_dims(subject):
        if _repeats_batch(subject, tensor, found):
            yield Problem(
                (*at, "dims"),
                f"{tensor.name} has dims {list(tensor.dims)}, which begin with the batch axis of {graph.source}",
                f"{list(tensor.dims)[1:]}, because max_batch_size is more than 0",
                f"drop the leading -1 of {tensor.name}; Triton adds it",
                _rewrite_dims(subject, at, list(tensor.dims)[1:]),
            )


def other_dims(subject: Subject) -> Iterator[Problem]:
    batching = _batches(subject)
    for graph, at, tensor, found in _other_dims(subject):
        if _repeats_batch(subject, tensor, found) or (batching and found.dims and found.dims[0] != -1):
            continue
        assert found.dims is not None
        wanted = list(found.dims[1:] if batching else found.dims)
        reshaped = tensor.HasField("reshape")
        field = "reshape" if reshaped else "dims"
        repair = None
        if wanted and not reshaped:
            fix, repair = f"write dims: {wanted}", _rewrite_dims(subject, at, wanted)
        elif wanted:
            fix = f"write reshape {{ shape: {wanted} }}"
        else:
            fix = "write dims: [ 1 ] and reshape { shape: [] }" if batching else "write dims: [ 1 ]"
        yield Problem(
            (*at, field),
            f"{tensor.name} has {field} {_dims(tensor)}, and is {_show(found)} in {graph.source}",
            f"{wanted}{' after the batch axis' if batching else ''}",
            fix,
            repair,
        )


def optional_input(subject: Subject) -> Iterator[Problem]:
    for _, at, tensor, _ in pairs(subject):
        if at[0] == "input" and tensor.optional and _batches(subject):
            yield Problem(
                (*at, "optional"),
                f"{tensor.name} is optional",
                "an input that is always there, where the model batches",
                "take optional away",
            )


def could_batch(subject: Subject) -> Iterator[Problem]:
    config = subject.model.written
    if config is None or config.max_batch_size or not (config.input and config.output):
        return
    for graph in graphs(subject)[:1]:
        first = {each.shape[0] if each.shape else None for each in (*graph.inputs, *graph.outputs)}
        if len(first) == 1 and first & {"batch", "batch_size", "N"}:
            yield Problem(
                ("max_batch_size",),
                f"max_batch_size is 0, and every tensor of {graph.source} begins with the axis {first.pop()}",
                "1 or more, for requests to be batched",
                "write max_batch_size and leave that axis out of the dims",
            )


def graphs(subject: Subject) -> list[Graph]:
    return [graph for version in served(subject) for graph in version.graphs]


def pairs(subject: Subject) -> Iterator[tuple[Graph, At, Any, Tensor]]:
    """Every configured tensor with the graph's."""
    for graph in graphs(subject):
        for at, tensor in every(subject):
            for found in _side(graph, at):
                if found.name == tensor.name:
                    yield graph, at, tensor, found


def _other_dims(subject: Subject) -> Iterator[tuple[Graph, At, Any, Tensor]]:
    for graph, at, tensor, found in pairs(subject):
        if found.dims is None or not (tensor.dims or tensor.HasField("reshape")):
            continue
        dims = _dims(tensor)
        if not found.dims and not _batches(subject):
            agree = all(dim == 1 for dim in dims)
        else:
            full = [-1, *dims] if _batches(subject) else dims
            agree = len(full) == len(found.dims) and all(
                ours == theirs or (at[0] == "input" and theirs == -1)
                for ours, theirs in zip(full, found.dims, strict=True)
            )
        if not agree:
            yield graph, at, tensor, found


def _repeats_batch(subject: Subject, tensor: Any, found: Tensor) -> bool:
    dims = tuple(tensor.dims)
    same = dims == found.dims and dims[:1] == (-1,) and len(dims) > 1
    return _batches(subject) and same and not tensor.HasField("reshape")


def _batches(subject: Subject) -> bool:
    return subject.model.config is not None and subject.model.config.max_batch_size > 0


def _dims(tensor: Any) -> list[int]:
    return list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)


def _side(graph: Graph, at: At) -> Sequence[Tensor]:
    return graph.inputs if at[0] == "input" else graph.outputs


def _show(tensor: Tensor) -> str:
    return f"[{', '.join(str(axis) or '?' for axis in tensor.shape or ())}]"


def _rewrite(subject: Subject, at: At, text: str) -> Rewrite | None:
    places = subject.model.text.places if subject.model.text else {}
    return Rewrite(places[at].value.start, places[at].value.end, text) if at in places else None


def _rewrite_dims(subject: Subject, at: At, dims: Sequence[int]) -> Rewrite | None:
    """Only a list written at once; dims said one by one are left to a person."""
    text = subject.model.text
    place = text.places.get((*at, "dims")) if text else None
    if text is None or place is None:
        return None
    written = text.content[place.value.start : place.value.end]
    if "dims" in written or "#" in written:
        return None
    return Rewrite(place.value.start, place.value.end, f"[ {', '.join(map(str, dims))} ]")


RULES = (
    Rule("NP601", "error", "A graph can be read.", no_graph),
    Rule("NP602", "error", "Every configured tensor is in the graph.", no_such_tensor),
    Rule("NP603", "error", "Every input of the graph is configured, if any is.", missing_input),
    Rule("NP604", "error", "Data types are the graph's.", other_type),
    Rule("NP605", "error", "A model that batches has a first axis that varies in every tensor.", fixed_batch),
    Rule("NP606", "error", "Dims leave the batch axis out, where the model batches.", batch_axis_repeated),
    Rule("NP607", "error", "Dims are the graph's; an input may narrow an axis that varies.", other_dims),
    Rule("NP608", "error", "No input of a model that batches is optional.", optional_input),
    Rule("NP609", "warning", "A graph with a batch axis is batched.", could_batch),
)
