"""OpenAI's completions and chat completions, whole and as a stream (platform.openai.com/docs/api-reference).

    POST /v1/completions         {"model": "m", "prompt": "The fox ", "max_tokens": 3}
    POST /v1/chat/completions    {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
    GET  /v1/models

Beyond OpenAI's words, `top_k` and `ignore_eos` are taken, as vLLM takes them. What is not done is refused by name.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import Executor
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

from nemoport.runner.generation import parameters
from nemoport.runner.generation.asking import pieces, whole
from nemoport.runner.generation.texts import Generator, Piece, TextRequest, unavailable
from nemoport.runner.http.exchange import (
    EVENTS,
    JSON,
    Answer,
    Call,
    Later,
    Stream,
    as_json,
    aside,
    json_answer,
    unpacked,
)
from nemoport.runner.http.head import parse_json
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.server import Server

_MAX_TOKENS = 16  # OpenAI's default for completions; a chat goes on to the end of the context
_MOST_CHOICES = 128
_DONE = b"data: [DONE]\n\n"
_TYPES = {  # OpenAI's names for what went wrong, by HTTP status
    404: ("invalid_request_error", "model_not_found"),
    500: ("server_error", None),
    503: ("server_error", "overloaded"),
}
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "n", "ignore_eos")
_NEUTRAL = ("presence_penalty", "frequency_penalty", "repetition_penalty", "min_p", "logit_bias", "logprobs")
_IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
_TAKEN = frozenset(("model", "stream", "stream_options", *_SAMPLING, *_NEUTRAL, *_IGNORED))


@dataclass(frozen=True)
class Form:
    """How one of the two endpoints is asked and answers."""

    prefix: str
    whole: str
    part: str
    """What the objects of an answer, and of a stream, are called."""
    taken: frozenset[str]
    requests: Callable[[Generator, Mapping[str, Any]], list[TextRequest]]
    said: Callable[[Piece], dict[str, Any]]
    says: Callable[[Piece, bool], dict[str, Any]]
    """What a choice says, whole and as a part of a stream; the flag is true for its first part."""


@dataclass(frozen=True)
class Asked:
    """A request as it was read, and the head of all its answers."""

    generator: Generator
    form: Form
    model: str
    requests: list[TextRequest]
    stream: bool
    usage: bool
    """Whether a stream ends with its usage."""
    id: str
    created: int

    def answer(self, kind: str, choices: list[dict[str, Any]], usage: dict[str, int] | None) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
        return {**head, "usage": usage} if usage or self.usage else head

    def counted(self, made: int) -> dict[str, int]:
        prompt = sum(len(tokens) for tokens in {id(each.prompt): each.prompt for each in self.requests}.values())
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


Work = Callable[[Server, Call, Executor], Coroutine[Any, Any, Answer | Stream]]


def in_openais_words(work: Work) -> Callable[[Server, Call, Executor], Awaitable[Later]]:
    """Errors look as OpenAI's clients expect them."""

    async def answer(server: Server, call: Call, threads: Executor) -> Answer | Stream:
        try:
            return await work(server, call, threads)
        except Refusal as refusal:
            return Answer(refusal.code.http, as_json(_error(refusal)), (JSON,))

    async def handler(server: Server, call: Call, threads: Executor) -> Later:
        return Later(answer(server, call, threads))

    return handler


@in_openais_words
async def models(server: Server, call: Call, threads: Executor) -> Answer:
    found = [_model(name) for name, _, version in server.ready_versions() if version.generator]
    return json_answer({"object": "list", "data": [row for at, row in enumerate(found) if row not in found[:at]]})


@in_openais_words
async def model(server: Server, call: Call, threads: Executor) -> Answer:
    name = unquote(call.model)  # OpenAI's clients write a name for its place in a path
    _generator(server, name)
    return json_answer(_model(name))


@in_openais_words
async def completions(server: Server, call: Call, threads: Executor) -> Answer | Stream:
    return await _complete(server, call, threads, COMPLETION)


@in_openais_words
async def chat_completions(server: Server, call: Call, threads: Executor) -> Answer | Stream:
    return await _complete(server, call, threads, CHAT)


async def _complete(server: Server, call: Call, threads: Executor, form: Form) -> Answer | Stream:
    fields = await aside(threads, call.size, lambda: parse_json(unpacked(call)))
    name = fields.get("model")
    if not isinstance(name, str):
        raise Refusal("you must provide a model parameter")
    generator = _generator(server, name)
    # in a thread whatever its size: a chat template is a program
    asked = await asyncio.get_running_loop().run_in_executor(threads, _read, generator, form, name, fields)
    if asked.stream:
        parts = _parts(asked)
        return Stream(200, _with_first(await anext(parts), parts), (EVENTS,))
    texts = await _all([whole(generator, request) for request in asked.requests])
    choices = [
        {"index": at, **form.said(piece), "logprobs": None, "finish_reason": _reason(piece)}
        for at, piece in enumerate(texts)
    ]
    return json_answer(asked.answer(form.whole, choices, asked.counted(sum(piece.tokens for piece in texts))))


async def _all(texts: list[Any]) -> list[Piece]:
    """Together; when one fails, the others are let go."""
    tasks = [asyncio.ensure_future(text) for text in texts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()


async def _parts(asked: Asked) -> AsyncGenerator[bytes, None]:
    """The choices of a stream as they come, each part with its index; what fails before the first is raised."""
    heard: asyncio.Queue[tuple[int, Piece | Refusal]] = asyncio.Queue()

    async def listen(at: int, request: TextRequest) -> None:
        try:
            async with aclosing(pieces(asked.generator, request)) as said:
                async for piece in said:
                    heard.put_nowait((at, piece))
        except Refusal as refusal:
            heard.put_nowait((at, refusal))

    tasks = [asyncio.create_task(listen(at, request)) for at, request in enumerate(asked.requests)]
    left, made, begun = len(tasks), 0, set[int]()
    try:
        while left:
            at, piece = await heard.get()
            if isinstance(piece, Refusal):
                if not begun:
                    raise piece
                yield _event(_error(piece))
                yield _DONE  # as vLLM ends it
                return
            choice = {
                "index": at,
                **asked.form.says(piece, at not in begun),
                "logprobs": None,
                "finish_reason": _reason(piece),
            }
            begun.add(at)
            yield _event(asked.answer(asked.form.part, [choice], None))
            if piece.reason:
                left, made = left - 1, made + piece.tokens
        if asked.usage:
            yield _event(asked.answer(asked.form.part, [], asked.counted(made)))
        yield _DONE
    finally:
        for task in tasks:
            task.cancel()


async def _with_first(first: bytes, parts: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    async with aclosing(parts):
        yield first
        async for part in parts:
            yield part


def _read(generator: Generator, form: Form, name: str, fields: Mapping[str, Any]) -> Asked:
    if unknown := sorted(fields.keys() - _TAKEN - form.taken):
        raise Refusal(f"Unrecognized request argument supplied: {unknown[0]}")
    parameters.check_done(fields)
    options = fields.get("stream_options") or {}
    if not isinstance(options, dict):
        raise Refusal("'stream_options' must be an object")
    stream = parameters.truth(fields, "stream", False)
    if fields.get("stream_options") is not None and not stream:
        raise Refusal("The 'stream_options' parameter is only allowed when 'stream' is enabled.")
    return Asked(
        generator=generator,
        form=form,
        model=name,
        requests=form.requests(generator, fields),
        stream=stream,
        usage=parameters.truth(options, "include_usage", False),
        id=f"{form.prefix}-{uuid4().hex}",
        created=int(time.time()),
    )


def _completion_requests(generator: Generator, fields: Mapping[str, Any]) -> list[TextRequest]:
    if parameters.truth(fields, "echo", False):
        raise Refusal("'echo' is not supported by this server; leave it out")
    given = fields.get("prompt")
    several = isinstance(given, list) and not all(type(token) is int for token in given)
    prompts = given if isinstance(given, list) and several else [given]
    return _requests(
        fields,
        [_prompt(generator, prompt) for prompt in prompts],
        parameters.max_tokens(fields, "max_tokens", default=_MAX_TOKENS),
    )


def _chat_requests(generator: Generator, fields: Mapping[str, Any]) -> list[TextRequest]:
    if (template := generator.tokenizer.chat) is None:
        raise Refusal(f"model '{generator.name}' has no chat template; ask /v1/completions")
    text = template.render(_messages(fields.get("messages")))
    prompt = generator.tokenizer.encode(text, add_special_tokens=False)
    longest = parameters.max_tokens(fields, "max_completion_tokens", "max_tokens", default=None)
    return _requests(fields, [prompt], longest)


def _requests(fields: Mapping[str, Any], prompts: list[tuple[int, ...]], longest: int | None) -> list[TextRequest]:
    """Each prompt `n` times; with a seed, each choice has its own that follows from it."""
    count = parameters.whole(fields, "n", 1, _MOST_CHOICES, 1)
    if not 0 < len(prompts) * count <= _MOST_CHOICES:
        raise Refusal(f"{len(prompts)} prompts with n={count} were asked for, from 1 to {_MOST_CHOICES} are supported")
    sampling, stop = parameters.sampling(fields, 1.0), parameters.stop_words(fields)
    return [
        TextRequest(
            prompt=prompt,
            max_tokens=longest,
            sampling=sampling.numbered(at),
            stop=stop,
            ignore_eos=parameters.truth(fields, "ignore_eos", False),
        )
        for prompt in prompts
        for at in range(count)
    ]


def _prompt(generator: Generator, prompt: Any) -> tuple[int, ...]:
    if isinstance(prompt, str):
        return generator.tokenizer.encode(prompt)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return tuple(prompt)
    raise Refusal("'prompt' must be a string, a list of token numbers, or a list of such prompts")


def _messages(given: Any) -> list[dict[str, Any]]:
    """Content in parts is joined to one text, which is what templates take."""
    if not isinstance(given, list) or not given:
        raise Refusal("'messages' must be a list of at least one message")
    messages = []
    for message in given:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refusal("each of 'messages' must be an object with a 'role' and its 'content'")
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(_text(part) for part in content)
        if not isinstance(content, str):
            raise Refusal("the 'content' of a message must be a string, or a list of parts of type text")
        messages.append({**message, "content": content})
    return messages


def _text(part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        raise Refusal("a part of a message's 'content' must have type text; this server takes no other")
    text: str = part["text"]
    return text


def _said(piece: Piece) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": piece.text, "refusal": None}}


def _says(piece: Piece, first: bool) -> dict[str, Any]:
    role = {"role": "assistant"} if first else {}
    return {"delta": {**role, "content": piece.text} if piece.text or first else {}}


COMPLETION = Form(
    prefix="cmpl",
    whole="text_completion",
    part="text_completion",
    taken=frozenset({"prompt", "best_of", "echo", "suffix"}),
    requests=_completion_requests,
    said=lambda piece: {"text": piece.text},
    says=lambda piece, first: {"text": piece.text},
)
CHAT = Form(
    prefix="chatcmpl",
    whole="chat.completion",
    part="chat.completion.chunk",
    taken=frozenset(
        {"messages", "max_completion_tokens", "top_logprobs", "response_format"}
        | {"tools", "functions", "tool_choice", "parallel_tool_calls"}
    ),
    requests=_chat_requests,
    said=_said,
    says=_says,
)


def _generator(server: Server, name: str) -> Generator:
    try:
        found = server.find(name)
    except Refusal as refusal:
        if refusal.code is not Code.NOT_FOUND:
            raise
        raise Refusal(f"The model '{name}' does not exist", Code.NOT_FOUND) from None
    if found.generator is None:
        raise unavailable(name)
    return found.generator


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "nemoport"}


def _reason(piece: Piece) -> str | None:
    return piece.reason.value if piece.reason else None


def _error(refusal: Refusal) -> dict[str, Any]:
    kind, code = _TYPES.get(refusal.code.http, ("invalid_request_error", None))
    return {"error": {"message": str(refusal), "type": kind, "param": None, "code": code}}


def _event(content: Mapping[str, Any]) -> bytes:
    return b"data: " + as_json(content) + b"\n\n"
