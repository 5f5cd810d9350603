"""A model cut into pipeline stages: consecutive blocks, each run with its weights and caches as a graph of its own.

    input_ids -> [layers 0, 1] -> hidden_states.2 -> [layers 2, 3] -> hidden_states.4 -> [layer 4] -> logits

What passes between them is named after the layer that it enters. Layers keep the numbers that they have in the whole,
in the names of weights and caches too. Where they do not divide, the first stages have one more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from nemoport.artifact import Signature, Tensor, stage_place
from nemoport.errors import UsageError
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.spec import LanguageModel, Mixer, ModelSpec

_ENTRY = ("embed", "positions", "token_types", "embed_norm")
"""Weights before the first layer."""


@dataclass(frozen=True)
class Stage:
    layers: range
    first: bool
    last: bool

    @property
    def enters(self) -> str:
        """What it works on, [batch, sequence, ...]."""
        return "input_ids" if self.first else hidden(self.layers.start)

    def holds(self, name: str, spec: ModelSpec) -> bool:
        """Whether a canonical tensor is used here: of a tied embedding both ends are."""
        match name.split("."):
            case ["layers", number, *_]:
                return int(number) in self.layers
            case [part, *_] if part in _ENTRY:
                tied = isinstance(spec.head, LanguageModel) and spec.head.tied and part == "embed"
                return self.first or (self.last and tied)
        return self.last


def hidden(layer: int) -> str:
    return f"hidden_states.{layer}"


def cut(spec: ModelSpec, pp: int) -> tuple[Stage, ...]:
    layers = len(spec.blocks)
    if pp > layers:
        raise UsageError(f"pp={pp} needs a layer for each stage, and the model has {layers}; use pp {layers} or less")
    edges = [number * (layers // pp) + min(number, layers % pp) for number in range(pp + 1)]
    return tuple(Stage(range(*edge), not edge[0], edge[1] == layers) for edge in pairwise(edges))


def mixers_of(spec: ModelSpec, stage: Stage) -> tuple[Mixer, ...]:
    return tuple(mixer for block in spec.blocks[stage.layers.start : stage.layers.stop] if (mixer := block.mixer))


def places(stages: Sequence[Stage]) -> tuple[str, ...]:
    """The directory of each inside the artifact; of one alone the artifact itself."""
    return tuple(stage_place(number) for number in range(len(stages))) if len(stages) > 1 else ("",)


def signatures(
    whole: Signature, spec: ModelSpec, dtype: str, stages: Sequence[Stage], graphs: Sequence[Graph]
) -> tuple[Signature, ...]:
    """Each takes what its graph reads and gives what it makes. What no graph reads the first one takes, so that in a
    row they have the signature of the whole."""
    reads = [graph.reads() for graph in graphs]
    unread = {tensor.name for tensor in whole.inputs} - set().union(*reads)

    def boundary(layer: int, there: bool) -> tuple[Tensor, ...]:
        return (Tensor(hidden(layer), dtype, ("batch", "sequence", spec.hidden_size)),) if there else ()

    return tuple(
        Signature(
            inputs=(
                *boundary(stage.layers.start, not stage.first),
                *(each for each in whole.inputs if each.name in read or (stage.first and each.name in unread)),
            ),
            outputs=(
                *boundary(stage.layers.stop, not stage.last),
                *(each for each in whole.outputs if graph.has(each.name)),
            ),
        )
        for stage, graph, read in zip(stages, graphs, reads, strict=True)
    )
