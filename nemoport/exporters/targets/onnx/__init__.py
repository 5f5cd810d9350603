"""One ONNX graph for prompt and decoding, with a KV cache and weights as external data: for ONNX Runtime and TensorRT.

    inputs     input_ids, position_ids [batch, sequence]    attention_mask [batch, total], total = past + sequence
               past_key_values.{i}.{state} [batch, heads, past, size], past may be 0
    outputs    logits [batch, sequence, vocab], float32     present.{i}.{state} [batch, heads, total, size]

States are those that a layer's mixer declares: `key` and `value` of its KV heads; of latent attention one `latent`, as
of one head, its last elements the rotated key; of Mamba `conv` [batch, channels, kernel - 1] and `ssm` [batch, heads,
head_dim, state_dims], float32, which do not grow and are zero at first. The others have the dtype of the weights.
Logits are float32 always, which every client can read. Position ids must be below the model's `max_positions`, those of
padding too. What answers a text at once has another graph (`encoder.py`).

With `pp` there is a graph for each stage, in `stage0/`, `stage1/` and on, each with its own weights and states
(`stages.py`). In a row they have the same inputs and outputs, and publishing makes an ensemble of them.
"""

from __future__ import annotations

from collections.abc import Iterator

from nemoport.artifact import Signature, Tensor
from nemoport.errors import UnsupportedInput, UsageError
from nemoport.exporters.checkpoint import Model, Output, Slot
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.rope import tables
from nemoport.exporters.signatures import of_encoder
from nemoport.exporters.targets.onnx import quantized
from nemoport.exporters.targets.onnx.decoder import decoder
from nemoport.exporters.targets.onnx.encoder import encoder
from nemoport.exporters.targets.onnx.experts import slow_to_load
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.exporters.targets.onnx.latent import WHOLE
from nemoport.exporters.targets.onnx.layers import Tables
from nemoport.exporters.targets.onnx.stages import Stage, cut, mixers_of, places, signatures
from nemoport.exporters.targets.onnx.text import beside
from nemoport.exporters.tensor import LazyTensor, cast
from nemoport.spec import LanguageModel, ModelSpec, Plan, Profile, Rope
from nemoport.spec import tensors as canonical_tensors

CHOOSES = ".router.expert_bias"
"""Its small steps decide between experts; 16 bits would round them away."""
DIALECTS = (quantized.DIALECT,)
"""In which quantized weights are written."""
GRAPH, DATA = "model.onnx", "model.onnx.data"

LOADED_AS = {
    "float32": ("ONNX Runtime 1.23 or later", "TensorRT 10.15 or later"),
    "float16": ("ONNX Runtime 1.23 or later", "TensorRT 10.15 or later"),
    "bfloat16": ("ONNX Runtime 1.31 or later on CUDA", "TensorRT 10.15 or later"),
}
"""Opset 23 came with ONNX Runtime 1.23; on CPUs it has no bfloat16."""
LOADS = LOADED_AS["float32"]
"""Of the dtype that most releases load."""


def output(model: Model, plan: Plan) -> Output:
    dtype = plan.dtype or model.dtype
    _check(dtype, plan)
    if plan.profile != "portable" and model.quantized is None:
        raise UsageError(
            f"--profile {plan.profile} differs in quantized linears only; leave it out, or say --quantize int4 or int8"
        )
    spec, stages = model.spec, cut(model.spec, plan.pp)
    graphs = [_graph(model, stage, dtype, plan.profile) for stage in stages]
    whole = _signature(spec, dtype) if isinstance(spec.head, LanguageModel) else of_encoder(spec, spec.head)
    each = signatures(whole, spec, dtype, stages, graphs) if len(stages) > 1 else (whole,)
    made = list(zip(places(stages), graphs, each, strict=True))
    return Output(
        files=tuple(graph.file(place) for place, graph, _ in made),
        sidecars={
            **{f"{place}{GRAPH}": graph.serialize(signature) for place, graph, signature in made},
            **(beside(model.checkpoint) if len(stages) == 1 else {}),  # no server writes text with stages
        },
        loads=tuple(_loads(model, dtype, plan)),
        dtype=dtype,
        signature=whole,
        stages=each if len(stages) > 1 else (),
        warnings=tuple(slow_to_load(spec, stages)),
    )


def _graph(model: Model, stage: Stage, dtype: str, profile: Profile) -> Graph:
    spec, graph = model.spec, Graph(DATA)
    graph.tell("max_positions", str(spec.longest))  # of which its inputs say nothing
    for name in canonical_tensors(spec):
        if not stage.holds(name, spec):
            continue
        tensor = model.tensors[name]
        if isinstance(tensor, Encoded):
            quantized.place(graph, name, tensor, dtype, "portable" if name.endswith(WHOLE) else profile)
        else:
            graph.weight(_slot(name, tensor, dtype))
    ropes = dict.fromkeys(mixer.rope for mixer in mixers_of(spec, stage))  # each once: most models have one
    named = {rope: _tables(graph, number, rope, spec) for number, rope in enumerate(rope for rope in ropes if rope)}
    match spec.head:
        case LanguageModel():
            decoder(graph, spec, stage, named, dtype)
        case head:
            encoder(graph, spec, stage, head, named, dtype)
    return graph


def _loads(model: Model, dtype: str, plan: Plan) -> Iterator[str]:
    """Of a quantized model, those that load its linears and the dtype of the rest, in the words of the narrower."""
    linears = model.quantized.encoding.loads[quantized.DIALECT] if model.quantized else LOADED_AS[dtype]
    for engine in ("ONNX Runtime", "TensorRT") if plan.profile == "portable" else ("ONNX Runtime",):
        said = [each for known in (linears, LOADED_AS[dtype]) for each in known if each.startswith(engine)]
        if len(said) == 2:
            yield max(said, key=len)


def _check(dtype: str, plan: Plan) -> None:
    if plan.tp != 1 or plan.ep != 1:
        what = f"tp={plan.tp}" if plan.tp != 1 else f"ep={plan.ep}"
        raise UsageError(
            f"{what} does not exist for ONNX, whose runtimes start no ranks; use {what[:2]} 1, with --pp for stages, "
            "or shard with --to trtllm, or --to llmapi or vllm, which shard while they load"
        )
    if dtype not in LOADED_AS:
        raise UnsupportedInput(
            f"the model is in {dtype}, in which no ONNX graph runs; use --dtype {' or '.join(LOADED_AS)}"
        )


def _slot(name: str, tensor: LazyTensor, dtype: str) -> Slot:
    dtype = "float32" if name.endswith(CHOOSES) else dtype
    transform = "" if tensor.dtype == dtype else f"cast to {dtype}"
    return Slot(name, cast(tensor, dtype), parts=(name,), transform=transform)


def _tables(graph: Graph, number: int, rope: Rope, spec: ModelSpec) -> Tables:
    cosines, sines = tables(rope, spec.max_positions)
    made = "computed from the model's rope"
    return Tables(
        cos=graph.weight(Slot(f"rope.{number}.cos", cosines, parts=(), transform=made)),
        sin=graph.weight(Slot(f"rope.{number}.sin", sines, parts=(), transform=made)),
    )


def _signature(spec: ModelSpec, dtype: str) -> Signature:
    def cache(prefix: str, positions: str) -> tuple[Tensor, ...]:
        return tuple(
            Tensor(
                f"{prefix}.{i}.{state.name}",
                "float32" if state.wide else dtype,
                ("batch", *(positions if size is None else size for size in state.shape)),
            )
            for i, block in enumerate(spec.blocks)
            if block.mixer
            for state in block.mixer.state
        )

    return Signature(
        inputs=(
            Tensor("input_ids", "int64", ("batch", "sequence")),
            Tensor("attention_mask", "int64", ("batch", "total")),
            Tensor("position_ids", "int64", ("batch", "sequence")),
            *cache("past_key_values", "past"),
        ),
        outputs=(
            Tensor("logits", "float32", ("batch", "sequence", spec.vocab_size)),
            *cache("present", "total"),
        ),
    )
