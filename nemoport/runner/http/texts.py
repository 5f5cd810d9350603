"""The generate extension for models that make text, with the words of Triton's vLLM and TensorRT-LLM backends.

    {"text_input": "The fox ", "max_tokens": 3, "stream": true, "parameters": {"temperature": 0.7, "seed": 1}}
    ->  data: {"model_name": "m", "model_version": "1", "text_output": "Vera"}

Parameters may stand at the top or under `parameters`. Without temperature, top_k and top_p the likeliest token is
taken, as TensorRT-LLM's backend does; the prompt is part of the answer when `exclude_input_in_output` is false.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from nemoport.runner.generation import parameters
from nemoport.runner.generation.asking import pieces as pieces_of
from nemoport.runner.generation.asking import whole
from nemoport.runner.generation.texts import Generator, Piece, TextRequest
from nemoport.runner.http.exchange import EVENTS, Answer, Call, Stream, as_json, aside, json_answer, unpacked
from nemoport.runner.http.head import parse_json
from nemoport.runner.model import ModelVersion
from nemoport.runner.refusal import Refusal

_TOKENIZED = 64
"""How many times longer a byte of text takes than one that is only read."""
_MAX_TOKENS = 16  # vLLM's default, and OpenAI's for completions


@dataclass(frozen=True)
class Wanted:
    """A request, and how its answer is to look."""

    request: TextRequest
    stream: bool
    before: str
    """What comes before the text: the prompt, or nothing."""
    id: str
    extras: tuple[str, ...]
    """Members beside the text that were asked for."""


_EXTRAS = ("finish_reason", "num_input_tokens", "num_output_tokens")


async def generate(target: ModelVersion, generator: Generator, call: Call, threads: Executor) -> Answer:
    wanted = await aside(threads, call.size * _TOKENIZED, _read, generator, call)
    if wanted.stream:
        raise Refusal("generate answers once; ask generate_stream for a stream, or leave 'stream' out")
    return json_answer(_members(target, wanted, await whole(generator, wanted.request)))


async def generate_stream(target: ModelVersion, generator: Generator, call: Call, threads: Executor) -> Stream:
    """One event unless `stream` is true, as those backends do. The status waits for the first event."""
    try:
        wanted = await aside(threads, call.size * _TOKENIZED, _read, generator, call)
        pieces = pieces_of(generator, wanted.request) if wanted.stream else _one(generator, wanted.request)
        first = await anext(pieces)
    except Refusal as refusal:
        return Stream(refusal.code.http, _failed(refusal), (EVENTS,))

    async def events() -> AsyncGenerator[bytes, None]:
        async with aclosing(pieces):
            yield _event(_members(target, wanted, first))
            try:
                async for piece in pieces:
                    yield _event(_members(target, wanted, piece))
            except Refusal as refusal:
                yield _event({"error": str(refusal)})

    return Stream(200, events(), (EVENTS,))


async def _one(generator: Generator, request: TextRequest) -> AsyncGenerator[Piece, None]:
    yield await whole(generator, request)


async def _failed(refusal: Refusal) -> AsyncGenerator[bytes, None]:
    yield _event({"error": str(refusal)})


def _read(generator: Generator, call: Call) -> Wanted:
    return wanted_of(generator, parse_json(unpacked(call)))


def wanted_of(generator: Generator, fields: Mapping[str, Any]) -> Wanted:
    nested = fields.get("parameters", {})
    if not isinstance(nested, dict):
        raise Refusal("Unable to parse 'parameters': attempt to access JSON non-object as object")
    said = {**fields, **nested}
    text = said.get("text_input")
    if isinstance(text, list) and len(text) == 1:
        text = text[0]
    if not isinstance(text, str):
        raise Refusal(f"'text_input' must be a string; model '{generator.name}' generates text")
    parameters.check_done(said)
    draws = any(said.get(name) is not None for name in ("temperature", "top_k", "top_p"))
    stream = parameters.truth(said, "stream", False)
    excluded = parameters.truth(said, "exclude_input_in_output", True)
    if stream and not excluded:
        raise Refusal("When streaming, `exclude_input_in_output` = False is not allowed.")
    request = TextRequest(
        prompt=generator.tokenizer.encode(text),
        max_tokens=parameters.max_tokens(said, "max_tokens", default=_MAX_TOKENS),
        sampling=parameters.sampling(said, 1.0 if draws else 0.0),
        stop=parameters.stop_words(said),
        ignore_eos=parameters.truth(said, "ignore_eos", False),
        timeout_us=parameters.whole(said, "timeout", 0, 2**63 - 1, 0),
    )
    name = fields.get("id")
    extras = tuple(name for name in _EXTRAS if parameters.truth(said, f"return_{name}", False))
    return Wanted(request, stream, "" if excluded else text, name if isinstance(name, str) else "", extras)


def _members(target: ModelVersion, wanted: Wanted, piece: Piece) -> dict[str, Any]:
    """Triton sorts them."""
    extras: Mapping[str, Any] = {
        "finish_reason": piece.reason.value if piece.reason else None,
        "num_input_tokens": len(wanted.request.prompt),
        "num_output_tokens": piece.tokens,
    }
    found = {
        "model_name": target.name,
        "model_version": str(target.version),
        "text_output": wanted.before + piece.text,
        **({"id": wanted.id} if wanted.id else {}),
        **{name: extras[name] for name in wanted.extras},
    }
    return dict(sorted(found.items()))


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + as_json(content) + b"\n\n"
