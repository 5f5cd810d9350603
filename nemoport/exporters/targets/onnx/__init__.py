"""One ONNX graph for prompt and decoding, with a KV cache and weights as external data: for ONNX Runtime and TensorRT.

    inputs     input_ids, position_ids [batch, sequence]    attention_mask [batch, total], total = past + sequence
               past_key_values.{i}.{state} [batch, heads, past, size], past may be 0
    outputs    logits [batch, sequence, vocab], float32     present.{i}.{state} [batch, heads, total, size]

States are those that a layer's mixer declares: `key` and `value` of its KV heads; of latent attention one `latent`, as
of one head, its last elements the rotated key; of Mamba `conv` [batch, channels, kernel - 1] and `ssm` [batch, heads,
head_dim, state_dims], float32, which do not grow and are zero at first. The others have the dtype of the weights.
Logits are float32 always, which every client can read. Position ids must be below the model's `max_positions`, those of
padding too. What answers a text at once has another graph (`encoder.py`).
"""

from __future__ import annotations

from nemoport.artifact import Signature, Tensor
from nemoport.errors import UnsupportedInput, UsageError
from nemoport.exporters.checkpoint import Model, Output, Slot
from nemoport.exporters.encoding import Encoded
from nemoport.exporters.targets.onnx import quantized
from nemoport.exporters.targets.onnx.decoder import decoder
from nemoport.exporters.targets.onnx.encoder import encoder
from nemoport.exporters.targets.onnx.encoder import signature as encoder_signature
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.exporters.targets.onnx.latent import WHOLE
from nemoport.exporters.targets.onnx.layers import Tables
from nemoport.exporters.targets.onnx.rope import tables
from nemoport.exporters.targets.onnx.text import beside
from nemoport.exporters.tensor import LazyTensor, cast
from nemoport.spec import LanguageModel, ModelSpec, Plan, Rope
from nemoport.spec import tensors as canonical_tensors

CHOOSES = ".router.expert_bias"
"""Its small steps decide between experts; 16 bits would round them away."""
DIALECTS = (quantized.DIALECT,)
"""In which quantized weights are written."""
GRAPH, DATA = "model.onnx", "model.onnx.data"

LOADS = {
    "float32": ("ONNX Runtime 1.23 or later", "TensorRT 10.15 or later"),
    "float16": ("ONNX Runtime 1.23 or later", "TensorRT 10.15 or later"),
    "bfloat16": ("ONNX Runtime 1.31 or later on CUDA", "TensorRT 10.15 or later"),
}
"""Opset 23 came with ONNX Runtime 1.23; on CPUs it has no bfloat16."""


def output(model: Model, plan: Plan) -> Output:
    dtype = plan.dtype or model.dtype
    _check(dtype, plan)
    if plan.profile != "portable" and model.quantized is None:
        raise UsageError(
            f"--profile {plan.profile} differs in quantized linears only; leave it out, or say --quantize int4 or int8"
        )
    spec, graph = model.spec, Graph(DATA)
    graph.tell("max_positions", str(spec.longest))  # of which its inputs say nothing
    for name in canonical_tensors(spec):
        tensor = model.tensors[name]
        if isinstance(tensor, Encoded):
            quantized.place(graph, name, tensor, dtype, "portable" if name.endswith(WHOLE) else plan.profile)
        else:
            graph.weight(_slot(name, tensor, dtype))
    named = {rope: _tables(graph, number, rope, spec) for number, rope in enumerate(_ropes(spec))}
    match spec.head:
        case LanguageModel():
            decoder(graph, spec, named, dtype)
            signature = _signature(spec, dtype)
        case head:
            encoder(graph, spec, head, named, dtype)
            signature = encoder_signature(spec, head)
    return Output(
        files=(graph.file(),),
        sidecars={GRAPH: graph.serialize(signature), **beside(model.checkpoint)},
        loads=tuple(each for each in LOADS[dtype] if plan.profile == "portable" or each.startswith("ONNX Runtime")),
        dtype=dtype,
        signature=signature,
    )


def _check(dtype: str, plan: Plan) -> None:
    if plan.tp != 1 or plan.ep != 1:
        what = f"tp={plan.tp}" if plan.tp != 1 else f"ep={plan.ep}"
        raise UsageError(
            f"{what} does not exist for ONNX, whose runtimes load one whole graph; use {what[:2]} 1, or shard with "
            "--to trtllm, or with --to hf and let vLLM shard while it loads"
        )
    if plan.pp != 1:
        raise UnsupportedInput(f"pp={plan.pp} is not yet written for ONNX, which comes as one graph; use pp 1")
    if dtype not in LOADS:
        raise UnsupportedInput(
            f"the model is in {dtype}, in which no ONNX graph runs; use --dtype {' or '.join(LOADS)}"
        )


def _slot(name: str, tensor: LazyTensor, dtype: str) -> Slot:
    dtype = "float32" if name.endswith(CHOOSES) else dtype
    transform = "" if tensor.dtype == dtype else f"cast to {dtype}"
    return Slot(name, cast(tensor, dtype), parts=(name,), transform=transform)


def _ropes(spec: ModelSpec) -> list[Rope]:
    """Each distinct rope once: most models have one."""
    return [rope for rope in dict.fromkeys(mixer.rope for mixer in spec.mixers) if rope]


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
