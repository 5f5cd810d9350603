"""What a client may say of how a text is made: names, types and bounds, whatever protocol carried them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from typing import Any, TypeVar

from nemoport.runner.generation.sampling import Sampling
from nemoport.runner.refusal import Refusal

MOST_STOPS, LONGEST_STOP = 16, 256
_MOST = 2**31 - 1
_LARGEST_SEED = 2**64 - 1
_Default = TypeVar("_Default")
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {  # what is not done, with the values that ask for nothing
    "beam_width": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (0, 1),
    "min_p": (0,),
    "min_length": (0,),
    "min_tokens": (0,),
    "bad_words": ("", []),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (0,),
    "return_log_probs": (False,),
    "return_context_logits": (False,),
    "return_generation_logits": (False,),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none",),
    "parallel_tool_calls": (True, False),  # of tools, and there are none
    "suffix": ("",),
}


def check_done(fields: Mapping[str, Any]) -> None:
    """Refuses what would change the text and is not done here."""
    for name, neutral in _NEUTRAL.items():
        if fields.get(name) is not None and not any(_same(fields[name], each) for each in neutral):
            raise Refusal(f"'{name}' is not supported by this server; leave it out")


def _same(value: Any, neutral: Any) -> bool:
    """0 asks for one log probability, False for none."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def sampling(fields: Mapping[str, Any], temperature: float) -> Sampling:
    """`temperature` is what holds where the client says none. Without a seed, chance decides."""
    named = "seed" if fields.get("seed") is not None else "random_seed"
    seed = whole(fields, named, -(2**63), _LARGEST_SEED, None)
    return Sampling(
        temperature=number(fields, "temperature", 0, math.inf, temperature),
        top_k=max(whole(fields, "top_k", -1, _MOST, 0), 0),
        top_p=number(fields, "top_p", 0, 1, 1.0),
        seed=secrets.randbits(64) if seed is None else seed & _LARGEST_SEED,
    )


def max_tokens(fields: Mapping[str, Any], *names: str, default: int | None) -> int | None:
    """Under the first of the names that is there."""
    name = next((name for name in names if fields.get(name) is not None), names[0])
    return whole(fields, name, 1, _MOST, default)


def stop_words(fields: Mapping[str, Any]) -> tuple[str, ...]:
    name = "stop" if fields.get("stop") is not None else "stop_words"
    said = fields.get(name)
    if said is None or said == "":
        return ()
    words = said if isinstance(said, list) else [said]
    if len(words) > MOST_STOPS:
        raise Refusal(f"'{name}' has {len(words)} words, at most {MOST_STOPS} are supported")
    for word in words:
        if not isinstance(word, str) or not 0 < len(word) <= LONGEST_STOP:
            raise Refusal(f"'{name}' must be a string, or a list of them, each of 1 to {LONGEST_STOP} characters")
    return tuple(words)


def truth(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise Refusal(f"'{name}' must be a boolean, not {_shown(value)}")
    return value


def whole(fields: Mapping[str, Any], name: str, low: int, high: int, default: _Default) -> int | _Default:
    value: Any = fields.get(name)
    if value is None:
        return default
    if type(value) is not int or not low <= value <= high:
        raise Refusal(f"'{name}' must be an integer from {low} to {high}, not {_shown(value)}")
    return int(value)


def number(fields: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    value = fields.get(name)
    if value is None:
        return default
    try:
        found = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        found = math.inf
    if not (low <= found <= high and math.isfinite(found)):
        bounds = f"of at least {low}" if math.isinf(high) else f"from {low} to {high}"
        raise Refusal(f"'{name}' must be a number {bounds}, not {_shown(value)}")
    return found


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        return "a number that large"
    return text if len(text) <= 40 else f"{text[:40]}..."
