"""Whether a plan divides a model."""

from __future__ import annotations

from nemoport.errors import UsageError
from nemoport.spec.feed_forward import Dense, FeedForward, Mixture
from nemoport.spec.model import ModelSpec
from nemoport.spec.plan import Plan


def check_divisible(spec: ModelSpec, plan: Plan) -> None:
    """Refuse, before anything is read, a plan that does not divide the model."""
    if (layers := len(spec.blocks)) % plan.pp:
        raise UsageError(f"{layers} layers do not divide over pp={plan.pp}; use pp {_divisors(layers)}")
    for mixer in dict.fromkeys(spec.mixers):
        heads, kv_heads = mixer.heads, mixer.kv_heads
        if heads % plan.tp:
            raise UsageError(f"{heads} heads do not divide over tp={plan.tp}; use tp {_divisors(heads)}")
        if kv_heads % plan.tp and plan.tp % kv_heads:
            fit = [tp for tp in range(1, heads + 1) if heads % tp == 0 and not (kv_heads % tp and tp % kv_heads)]
            raise UsageError(
                f"{kv_heads} KV heads neither divide over tp={plan.tp} nor repeat to it; use tp {_either(fit)}"
            )
    if plan.tp % plan.ep:
        raise UsageError(f"tp={plan.tp} does not divide over ep={plan.ep}; use ep {_divisors(plan.tp)}")
    feeding = dict.fromkeys(block.ffn for block in spec.blocks if block.ffn)
    if plan.ep > 1 and not any(isinstance(ffn, Mixture) for ffn in feeding):
        raise UsageError(f"ep={plan.ep} was asked for a model without experts; use ep 1")
    for ffn in feeding:
        if isinstance(ffn, Mixture):
            _check_experts(ffn, plan)
        width = _width(ffn)
        if width % plan.tp:
            shared = [*(mixer.heads for mixer in spec.mixers), width]
            fit = [tp for tp in range(1, min(shared) + 1) if not any(size % tp for size in shared)]
            raise UsageError(f"feed-forward size {width} does not divide over tp={plan.tp}; use tp {_either(fit)}")


def _check_experts(mixture: Mixture, plan: Plan) -> None:
    if (count := mixture.experts) % plan.ep:
        raise UsageError(f"{count} experts do not divide over ep={plan.ep}; use ep {_divisors(count)}")
    if (width := mixture.expert.intermediate) % plan.expert_tp:
        raise UsageError(
            f"experts of size {width} do not divide over the {plan.expert_tp} ranks that tp={plan.tp} and "
            f"ep={plan.ep} leave for each; use a tp / ep of {_divisors(width)}"
        )


def _width(ffn: FeedForward) -> int:
    """What tensor parallelism cuts, of experts that of the shared one."""
    if isinstance(ffn, Dense):
        return ffn.intermediate
    return ffn.shared.intermediate if ffn.shared else 0


def _divisors(number: int) -> str:
    return _either([candidate for candidate in range(1, number + 1) if number % candidate == 0])


def _either(numbers: list[int]) -> str:
    words = [str(number) for number in numbers]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
