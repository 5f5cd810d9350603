"""What each token goes through by itself: the second half of a block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from nemoport.spec.axes import Axis, Tensors, below
from nemoport.spec.plan import Plan

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu2"]
"""`gelu` is x * Phi(x) (arXiv:1606.08415), `gelu_tanh` its approximation by tanh, `quick_gelu` the one by
x * sigmoid(1.702 x); `relu2` is relu(x) squared (arXiv:2109.08668)."""
Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Feed-forward: down(act(gate(x)) * up(x)) (gated, arXiv:2002.05202) or down(act(up(x))). A gated one may be
    clamped: gate(x) is at most `limit`, up(x) within -limit and limit; and `up_offset` is added to the latter."""

    intermediate: int
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    limit: float | None = None
    up_offset: float = 0.0

    def tensors(self, hidden: Axis) -> Tensors:
        ffn = Axis("ffn", self.intermediate, self.intermediate)
        named: Tensors = {"gate.weight": (ffn, hidden)} if self.gated else {}
        named |= {"up.weight": (ffn, hidden), "down.weight": (hidden, ffn)}
        if self.bias:
            named |= {"gate.bias": (ffn,)} if self.gated else {}
            named |= {"up.bias": (ffn,), "down.bias": (hidden,)}
        return named

    def share(self, plan: Plan, position: int) -> Dense:
        return replace(self, intermediate=self.intermediate // plan.tp)


@dataclass(frozen=True)
class Groups:
    """Experts stand in `count` equal groups, and only those of the `top` best groups may be chosen. A group is as good
    as the sum of its `best` highest scores: one in DeepSeek V2 (arXiv:2405.04434), two in V3 (arXiv:2412.19437)."""

    count: int
    top: int
    best: int


@dataclass(frozen=True, kw_only=True)
class Router:
    """Scores of a token are softmax or sigmoid of weight x (+ bias). The `top_k` experts with the highest are chosen,
    and what they add is multiplied with their scores; `normalized`: divided by the sum of those chosen; and with
    `scale`. A softmax over the chosen alone is a normalized one over all.

    `expert_bias` is added to the scores while experts are chosen, and only then (arXiv:2408.15664)."""

    top_k: int
    score: Score = "softmax"
    normalized: bool = True
    scale: float = 1.0
    bias: bool = False
    expert_bias: bool = False
    groups: Groups | None = None

    def tensors(self, experts: Axis, hidden: Axis) -> Tensors:
        named: Tensors = {"weight": (experts, hidden)}
        named |= {"bias": (experts,)} if self.bias else {}
        return named | ({"expert_bias": (experts,)} if self.expert_bias else {})


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Mixture of experts (arXiv:1701.06538): the chosen experts' outputs by their scores, plus what the `shared` one
    adds, which sees every token; `shared_gate`: multiplied with sigmoid(shared_gate x)."""

    experts: int
    expert: Dense
    router: Router
    shared: Dense | None = None
    shared_gate: bool = False
    held: tuple[int, int] | None = None
    """Of a rank: the first of its experts, and the one after its last. None: it has all."""

    @property
    def local(self) -> range:
        """The experts at hand, numbered as in the whole model."""
        return range(*(self.held or (0, self.experts)))

    def tensors(self, hidden: Axis) -> Tensors:
        experts = Axis("experts", self.experts, self.experts)
        named = below("router.", self.router.tensors(experts, hidden))
        each = self.expert.tensors(hidden)
        for expert in self.local:
            named |= below(f"experts.{expert}.", each)
        if self.shared:
            named |= below("shared.", self.shared.tensors(hidden))
        if self.shared_gate:
            named |= {"shared_gate.weight": (Axis("gate", 1, 1), hidden)}
        return named

    def share(self, plan: Plan, position: int) -> Mixture:
        """Expert ranks count first among the ranks of a stage: position = cut of each expert * ep + expert rank."""
        count = self.experts // plan.ep
        first = position % plan.ep * count
        return replace(
            self,
            held=(first, first + count),
            expert=replace(self.expert, intermediate=self.expert.intermediate // plan.expert_tp),
            shared=self.shared and self.shared.share(plan, position),
        )


FeedForward = Dense | Mixture
