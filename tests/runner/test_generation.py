"""Continuous batching: a text is the same whoever else is in the batch, and everybody comes to an end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from nemoport.runner.generation.chat import ChatTemplate
from nemoport.runner.generation.engine import Continuation, Engine, Limits, Reason
from nemoport.runner.generation.measured import Measured
from nemoport.runner.generation.sampling import Sampling, choose
from nemoport.runner.generation.texts import Cut, Generator
from nemoport.runner.generation.tokenizing import Speech
from nemoport.runner.model import ModelVersion, load_version
from nemoport.runner.refusal import Code, Refusal

KINDS = ("onnx", "hf", "trtllm")
BEGINNINGS = ("The clever fox ", "One snowy evening ", "There was once a ", "T", "Once a wise owl named Olive")
SECONDS = 60
ROOMY = Limits(sequences=64, positions=64 * 256)


@pytest.fixture(scope="module")
def generators(fables: Path) -> Iterator[Callable[[str], Generator]]:
    found: dict[str, ModelVersion] = {}

    def of(kind: str) -> Generator:
        if kind not in found:
            found[kind] = load_version(fables / kind, "1")
        generator = found[kind].generator
        assert generator is not None
        return generator

    yield of
    for version in found.values():
        version.close()


@pytest.fixture(params=KINDS)
def generator(request: pytest.FixtureRequest, generators: Callable[[str], Generator]) -> Generator:
    return generators(request.param)


@pytest.fixture
def onnx(generators: Callable[[str], Generator]) -> Generator:
    return generators("onnx")


@dataclass
class Heard:
    """A continuation as the one who asked for it hears it."""

    who: Continuation
    tokens: list[int] = field(default_factory=list)
    ended: list[Reason | Refusal] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> Reason | Refusal:
        assert self.over.wait(SECONDS), "it never ended"
        (end,) = self.ended
        return end


def ask(
    engine: Engine,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (frozen)
    deadline: int | None = None,
    hear: Callable[[int], bool] = lambda token: True,
) -> Heard:
    def listen(token: int) -> bool:
        heard.tokens.append(token)
        return hear(token)

    def end(why: Reason | Refusal) -> None:
        heard.ended.append(why)
        heard.over.set()

    who = Continuation(
        prompt=tuple(prompt),
        max_tokens=max_tokens,
        sampling=sampling,
        ends=frozenset(),
        hear=listen,
        end=end,
        deadline=deadline,
    )
    heard = Heard(who)
    engine.submit(who)
    return heard


def told(begun: threading.Event) -> Callable[[int], bool]:
    def hear(token: int) -> bool:
        begun.set()
        return True

    return hear


def streams(generator: Generator, count: int, longest: int) -> list[tuple[tuple[int, ...], int, Sampling]]:
    """Prompts and lengths all different, half of them sampled."""
    return [
        (
            generator.tokenizer.encode(BEGINNINGS[at % len(BEGINNINGS)] + "ab" * (at // len(BEGINNINGS))),
            3 + 5 * at % longest,
            Sampling(temperature=0.8 * (at % 2), top_k=20 * (at % 3), top_p=0.95, seed=at),
        )
        for at in range(count)
    ]


def one_at_a_time(engine: Engine, asked: list[tuple[tuple[int, ...], int, Sampling]]) -> list[list[int]]:
    texts = []
    for stream in asked:
        heard = ask(engine, *stream)
        assert heard.wait() is Reason.LENGTH
        texts.append(heard.tokens)
    return texts


class Watched:
    """An executor that says what was asked of it, and holds that it is never more than the limits."""

    def __init__(self, executor: Any, limits: Limits) -> None:
        self._executor, self._limits = executor, limits
        self.vocab_size, self.max_positions = executor.vocab_size, executor.max_positions
        self.position_bytes = executor.position_bytes
        self.kept, self.joined = executor.kept, executor.joined
        self.rows = list[int]()
        self.before: Callable[[], None] = lambda: None

    def prefill(self, tokens: Sequence[int], state: Any) -> Any:
        self.before()
        return self._executor.prefill(tokens, state)

    def step(self, tokens: Sequence[int], state: Any) -> Any:
        self.before()
        logits, after = self._executor.step(tokens, state)
        self.rows.append(len(tokens))
        assert len(tokens) <= self._limits.sequences
        assert len(tokens) * after.width <= max(self._limits.positions, after.width)
        return logits, after


def engine_of(generator: Generator, limits: Limits) -> tuple[Engine, Watched, Measured]:
    watched, measured = Watched(generator.engine.executor, limits), Measured()
    return Engine("fables", watched, limits, measured), watched, measured


@pytest.mark.parametrize(
    "kind, count, longest, limits",
    [
        ("onnx", 32, 61, ROOMY),
        ("onnx", 32, 61, Limits(sequences=5, positions=5 * 256)),
        ("onnx", 32, 61, Limits(sequences=32, positions=900)),
        ("hf", 32, 41, Limits(sequences=32, positions=400)),
        ("trtllm", 9, 13, Limits(sequences=4, positions=4 * 256)),
    ],
    ids=["onnx", "onnx, few rows", "onnx, few positions", "hf, few positions", "trtllm, few rows"],
)
def test_streams_together_give_token_for_token_the_text_of_one_at_a_time(
    generators: Callable[[str], Generator], kind: str, count: int, longest: int, limits: Limits
) -> None:
    generator = generators(kind)
    asked = streams(generator, count, longest)
    alone, _, _ = engine_of(generator, ROOMY)
    engine, watched, measured = engine_of(generator, limits)
    heard = [ask(engine, *stream) for stream in asked]
    assert {each.wait() for each in heard} == {Reason.LENGTH}
    assert [each.tokens for each in heard] == one_at_a_time(alone, asked)
    assert max(watched.rows) > 2
    assert (measured.preemptions > 0) == (limits.positions in (400, 900))
    assert measured.requests == count
    assert measured.tokens == sum(length for _, length, _ in asked)
    for each in (alone, engine):
        each.close()


def test_greedy_text_is_that_of_transformers(generator: Generator, fables: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(fables / "hf/1", dtype=torch.float32)
    for beginning in BEGINNINGS[:3]:
        prompt = generator.tokenizer.encode(beginning)
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=25, do_sample=False, eos_token_id=None)
        heard = ask(generator.engine, prompt, 25)
        heard.wait()
        assert heard.tokens == wanted[0, len(prompt) :].tolist()


def test_a_prompt_in_chunks_is_the_prompt_at_once(generator: Generator) -> None:
    executor = generator.engine.executor
    prompt = generator.tokenizer.encode("The clever fox Rufus loved grapes.")
    whole, _ = executor.prefill(prompt, None)
    state = None
    for start in range(0, len(prompt), 7):
        parts, state = executor.prefill(prompt[start : start + 7], state)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4)


def test_rows_that_join_and_leave_do_not_change_the_others(generator: Generator) -> None:
    executor = generator.engine.executor
    prompts = [generator.tokenizer.encode(beginning) for beginning in BEGINNINGS]
    states = [executor.prefill(prompt, None)[1] for prompt in prompts]
    batch = executor.kept(executor.joined([executor.joined(states[:2]), *states[2:]]), [4, 0, 3])
    narrow = executor.kept(executor.step([65, 66, 67], batch)[1], [2])
    logits, _ = executor.step([68], narrow)
    wanted, _ = executor.prefill((*prompts[3], 67, 68), None)
    np.testing.assert_allclose(logits[0], wanted, rtol=1e-4, atol=1e-4)


def test_who_is_cancelled_leaves_its_row_to_the_next(onnx: Generator) -> None:
    engine, watched, _ = engine_of(onnx, Limits(sequences=1, positions=256))
    begun = threading.Event()
    watched.before = lambda: time.sleep(0.002)
    first = ask(engine, [84], 250, hear=told(begun))
    second = ask(engine, [84], 3)
    never = ask(engine, [84], 250)
    assert begun.wait(SECONDS)
    first.who.cancel()
    never.who.cancel()
    assert second.wait() is Reason.LENGTH
    for each in (first, never):
        end = each.wait()
        assert isinstance(end, Refusal)
        assert end.code is Code.CANCELLED
    assert len(first.tokens) < 250
    assert not never.tokens
    engine.close()


def test_who_waits_too_long_and_who_finds_the_queue_full_is_refused(onnx: Generator) -> None:
    engine, watched, _ = engine_of(onnx, Limits(sequences=1, positions=256, waiting=2))
    begun = threading.Event()
    watched.before = lambda: time.sleep(0.002)
    first = ask(engine, [84], 100, hear=told(begun))
    assert begun.wait(SECONDS)
    late, patient = ask(engine, [84], 3, deadline=time.monotonic_ns()), ask(engine, [84], 3)
    with pytest.raises(Refusal, match="Exceeds maximum queue size") as full:
        [ask(engine, [84], 3) for _ in range(3)]
    assert full.value.code is Code.UNAVAILABLE
    end = late.wait()
    assert isinstance(end, Refusal)
    assert end.code is Code.UNAVAILABLE
    assert first.wait() is patient.wait() is Reason.LENGTH
    engine.close()


@pytest.mark.parametrize("what", ["raises", "answers no numbers"])
def test_a_model_that_fails_fails_its_requests_and_not_the_next(onnx: Generator, what: str) -> None:
    engine, watched, _ = engine_of(onnx, Limits(sequences=8, positions=2048))
    works, steps = watched.step, list[int]()

    def step(tokens: Sequence[int], state: Any) -> tuple[NDArray[np.float32], Any]:
        steps.append(len(tokens))
        if len(steps) != 4:
            return works(tokens, state)  # type: ignore[no-any-return]
        if what == "raises":
            raise RuntimeError("out of luck")
        return np.full((len(tokens), 259), np.nan, np.float32), state

    watched.step = step  # type: ignore[method-assign]
    end = ask(engine, [84], 20).wait()
    assert isinstance(end, Refusal)
    assert end.code is Code.INTERNAL
    assert ask(engine, [84], 5).wait() is Reason.LENGTH
    engine.close()


def test_a_listener_that_fails_fails_alone(onnx: Generator) -> None:
    engine, _, _ = engine_of(onnx, Limits(sequences=8, positions=2048))

    said = list[int]()

    def deaf(token: int) -> bool:
        said.append(token)
        if len(said) == 3:
            raise ValueError("cannot hear")
        return True

    others = [ask(engine, [84], length) for length in (3, 9)]
    bad = ask(engine, [84], 20, hear=deaf)
    others += [ask(engine, [84], length) for length in (3, 9)]
    end = bad.wait()
    assert isinstance(end, Refusal)
    assert end.code is Code.INTERNAL
    assert {each.wait() for each in others} == {Reason.LENGTH}
    engine.close()


def test_a_closed_engine_finishes_what_it_has_and_takes_no_more(onnx: Generator) -> None:
    engine, _, _ = engine_of(onnx, Limits(sequences=1, positions=256))
    heard = [ask(engine, [84], 10) for _ in range(3)]
    engine.close()
    with pytest.raises(Refusal, match="being unloaded"):
        ask(engine, [84], 1)
    assert {each.wait() for each in heard} == {Reason.LENGTH}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(temperature=1.3, top_k=9),
        Sampling(temperature=1.0, top_p=0.8),
        Sampling(temperature=0.9, top_k=12, top_p=0.6),
        Sampling(temperature=1.0, top_k=500, top_p=1.0),
    ],
    ids=str,
)
def test_tokens_are_drawn_by_the_shares_that_transformers_gives_them(sampling: Sampling) -> None:
    logits = np.random.default_rng(0).standard_normal(31).astype(np.float32) * 2
    scores = torch.from_numpy(logits)[None]
    warpers = [transformers.TemperatureLogitsWarper(sampling.temperature)]
    warpers += [transformers.TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [transformers.TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    for warper in warpers:
        scores = warper(None, scores)
    shares = scores.softmax(-1)[0].numpy()
    draws = 20000
    found = np.bincount([choose(logits, sampling, step) for step in range(draws)], minlength=31) / draws
    assert not found[shares == 0].any()
    np.testing.assert_allclose(found, shares, atol=5 * np.sqrt(0.25 / draws))


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-9])
def test_hardly_any_temperature_is_the_likeliest(temperature: float) -> None:
    logits = np.array([0.0, 3.0, 2.9, -1e30], np.float32)
    assert {choose(logits, Sampling(temperature=temperature, seed=seed), 0) for seed in range(50)} == {1}


@pytest.mark.parametrize("temperature", [1e300, 1.7e308])
def test_any_heat_draws_a_token(temperature: float) -> None:
    logits = np.array([0.0, 3.0e38, -3.0e38], np.float32)
    assert {choose(logits, Sampling(temperature=temperature, seed=seed), 0) for seed in range(99)} == {0, 1, 2}


def test_characters_come_whole_and_nothing_is_lost(onnx: Generator) -> None:
    text = "Füchse 🦊 und 狐狸 — ﷽ " * 9
    tokens = onnx.tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    speech = Speech(onnx.tokenizer)
    pieces = [speech.add(token) for token in tokens]
    assert "".join(pieces) + speech.rest() == text
    assert all(len(piece.encode()) in (0, 1, 2, 3, 4) for piece in pieces)
    cut = Speech(onnx.tokenizer)
    assert "".join(cut.add(token) for token in tokens[:2]) + cut.rest() == "F\ufffd"


@pytest.mark.parametrize("words", [("net",), ("a net", "cat"), ("in a",), ("nowhere", "aaab"), (". S", "t. "), ()])
def test_text_ends_before_the_first_stop_word_however_it_is_cut(words: tuple[str, ...]) -> None:
    text = "She found a cat named Ada in a net. aaaaab She"
    ends = [at for word in words if (at := text.find(word)) >= 0]
    for size in range(1, 9):
        cut, said = Cut(words), ""
        for start in range(0, len(text), size):
            new, over = cut.add(text[start : start + size])
            said += new
            if over:
                break
        assert over == bool(ends)
        assert said + cut.rest() == text[: min(ends, default=len(text))]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].content.format.__globals__ }}{{ raise_exception('no') }}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ messages[0].nothing.more }}",
    ],
)
def test_a_chat_template_reaches_nothing_outside_and_its_failures_are_refusals(source: str) -> None:
    with pytest.raises(Refusal, match="chat template"):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])
