"""Mixture of experts as nodes of ai.onnx: every expert sees the tokens that chose it, and no others.

A choice is a token and its rank among the token's choices; choices are numbered token * top_k + rank, and there are
tokens * top_k of them. NonZero gives each expert the numbers of its own, which say whom it sees. What the experts make
is put back by number, whole, so that nothing need be added up in place, which not every runtime can.

The work is that of the chosen experts alone, and a step of decoding reads only their weights. The price is a dozen
nodes for each expert of each layer. ONNX Runtime, when it loads them, compares every buffer that a node makes with all
that are free by then, and those of experts never fit: how many tokens each sees is a dimension of its own. So loading
takes quadratic time, 5 to 20 times that of loading without the search (`enable_mem_reuse` of the Python API, which our
runner switches off; Triton has no parameter for it), and finds nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnx import TensorProto

from nemoport.exporters.dtypes import DTYPES
from nemoport.exporters.targets.onnx.feed_forward import feed_forward
from nemoport.exporters.targets.onnx.graph import Graph
from nemoport.exporters.targets.onnx.layers import matmul
from nemoport.exporters.targets.onnx.stages import Stage
from nemoport.spec import Groups, Mixture, ModelSpec, Router

NEVER = -3.0e38
"""The merit of an expert that must not be chosen."""
LOADING = 6e-5
"""Seconds of a processor for each pair of experts in a graph, whatever their size and in however many layers: ONNX
Runtime 1.31 loads 256 in 2 to 4 s, 512 in 11 to 14, 1024 in 63."""
PATIENCE = 120.0
"""Seconds of loading that nobody need be told of."""


def slow_to_load(spec: ModelSpec, stages: tuple[Stage, ...]) -> Iterator[str]:
    """A warning, where loading all stages takes longer than anybody expects."""
    mixtures = [block.ffn.experts if isinstance(block.ffn, Mixture) else 0 for block in spec.blocks]
    counts = [sum(mixtures[stage.layers.start : stage.layers.stop]) for stage in stages]
    if (seconds := LOADING * sum(count**2 for count in counts)) > PATIENCE:
        yield (
            f"ONNX Runtime will need about {seconds / 60:.0f} minutes of a processor to load this model: its time "
            f"grows with the square of the experts in a graph, and all layers together have {sum(counts):,}; cut it "
            f"into {'more ' if len(stages) > 1 else ''}stages (--pp N takes an N-th), or use --to trtllm, vllm or "
            "llmapi"
        )


def mixture(graph: Graph, mixed: Mixture, name: str, x: str, dtype: str) -> str:
    """x [batch, sequence, hidden] to the same shape."""
    tokens = graph.add("Flatten", f"{name}.tokens", x, axis=2)
    chosen, shares = _route(graph, mixed.router, f"{name}.router", tokens, mixed.experts)
    out = _experts(graph, mixed, name, tokens, chosen, shares, dtype)
    if mixed.shared:
        always = feed_forward(graph, mixed.shared, f"{name}.shared", tokens, dtype)
        if mixed.shared_gate:
            gate = matmul(graph, f"{name}.shared_gate", tokens, f"{name}.shared_gate.weight")
            gate = graph.add("Sigmoid", f"{name}.shared_gate.sigmoid", gate)
            always = graph.add("Mul", f"{name}.shared.gated_output", always, gate)
        out = graph.add("Add", f"{name}.with_shared", out, always)
    shape = graph.add("Shape", f"{name}.shape", x)
    return graph.add("Reshape", f"{name}.output", out, shape)


def _experts(graph: Graph, mixed: Mixture, name: str, tokens: str, chosen: str, shares: str, dtype: str) -> str:
    """[tokens, hidden]: the sum of what the chosen experts make, each by its share."""
    top_k = mixed.router.top_k
    experts = graph.add("Reshape", f"{name}.choices", chosen, graph.constant(-1))
    numbers: list[str] = []
    made: list[str] = []
    for expert in range(mixed.experts):
        its = f"{name}.experts.{expert}"
        asked = graph.add("Equal", f"{its}.asked", experts, graph.scalar(expert))
        numbers.append(graph.add("NonZero", f"{its}.choices", asked))
        rows = graph.add("Div", f"{its}.rows", numbers[-1], graph.scalar(top_k))
        seen = graph.add("Gather", f"{its}.tokens", tokens, rows, axis=0)  # [1, its tokens, hidden]
        made.append(feed_forward(graph, mixed.expert, its, seen, dtype))
    order = graph.add("Concat", f"{name}.numbers", *numbers, axis=1)
    order = graph.add("Transpose", f"{name}.order", order, perm=[1, 0])
    outputs = graph.add("Concat", f"{name}.made", *made, axis=1)
    outputs = graph.add("Squeeze", f"{name}.made_by_expert", outputs, graph.constant(0))
    outputs = graph.add("ScatterND", f"{name}.made_by_choice", outputs, order, outputs)
    outputs = graph.add("Unsqueeze", f"{name}.made_at_once", outputs, graph.constant(0))
    outputs = graph.add("Reshape", f"{name}.made_by_token", outputs, graph.constant(-1, top_k, 0))
    weights = graph.add("Unsqueeze", f"{name}.shares", shares, graph.constant(-1))
    weights = graph.add("Cast", f"{name}.shares_cast", weights, to=DTYPES[dtype].onnx)
    weighted = graph.add("Mul", f"{name}.weighted", outputs, weights)
    return graph.add("ReduceSum", f"{name}.mixed", weighted, graph.constant(1), keepdims=0)


def _route(graph: Graph, router: Router, name: str, tokens: str, experts: int) -> tuple[str, str]:
    """The chosen experts and their shares, [tokens, top_k]; scores in float32 whatever the dtype."""
    logits = matmul(graph, f"{name}.product", tokens, f"{name}.weight")
    if router.bias:
        logits = graph.add("Add", f"{name}.logits", logits, f"{name}.bias")
    logits = graph.add("Cast", f"{name}.float32", logits, to=TensorProto.FLOAT)
    if router.score == "sigmoid":
        scores = graph.add("Sigmoid", f"{name}.scores", logits)
    else:
        scores = graph.add("Softmax", f"{name}.scores", logits, axis=-1)
    merits = scores
    if router.expert_bias:
        merits = graph.add("Add", f"{name}.merits", merits, f"{name}.expert_bias")
    if router.groups:
        merits = _eligible(graph, router.groups, name, merits, experts)
    _, chosen = graph.top(f"{name}.chosen", merits, router.top_k)
    shares = graph.add("GatherElements", f"{name}.shares", scores, chosen, axis=-1)
    if router.normalized:
        total = graph.add("ReduceSum", f"{name}.total", shares, graph.constant(-1), keepdims=1)
        shares = graph.add("Div", f"{name}.normalized", shares, total)
    if router.scale != 1.0:
        shares = graph.add("Mul", f"{name}.scaled", shares, graph.number(router.scale, "float32"))
    return chosen, shares


def _eligible(graph: Graph, groups: Groups, name: str, merits: str, experts: int) -> str:
    """Merits as they are in the best groups, and lower than any elsewhere."""
    size = experts // groups.count
    grouped = graph.add("Reshape", f"{name}.groups", merits, graph.constant(-1, groups.count, size))
    best, _ = graph.top(f"{name}.groups.best", grouped, groups.best)
    totals = graph.add("ReduceSum", f"{name}.groups.merits", best, graph.constant(-1), keepdims=0)
    _, chosen = graph.top(f"{name}.groups.chosen", totals, groups.top)
    chosen = graph.add("Unsqueeze", f"{name}.groups.each", chosen, graph.constant(1))  # [tokens, 1, top]
    every = graph.integers(f"groups.{groups.count}", range(groups.count), (groups.count, 1))
    same = graph.add("Equal", f"{name}.groups.same", chosen, every)  # [tokens, count, top]
    same = graph.add("Cast", f"{name}.groups.same_float", same, to=TensorProto.FLOAT)
    among = graph.add("ReduceMax", f"{name}.groups.among", same, graph.constant(-1), keepdims=1)
    among = graph.add("Cast", f"{name}.groups.eligible", among, to=TensorProto.BOOL)  # [tokens, count, 1]
    kept = graph.add("Where", f"{name}.groups.kept", among, grouped, graph.number(NEVER, "float32"))
    return graph.add("Reshape", f"{name}.groups.flat", kept, graph.constant(-1, experts))
