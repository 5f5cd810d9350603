"""OpenAI's endpoints, asked by OpenAI's client."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import openai
import pytest
import transformers

from nemoport.runner.serve import Addresses, serving_all
from nemoport.runner.server import start

from .asked_texts import MODELS, PROMPT
from .test_http import ask as ask_http


def test_completions_as_openais_client_hears_them(texts: Addresses, openai_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "onnx", "max_tokens": 12, "temperature": 0}
    whole = openai_client.completions.create(prompt=PROMPT, **asked)
    assert whole.object == "text_completion"
    (choice,) = whole.choices
    assert (choice.text, choice.finish_reason) == ("Rufus loved ", "length")
    assert whole.usage is not None
    assert whole.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 12,
        "total_tokens": len(PROMPT) + 12,
    }
    parts = list(
        openai_client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **asked)
    )
    assert "".join(part.choices[0].text for part in parts[:-1]) == "Rufus loved "
    assert [part.choices[0].finish_reason for part in parts[:-1]][-1] == "length"
    assert (parts[-1].choices, parts[-1].usage) == ([], whole.usage)
    assert {part.id for part in parts} == {parts[0].id}
    stopped = openai_client.completions.create(prompt=list(PROMPT.encode()), stop=["loved"], **asked)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("Rufus ", "stop")


def test_several_prompts_and_choices_are_told_apart(openai_client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "onnx", "max_tokens": 9, "temperature": 1.4, "seed": 3, "n": 2}
    prompts = [PROMPT, "One snowy "]
    whole = openai_client.completions.create(prompt=prompts, **asked)
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    heard = [""] * 4
    for part in openai_client.completions.create(prompt=prompts, stream=True, **asked):
        heard[part.choices[0].index] += part.choices[0].text
    assert heard == texts
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(map(len, prompts))


@pytest.mark.parametrize("model", MODELS)
def test_a_chat_is_the_completion_of_its_template(openai_client: openai.OpenAI, fables: Path, model: str) -> None:
    messages: Any = [
        {"role": "system", "content": "You tell <b>fables</b> & “more”."},
        {"role": "user", "content": [{"type": "text", "text": "Of a "}, {"type": "text", "text": "fox"}]},
    ]
    plain = [messages[0], {"role": "user", "content": "Of a fox"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(fables / "hf/1")
    prompt = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=True)["input_ids"]
    completed = openai_client.completions.create(model=model, prompt=prompt, max_tokens=9, temperature=0)
    asked: dict[str, Any] = {"model": model, "messages": messages, "max_completion_tokens": 9, "temperature": 0}
    whole = openai_client.chat.completions.create(**asked)
    assert whole.object == "chat.completion"
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", completed.choices[0].text)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(prompt)
    parts = list(openai_client.chat.completions.create(stream=True, **asked))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == completed.choices[0].text


def test_a_chat_goes_on_to_its_end_or_to_that_of_the_context(openai_client: openai.OpenAI) -> None:
    told: Any = [{"role": "user", "content": "Tell"}]
    (choice,) = openai_client.chat.completions.create(model="onnx", messages=told, temperature=0).choices
    assert choice.finish_reason == "stop"
    on = openai_client.chat.completions.create(
        model="onnx", messages=told, temperature=0, extra_body={"ignore_eos": True}
    )
    assert on.choices[0].finish_reason == "length"
    assert on.usage is not None
    assert on.usage.total_tokens == 256


def test_models_that_answer_in_text_are_listed(texts: Addresses, openai_client: openai.OpenAI) -> None:
    assert {model.id for model in openai_client.models.list()} == set(MODELS)
    assert openai_client.models.retrieve("onnx").id == "onnx"
    assert ask_http(texts.http, "/v1/models/o%6Enx").json["id"] == "onnx"
    with pytest.raises(openai.NotFoundError):
        openai_client.models.retrieve("nope")


BAD: list[dict[str, Any]] = [
    {"temperature": -1},
    {"max_tokens": 0},
    {"max_tokens": 300},
    {"n": 0},
    {"n": 10**9},
    {"prompt": []},
    {"prompt": [[]]},
    {"prompt": {"a": 1}},
    {"prompt": [300]},
    {"prompt": [-1]},
    {"prompt": ["x", 3]},
    {"prompt": ["x"] * 500},
    {"logprobs": 5},
    {"logprobs": 0},
    {"echo": True},
    {"frequency_penalty": 0.5},
    {"logit_bias": {"50": 1}},
    {"nonsense": 1},
    {"stream_options": 3, "stream": True},
    {"model": 7},
    {"stop": ["x"] * 10**6},
]


@pytest.mark.parametrize("fields", BAD, ids=lambda fields: str(fields)[:40])
def test_bad_requests_get_errors_in_openais_form(texts: Addresses, fields: dict[str, Any]) -> None:
    body = {"model": "onnx", "prompt": "x"} | fields
    reply = ask_http(texts.http, "/v1/completions", json.dumps(body).encode())
    assert reply.status == 400
    error = reply.json["error"]
    assert error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) < 400
    assert error.keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "x",
        [3],
        [{"role": "user"}],
        [{"content": "x"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
    ],
    ids=str,
)
def test_bad_messages_are_refused(texts: Addresses, messages: Any) -> None:
    body = json.dumps({"model": "onnx", "messages": messages}).encode()
    reply = ask_http(texts.http, "/v1/chat/completions", body)
    assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"parallel_tool_calls": True}, {"tools": []}], ids=str)
def test_words_about_tools_that_nobody_gave_ask_for_nothing(
    openai_client: openai.OpenAI, fields: dict[str, Any]
) -> None:
    asked: Any = {"model": "onnx", "messages": [{"role": "user", "content": "Tell"}], "temperature": 0, "max_tokens": 5}
    plain = openai_client.chat.completions.create(**asked).choices
    assert openai_client.chat.completions.create(**asked, **fields).choices == plain


@pytest.mark.parametrize("choice", ["required", "auto", {"type": "function", "function": {"name": "f"}}], ids=str)
def test_tools_that_are_to_be_chosen_are_refused(openai_client: openai.OpenAI, choice: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="'tool_choice' is not supported"):
        openai_client.chat.completions.create(
            model="onnx", messages=[{"role": "user", "content": "x"}], tool_choice=choice, max_tokens=1
        )


@pytest.mark.parametrize("options", [{}, {"include_usage": True}], ids=str)
def test_options_of_a_stream_that_is_none_are_refused_in_openais_words(
    openai_client: openai.OpenAI, options: Any
) -> None:
    asked: Any = {"model": "onnx", "prompt": "x", "max_tokens": 1}
    for stream in ({}, {"stream": False}):
        with pytest.raises(
            openai.BadRequestError, match=r"The 'stream_options' parameter is only allowed when 'stream' is enabled\."
        ):
            openai_client.completions.create(**(asked | stream), stream_options=options)
    assert openai_client.completions.create(**asked, stream_options=None).usage


@pytest.mark.parametrize("path, said", [("completions", {"prompt": "x"}), ("chat/completions", {})], ids=str)
def test_a_stream_that_fails_on_its_way_ends_with_the_error_and_its_end(
    fables: Path, tmp_path: Path, path: str, said: dict[str, Any]
) -> None:
    shutil.copytree(fables / "hf", tmp_path / "hf")
    server = start([tmp_path])
    generator = server.find("hf").generator
    assert generator is not None
    fields = {"model": "hf", "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True, "n": 2}
    fields |= {"max_tokens": 200} | (said or {"messages": [{"role": "user", "content": "x"}]})
    with serving_all(server) as found:
        asked = urllib.request.Request(f"http://{found.http}/v1/{path}", json.dumps(fields).encode())
        with urllib.request.urlopen(asked, timeout=20) as stream:
            assert b'"choices"' in stream.readline()
            generator.engine.abandon()
            *_, error, end, rest = stream.read().decode().split("\n\n")
    server.close()
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == "request is cancelled"
    assert (end, rest) == ("data: [DONE]", "")
