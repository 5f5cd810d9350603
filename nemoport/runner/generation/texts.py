"""From tokens of a prompt to pieces of text: what a model offers whose directory holds a tokenizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nemoport.runner.generation.engine import Continuation, Engine, Reason
from nemoport.runner.generation.measured import Measured
from nemoport.runner.generation.sampling import Sampling
from nemoport.runner.generation.tokenizing import Speech, Tokenizer
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.statistics import Statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    prompt: tuple[int, ...]
    max_tokens: int | None
    """None is all that the context has room for."""
    sampling: Sampling = Sampling()  # noqa: RUF009  (frozen)
    stop: tuple[str, ...] = ()
    """The text ends before the first of these words."""
    ignore_eos: bool = False
    timeout_us: int = 0
    """It is refused when it has no place in the batch by then; 0 waits."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that is new; the last has the reason, and may have no text. `tokens` counts those made so far."""

    text: str
    tokens: int
    reason: Reason | None = None


Deliver = Callable[[Piece | Refusal], None]


@dataclass(frozen=True)
class Generator:
    name: str
    tokenizer: Tokenizer
    engine: Engine
    measured: Measured
    vocab_size: int
    statistics: Statistics = field(default_factory=Statistics)
    """Of the model, whose requests may be for text or for tensors."""

    def submit(self, request: TextRequest, deliver: Deliver, left: Callable[[], bool] = lambda: False) -> Continuation:
        """Refuses what does not fit; `deliver` is called later, from another thread, as is `left`, which says whether
        nobody listens any more."""
        longest = self._longest(request)
        telling = Telling(self.tokenizer, request.stop, deliver)
        who = Continuation(
            prompt=request.prompt,
            max_tokens=longest,
            sampling=request.sampling,
            ends=frozenset() if request.ignore_eos else self.tokenizer.ends,
            hear=telling.hear,
            end=telling.end,
            left=left,
            deadline=time.monotonic_ns() + request.timeout_us * 1000 if request.timeout_us else None,
        )
        self.engine.submit(who)
        return who

    def close(self) -> None:
        """Texts under way are finished, others are refused."""
        self.engine.close()

    def _longest(self, request: TextRequest) -> int:
        """How many tokens may be made."""
        prompt, context = len(request.prompt), self.engine.capacity
        if not prompt:
            raise Refusal(f"the prompt has no tokens, and model '{self.name}' needs at least one")
        if outside := next((token for token in request.prompt if not 0 <= token < self.vocab_size), None):
            raise Refusal(f"token {outside} of the prompt is outside of the vocabulary of {self.vocab_size}")
        if prompt >= context or (request.max_tokens or 0) > context - prompt:
            asked = f" and {request.max_tokens} more are asked for" if request.max_tokens else ""
            raise Refusal(
                f"this model's maximum context length is {context} tokens, but the prompt has {prompt}{asked}; "
                "shorten the prompt or lower max_tokens"
            )
        return context - prompt if request.max_tokens is None else request.max_tokens


class Telling:
    """Hears the tokens of one text, and delivers what can be said of it."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], deliver: Deliver) -> None:
        self._speech, self._cut, self._deliver = Speech(tokenizer), Cut(stop), deliver
        self._tokens = 0

    def hear(self, token: int) -> bool:
        self._tokens += 1
        text, over = self._cut.add(self._speech.add(token))
        if text:
            self._deliver(Piece(text, self._tokens))
        return not over

    def end(self, why: Reason | Refusal) -> None:
        if isinstance(why, Refusal):
            self._deliver(why)
            return
        text, over = self._cut.add(self._speech.rest())
        rest = "" if over else self._cut.rest()
        self._deliver(Piece(text + rest, self._tokens, Reason.STOP if over else why))


class Cut:
    """Text up to the first stop word. What may be the beginning of one is held back until it is clear."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words, self._held, self._over = words, "", False

    def add(self, text: str) -> tuple[str, bool]:
        """What can be said now, and whether a stop word has come."""
        held = self._held + text
        found = min((at for word in self._words if (at := held.find(word)) >= 0), default=-1)
        self._over = self._over or found >= 0
        clear = found if found >= 0 else len(held) - self._unclear(held)
        self._held = "" if self._over else held[clear:]
        return held[:clear], self._over

    def rest(self) -> str:
        return self._held

    def _unclear(self, text: str) -> int:
        """The longest end of the text with which a stop word begins."""
        return max(
            (
                size
                for word in self._words
                for size in range(1, min(len(word) - 1, len(text)) + 1)
                if text.endswith(word[:size])
            ),
            default=0,
        )


def unavailable(name: str) -> Refusal:
    return Refusal(
        f"model '{name}' does not generate text: it is no decoder with a tokenizer beside it", Code.INVALID_ARG
    )
