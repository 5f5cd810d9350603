"""Text over generate and its stream, asked by clients that people use."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from nemoport.runner.serve import Addresses

from .asked_texts import FIELDS, MODELS, PROMPT, events, generate, of, text, wait_until
from .test_http import ask as ask_http
from .test_metrics import scraped


@pytest.mark.parametrize("model", MODELS)
def test_generate_answers_once(texts: Addresses, model: str) -> None:
    reply = generate(texts, FIELDS | {"id": "7", "return_finish_reason": True}, model)
    assert reply.status == 200
    assert reply.json == {
        "finish_reason": "length",
        "id": "7",
        "model_name": model,
        "model_version": "1",
        "text_output": "Rufus loved ",
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_is_the_text_in_pieces(texts: Addresses, model: str) -> None:
    reply = generate(texts, FIELDS | {"stream": True, "return_num_output_tokens": True}, model, "generate_stream")
    assert reply.status == 200
    found = events(reply)
    assert "".join(each["text_output"] for each in found) == "Rufus loved "
    assert [each["num_output_tokens"] for each in found][-1] == 12
    assert len(found) > 6


def test_a_stream_that_is_not_asked_for_is_one_event(texts: Addresses) -> None:
    (event,) = events(generate(texts, FIELDS, path="generate_stream"))
    assert event["text_output"] == "Rufus loved "
    reply = generate(texts, FIELDS | {"stream": True})
    assert (reply.status, "generate_stream" in reply.error) == (400, True)


def test_the_prompt_is_part_of_the_text_when_asked_for(texts: Addresses) -> None:
    assert text(texts, exclude_input_in_output=False) == PROMPT + "Rufus loved "
    both = {"exclude_input_in_output": False, "stream": True}
    assert generate(texts, FIELDS | both, path="generate_stream").status == 400


def test_parameters_may_stand_beneath_and_under_the_names_of_either_backend(texts: Addresses) -> None:
    drawn = text(texts, temperature=1.5, seed=5, top_k=40)
    assert drawn == text(texts, parameters={"temperature": 1.5, "random_seed": 5, "top_k": 40})
    assert drawn != text(texts, temperature=1.5, seed=6, top_k=40)
    assert text(texts, stop=["zzz", "fus"]) == text(texts, stop_words=["fus"]) == "Ru"


def test_a_text_ends_where_the_model_ends_it(texts: Addresses) -> None:
    long = {"max_tokens": 240, "return_finish_reason": True}
    ended = generate(texts, FIELDS | long).json
    assert ended["finish_reason"] == "stop"
    went_on = generate(texts, FIELDS | long | {"ignore_eos": True}).json
    assert went_on["finish_reason"] == "length"
    assert went_on["text_output"].startswith(ended["text_output"])


HOSTILE: dict[str, Any] = {
    "temperature": [float("nan"), float("inf"), -1, "hot", [], 10**400, True],
    "top_k": [-2, 1.5, "4", 2**40],
    "top_p": [-0.1, 1.1, float("nan"), {}],
    "max_tokens": [0, -1, 10**30, 2**31 - 1, 1.0, "3", True],
    "seed": [2**64, 1.5, "x", 10**400],
    "stop": [[""], [1], {"a": 1}, ["x"] * 10**6, "x" * 10**6, [["x"]]],
    "timeout": [-1, 2**63, "soon"],
    "stream": ["yes", 1],
    "text_input": [None, 3, ["a", "b"], "", "\ud800", "x" * 10**6, {"a": 1}],
    "parameters": [3, "x", []],
    "beam_width": [4],
    "repetition_penalty": [1.2],
    "bad_words": [["x"]],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in HOSTILE.items() for value in values])
@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_bad_parameters_are_refused_and_the_next_request_is_answered(
    texts: Addresses, path: str, name: str, value: Any
) -> None:
    reply = generate(texts, FIELDS | {name: value}, path=path)
    assert reply.status == 400
    error = reply.error if path == "generate" else events(reply)[0]["error"]
    assert 0 < len(error) < 400
    assert text(texts) == "Rufus loved "


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"text_input":' + b"[" * 10**5, b"\xff\xfe", b"", b'"x"'])
def test_what_is_no_json_object_is_refused(texts: Addresses, body: bytes) -> None:
    for path in ("/v2/models/onnx/generate", "/v1/completions", "/v1/chat/completions"):
        assert ask_http(texts.http, path, body).status == 400


def test_a_context_too_long_is_refused_with_its_numbers(texts: Addresses) -> None:
    reply = generate(texts, {"text_input": "x" * 250, "max_tokens": 7})
    assert reply.status == 400
    assert "maximum context length is 256 tokens, but the prompt has 250 and 7 more" in reply.error
    assert generate(texts, {"text_input": "x" * 250, "max_tokens": 6}).status == 200


def test_unknown_models_and_models_without_a_tokenizer_say_so(texts: Addresses, openai_client: openai.OpenAI) -> None:
    assert generate(texts, FIELDS, "nope").status == 404
    assert generate(texts, FIELDS, "mute").status == 400
    with pytest.raises(openai.NotFoundError, match="does not exist") as unknown:
        openai_client.completions.create(model="nope", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="does not generate text"):
        openai_client.completions.create(model="mute", prompt="x")


@pytest.mark.parametrize("model", ["onnx", "hf"])
def test_32_clients_at_once_hear_what_one_hears(texts: Addresses, model: str) -> None:
    def one(at: int) -> str:
        fields = {"text_input": PROMPT + "a" * at, "max_tokens": 3 + at % 9, "temperature": at % 2, "seed": at}
        reply = generate(texts, fields | {"stream": True}, model, "generate_stream")
        assert reply.status == 200
        return "".join(event["text_output"] for event in events(reply))

    alone = [one(at) for at in range(32)]
    with ThreadPoolExecutor(32) as clients:
        assert list(clients.map(one, range(32))) == alone


@pytest.mark.parametrize("path", ["generate", "generate_stream", "completions", "chat/completions"])
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_away_frees_its_row(texts: Addresses, path: str, streams: bool) -> None:
    before = of(texts, "hf")["nv_generation_tokens"]
    fields: dict[str, Any] = {"ignore_eos": True, "max_tokens": 200, "stream": streams and path != "generate"}
    if path.startswith("generate"):
        path, fields = f"/v2/models/hf/{path}", fields | {"text_input": "x"}
    else:
        said = {"prompt": "x"} if path == "completions" else {"messages": [{"role": "user", "content": "x"}]}
        path, fields = f"/v1/{path}", fields | {"model": "hf"} | said
    body = json.dumps(fields).encode()
    host, port = texts.http.split(":")
    clients = [socket.create_connection((host, int(port))) for _ in range(2)]
    for client in clients:
        client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body)
    wait_until(lambda: of(texts, "hf")["nv_generation_running_request_count"] == 2)
    for client in clients:
        client.close()
    wait_until(lambda: of(texts, "hf")["nv_generation_running_request_count"] == 0)
    assert of(texts, "hf")["nv_generation_tokens"] < before + 400


def test_metrics_tell_of_tokens_and_times(texts: Addresses) -> None:
    before = of(texts, "onnx")
    text(texts, max_tokens=20)
    after = scraped(texts.metrics)
    labels = 'model="onnx",version="1"'
    for name, more in (("request_success", 1), ("tokens", 20), ("prompt_tokens", len(PROMPT))):
        assert after[f"nv_generation_{name} {labels}"] == before.get(f"nv_generation_{name}", 0) + more
    assert after[f"nv_generation_tokens_per_second {labels}"] > 0
    for summary in ("time_to_first_token_summary_us", "inter_token_latency_summary_us", "batch_size_summary"):
        quantiles = [after[f'nv_generation_{summary} {labels},quantile="{share}"'] for share in (0.5, 0.95, 0.99)]
        assert quantiles == sorted(quantiles)
        assert after[f"nv_generation_{summary}_sum {labels}"] >= quantiles[0] > 0
    assert not [name for name in after if "mute" in name and "generation" in name]


@pytest.mark.parametrize("model", ["onnx", "hf"])
def test_requests_for_text_are_counted_where_those_for_tensors_are(
    texts: Addresses, openai_client: openai.OpenAI, model: str
) -> None:
    def row() -> Any:
        return ask_http(texts.http, f"/v2/models/{model}/stats").json["model_stats"][0]

    before = row()
    generate(texts, FIELDS, model)
    generate(texts, FIELDS | {"stream": True}, model, "generate_stream")
    openai_client.completions.create(model=model, prompt=PROMPT, max_tokens=2, n=2)
    list(openai_client.chat.completions.create(model=model, messages=[{"role": "user", "content": "a"}], stream=True))
    assert generate(texts, FIELDS | {"max_tokens": 9999}, model).status == 400
    after, metrics = row(), scraped(texts.metrics)
    for name in ("inference_count", "execution_count"):
        assert after[name] == before[name] + 5
    for name, more in (("success", 5), ("queue", 5), ("compute_infer", 5), ("fail", 0)):
        assert after["inference_stats"][name]["count"] == before["inference_stats"][name]["count"] + more
    success = after["inference_stats"]["success"]
    assert success["ns"] > before["inference_stats"]["success"]["ns"]
    assert success["ns"] == after["inference_stats"]["compute_infer"]["ns"]
    assert after["batch_stats"][0]["compute_infer"] == after["inference_stats"]["compute_infer"]
    labels = f'model="{model}",version="1"'
    assert metrics[f"nv_inference_request_success {labels}"] == success["count"]
    assert metrics[f"nv_inference_request_duration_us {labels}"] == success["ns"] // 1000


def test_metadata_says_who_executes_what_has_no_engine(texts: Addresses) -> None:
    for model, platform in (("onnx", "onnxruntime_onnx"), ("hf", "reference"), ("vllm", "reference")):
        assert ask_http(texts.http, f"/v2/models/{model}").json["platform"] == platform
    config = ask_http(texts.http, "/v2/models/trtllm/config").json
    assert "reference decoder" in config["parameters"]["executed_by"]["string_value"]
