"""Text over the protocols: generate, its stream, tensors and OpenAI's endpoints, asked by clients that people use."""

from __future__ import annotations

import json
import queue
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import transformers
import tritonclient.grpc as triton

from nemoport.runner.serve import Addresses, serving_all
from nemoport.runner.server import start

from .test_http import Reply
from .test_http import ask as ask_http
from .test_metrics import scraped

PROMPT = "The clever fox "
MODELS = ("onnx", "hf", "trtllm", "vllm")
FIELDS: dict[str, Any] = {"text_input": PROMPT, "max_tokens": 12}


@pytest.fixture(scope="module")
def addresses(fables: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    """The fables, the same for vLLM's backend, and two models that do not answer in text."""
    root = tmp_path_factory.mktemp("texts")
    for kind in ("onnx", "hf", "trtllm"):
        shutil.copytree(fables / kind, root / kind)
    (root / "vllm/1").mkdir(parents=True)
    (root / "vllm/1/model.json").write_text(json.dumps({"model": "../../hf/1", "gpu_memory_utilization": 0.5}))
    shutil.copytree(fables / "onnx", root / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    server = start([root])
    with serving_all(server) as found:
        yield found
    server.close()


@pytest.fixture
def client(addresses: Addresses) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{addresses.http}/v1", api_key="none", max_retries=0) as made:
        yield made


def generate(addresses: Addresses, fields: dict[str, Any], model: str = "onnx", path: str = "generate") -> Reply:
    return ask_http(addresses.http, f"/v2/models/{model}/{path}", json.dumps(fields).encode())


def text(addresses: Addresses, **fields: Any) -> str:
    reply = generate(addresses, FIELDS | fields)
    assert reply.status == 200, reply.body
    found = reply.json["text_output"]
    assert isinstance(found, str)
    return found


def events(reply: Reply) -> list[Any]:
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *lines, end = reply.body.decode().split("\n\n")
    assert not end
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("model", MODELS)
def test_generate_answers_once(addresses: Addresses, model: str) -> None:
    reply = generate(addresses, FIELDS | {"id": "7", "return_finish_reason": True}, model)
    assert reply.status == 200
    assert reply.json == {
        "finish_reason": "length",
        "id": "7",
        "model_name": model,
        "model_version": "1",
        "text_output": "Rufus loved ",
    }


@pytest.mark.parametrize("model", MODELS)
def test_a_stream_is_the_text_in_pieces(addresses: Addresses, model: str) -> None:
    reply = generate(addresses, FIELDS | {"stream": True, "return_num_output_tokens": True}, model, "generate_stream")
    assert reply.status == 200
    found = events(reply)
    assert "".join(each["text_output"] for each in found) == "Rufus loved "
    assert [each["num_output_tokens"] for each in found][-1] == 12
    assert len(found) > 6


def test_a_stream_that_is_not_asked_for_is_one_event(addresses: Addresses) -> None:
    (event,) = events(generate(addresses, FIELDS, path="generate_stream"))
    assert event["text_output"] == "Rufus loved "
    reply = generate(addresses, FIELDS | {"stream": True})
    assert (reply.status, "generate_stream" in reply.error) == (400, True)


def test_the_prompt_is_part_of_the_text_when_asked_for(addresses: Addresses) -> None:
    assert text(addresses, exclude_input_in_output=False) == PROMPT + "Rufus loved "
    both = {"exclude_input_in_output": False, "stream": True}
    assert generate(addresses, FIELDS | both, path="generate_stream").status == 400


def test_parameters_may_stand_beneath_and_under_the_names_of_either_backend(addresses: Addresses) -> None:
    drawn = text(addresses, temperature=1.5, seed=5, top_k=40)
    assert drawn == text(addresses, parameters={"temperature": 1.5, "random_seed": 5, "top_k": 40})
    assert drawn != text(addresses, temperature=1.5, seed=6, top_k=40)
    assert text(addresses, stop=["zzz", "fus"]) == text(addresses, stop_words=["fus"]) == "Ru"


def test_a_text_ends_where_the_model_ends_it(addresses: Addresses) -> None:
    long = {"max_tokens": 240, "return_finish_reason": True}
    ended = generate(addresses, FIELDS | long).json
    assert ended["finish_reason"] == "stop"
    went_on = generate(addresses, FIELDS | long | {"ignore_eos": True}).json
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
    addresses: Addresses, path: str, name: str, value: Any
) -> None:
    reply = generate(addresses, FIELDS | {name: value}, path=path)
    assert reply.status == 400
    error = reply.error if path == "generate" else events(reply)[0]["error"]
    assert 0 < len(error) < 400
    assert text(addresses) == "Rufus loved "


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"text_input":' + b"[" * 10**5, b"\xff\xfe", b"", b'"x"'])
def test_what_is_no_json_object_is_refused(addresses: Addresses, body: bytes) -> None:
    for path in ("/v2/models/onnx/generate", "/v1/completions", "/v1/chat/completions"):
        assert ask_http(addresses.http, path, body).status == 400


def test_a_context_too_long_is_refused_with_its_numbers(addresses: Addresses) -> None:
    reply = generate(addresses, {"text_input": "x" * 250, "max_tokens": 7})
    assert reply.status == 400
    assert "maximum context length is 256 tokens, but the prompt has 250 and 7 more" in reply.error
    assert generate(addresses, {"text_input": "x" * 250, "max_tokens": 6}).status == 200


def test_unknown_models_and_models_without_a_tokenizer_say_so(addresses: Addresses, client: openai.OpenAI) -> None:
    assert generate(addresses, FIELDS, "nope").status == 404
    assert generate(addresses, FIELDS, "mute").status == 400
    with pytest.raises(openai.NotFoundError, match="does not exist") as unknown:
        client.completions.create(model="nope", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="does not generate text"):
        client.completions.create(model="mute", prompt="x")


@pytest.mark.parametrize("model", ["onnx", "hf"])
def test_32_clients_at_once_hear_what_one_hears(addresses: Addresses, model: str) -> None:
    def one(at: int) -> str:
        fields = {"text_input": PROMPT + "a" * at, "max_tokens": 3 + at % 9, "temperature": at % 2, "seed": at}
        reply = generate(addresses, fields | {"stream": True}, model, "generate_stream")
        assert reply.status == 200
        return "".join(event["text_output"] for event in events(reply))

    alone = [one(at) for at in range(32)]
    with ThreadPoolExecutor(32) as clients:
        assert list(clients.map(one, range(32))) == alone


@pytest.mark.parametrize("path", ["generate", "generate_stream", "completions", "chat/completions"])
@pytest.mark.parametrize("streams", [True, False], ids=["stream", "whole"])
def test_a_client_that_goes_away_frees_its_row(addresses: Addresses, path: str, streams: bool) -> None:
    before = of(addresses, "hf")["nv_generation_tokens"]
    fields: dict[str, Any] = {"ignore_eos": True, "max_tokens": 200, "stream": streams and path != "generate"}
    if path.startswith("generate"):
        path, fields = f"/v2/models/hf/{path}", fields | {"text_input": "x"}
    else:
        said = {"prompt": "x"} if path == "completions" else {"messages": [{"role": "user", "content": "x"}]}
        path, fields = f"/v1/{path}", fields | {"model": "hf"} | said
    body = json.dumps(fields).encode()
    host, port = addresses.http.split(":")
    clients = [socket.create_connection((host, int(port))) for _ in range(2)]
    for client in clients:
        client.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(body)) + body)
    wait_until(lambda: of(addresses, "hf")["nv_generation_running_request_count"] == 2)
    for client in clients:
        client.close()
    wait_until(lambda: of(addresses, "hf")["nv_generation_running_request_count"] == 0)
    assert of(addresses, "hf")["nv_generation_tokens"] < before + 400


def of(addresses: Addresses, model: str) -> dict[str, int]:
    """The metrics of generation of a model."""
    labels = f'model="{model}",version="1"'
    found = scraped(addresses.metrics)
    return {name.removesuffix(labels).strip(): value for name, value in found.items() if name.endswith(labels)}


def wait_until(holds: Any) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_metrics_tell_of_tokens_and_times(addresses: Addresses) -> None:
    before = of(addresses, "onnx")
    text(addresses, max_tokens=20)
    after = scraped(addresses.metrics)
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
    addresses: Addresses, client: openai.OpenAI, model: str
) -> None:
    def row() -> Any:
        return ask_http(addresses.http, f"/v2/models/{model}/stats").json["model_stats"][0]

    before = row()
    generate(addresses, FIELDS, model)
    generate(addresses, FIELDS | {"stream": True}, model, "generate_stream")
    client.completions.create(model=model, prompt=PROMPT, max_tokens=2, n=2)
    list(client.chat.completions.create(model=model, messages=[{"role": "user", "content": "a"}], stream=True))
    assert generate(addresses, FIELDS | {"max_tokens": 9999}, model).status == 400
    after, metrics = row(), scraped(addresses.metrics)
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


def test_metadata_says_who_executes_what_has_no_engine(addresses: Addresses) -> None:
    for model, platform in (("onnx", "onnxruntime_onnx"), ("hf", "reference"), ("vllm", "reference")):
        assert ask_http(addresses.http, f"/v2/models/{model}").json["platform"] == platform
    config = ask_http(addresses.http, "/v2/models/trtllm/config").json
    assert "reference decoder" in config["parameters"]["executed_by"]["string_value"]


def test_tensors_of_text_go_in_and_come_out(addresses: Addresses) -> None:
    given, streams, told = (triton.InferInput(name, [1], kind) for name, kind in TENSORS)
    given.set_data_from_numpy(np.array([PROMPT.encode()], np.object_))
    streams.set_data_from_numpy(np.array([True]))
    told.set_data_from_numpy(np.array([json.dumps({"max_tokens": 5}).encode()], np.object_))
    heard: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(addresses.grpc) as client:
        answer = client.infer("hf", [given], parameters={"max_tokens": 12})
        assert answer.as_numpy("text_output").tolist() == [b"Rufus loved "]
        with pytest.raises(triton.InferenceServerException, match="decoupled"):
            client.infer("hf", [given, streams])
        with pytest.raises(triton.InferenceServerException, match="'top_k' must be an integer"):
            client.infer("hf", [given], parameters={"top_k": -7})
        client.start_stream(lambda result, error: heard.put((result, error)))
        client.async_stream_infer("vllm", [given, streams, told])
        said = b""
        for _ in range(6):
            result, error = heard.get(timeout=20)
            assert error is None
            said += result.as_numpy("text_output")[0]
        client.stop_stream()
    assert said == b"Rufus"


TENSORS = (("text_input", "BYTES"), ("stream", "BOOL"), ("sampling_parameters", "BYTES"))


def stats(addresses: Addresses, model: str) -> Any:
    return ask_http(addresses.http, f"/v2/models/{model}/stats").json["model_stats"][0]


def text_tensors(stream: bool) -> list[triton.InferInput]:
    given, streams, _ = (triton.InferInput(name, [1], kind) for name, kind in TENSORS)
    given.set_data_from_numpy(np.array([b"x"], np.object_))
    streams.set_data_from_numpy(np.array([stream]))
    return [given, streams]


@pytest.mark.parametrize("model, stream", [("hf", False), ("vllm", False), ("vllm", True)])
def test_a_text_over_tensors_counts_once_it_is_made(addresses: Addresses, model: str, stream: bool) -> None:
    before, heard = stats(addresses, model), queue.Queue[Any]()
    with triton.InferenceServerClient(addresses.grpc) as client:
        client.start_stream(lambda result, error: heard.put((result, error)))
        client.async_stream_infer(model, text_tensors(stream), parameters={"max_tokens": 40, "ignore_eos": True})
        last = False
        while not last:
            result, error = heard.get(timeout=20)
            assert error is None
            last = result.get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()
    after = stats(addresses, model)
    for name in ("inference_count", "execution_count"):
        assert after[name] == before[name] + 1
    spent = {name: row["ns"] - before["inference_stats"][name]["ns"] for name, row in after["inference_stats"].items()}
    counts = {
        name: row["count"] - before["inference_stats"][name]["count"] for name, row in after["inference_stats"].items()
    }
    assert (counts["success"], counts["fail"]) == (1, 0)
    assert spent["success"] == spent["compute_infer"]
    if stream:
        places = sorted(after["response_stats"], key=int)[1:-1]  # the first began before it was queued
        assert len(places) > 9
        told = [each.get("response_stats", {}) for each in (before, after)]
        begun, ended = (sum(each[at]["success"]["ns"] for at in places if at in each) for each in told)
        assert spent["success"] > ended - begun


def test_a_warm_up_in_text_does_not_count(fables: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    shutil.copytree(fables / "hf", root / "hf")
    (root / "hf/warmup").mkdir()
    (root / "hf/warmup/text").write_bytes(len(PROMPT).to_bytes(4, "little") + PROMPT.encode())
    given = '{ key: "text_input" value { data_type: TYPE_STRING dims: 1 input_data_file: "text" } }'
    with (root / "hf/config.pbtxt").open("a") as config:
        config.write(f'model_warmup {{ name: "w" inputs {given} }}\n')
    server = start([root])
    with serving_all(server) as found:
        wait_until(lambda: of(found, "hf").get("nv_generation_request_success") == 1)
        wait_until(lambda: of(found, "hf")["nv_generation_running_request_count"] == 0)
        assert not any(row["count"] for row in stats(found, "hf")["inference_stats"].values())
    server.close()


@pytest.mark.parametrize("model, stream", [("hf", False), ("vllm", True)])
def test_a_client_of_tensors_that_goes_away_frees_its_row(addresses: Addresses, model: str, stream: bool) -> None:
    canceled = f'nv_inference_request_failure model="{model}",reason="CANCELED",version="1"'
    tokens, before, failed = (
        of(addresses, model)["nv_generation_tokens"],
        stats(addresses, model)["inference_stats"],
        scraped(addresses.metrics)[canceled],
    )
    long = {"max_tokens": 200, "ignore_eos": True}
    with triton.InferenceServerClient(addresses.grpc) as client:
        if stream:
            client.start_stream(lambda result, error: None)
            for _ in range(2):
                client.async_stream_infer(model, text_tensors(True), parameters=long)
        else:
            calls = [
                client.async_infer(model, text_tensors(False), lambda result, error: None, parameters=long)
                for _ in range(2)
            ]
        wait_until(lambda: of(addresses, model)["nv_generation_running_request_count"] == 2)
        if stream:
            client.stop_stream(cancel_requests=True)
        else:
            for call in calls:
                call.cancel()
        wait_until(lambda: of(addresses, model)["nv_generation_running_request_count"] == 0)
    assert of(addresses, model)["nv_generation_tokens"] < tokens + 400
    after = stats(addresses, model)["inference_stats"]
    assert after["success"] == before["success"]
    assert after["fail"]["count"] == before["fail"]["count"] + 2
    assert scraped(addresses.metrics)[canceled] == failed + 2


def test_completions_as_openais_client_hears_them(addresses: Addresses, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "onnx", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(prompt=PROMPT, **asked)
    assert whole.object == "text_completion"
    (choice,) = whole.choices
    assert (choice.text, choice.finish_reason) == ("Rufus loved ", "length")
    assert whole.usage is not None
    assert whole.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(PROMPT),
        "completion_tokens": 12,
        "total_tokens": len(PROMPT) + 12,
    }
    parts = list(client.completions.create(prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **asked))
    assert "".join(part.choices[0].text for part in parts[:-1]) == "Rufus loved "
    assert [part.choices[0].finish_reason for part in parts[:-1]][-1] == "length"
    assert (parts[-1].choices, parts[-1].usage) == ([], whole.usage)
    assert {part.id for part in parts} == {parts[0].id}
    stopped = client.completions.create(prompt=list(PROMPT.encode()), stop=["loved"], **asked)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == ("Rufus ", "stop")


def test_several_prompts_and_choices_are_told_apart(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "onnx", "max_tokens": 9, "temperature": 1.4, "seed": 3, "n": 2}
    prompts = [PROMPT, "One snowy "]
    whole = client.completions.create(prompt=prompts, **asked)
    texts = [choice.text for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len(set(texts)) == 4
    heard = [""] * 4
    for part in client.completions.create(prompt=prompts, stream=True, **asked):
        heard[part.choices[0].index] += part.choices[0].text
    assert heard == texts
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == sum(map(len, prompts))


@pytest.mark.parametrize("model", MODELS)
def test_a_chat_is_the_completion_of_its_template(client: openai.OpenAI, fables: Path, model: str) -> None:
    messages: Any = [
        {"role": "system", "content": "You tell <b>fables</b> & “more”."},
        {"role": "user", "content": [{"type": "text", "text": "Of a "}, {"type": "text", "text": "fox"}]},
    ]
    plain = [messages[0], {"role": "user", "content": "Of a fox"}]
    tokenizer = transformers.AutoTokenizer.from_pretrained(fables / "hf/1")
    prompt = tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=True)["input_ids"]
    completed = client.completions.create(model=model, prompt=prompt, max_tokens=9, temperature=0)
    asked: dict[str, Any] = {"model": model, "messages": messages, "max_completion_tokens": 9, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    assert whole.object == "chat.completion"
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", completed.choices[0].text)
    assert whole.usage is not None
    assert whole.usage.prompt_tokens == len(prompt)
    parts = list(client.chat.completions.create(stream=True, **asked))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == completed.choices[0].text


def test_a_chat_goes_on_to_its_end_or_to_that_of_the_context(client: openai.OpenAI) -> None:
    told: Any = [{"role": "user", "content": "Tell"}]
    (choice,) = client.chat.completions.create(model="onnx", messages=told, temperature=0).choices
    assert choice.finish_reason == "stop"
    on = client.chat.completions.create(model="onnx", messages=told, temperature=0, extra_body={"ignore_eos": True})
    assert on.choices[0].finish_reason == "length"
    assert on.usage is not None
    assert on.usage.total_tokens == 256


def test_models_that_answer_in_text_are_listed(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == set(MODELS)
    assert client.models.retrieve("onnx").id == "onnx"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nope")


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
def test_bad_requests_get_errors_in_openais_form(addresses: Addresses, fields: dict[str, Any]) -> None:
    body = {"model": "onnx", "prompt": "x"} | fields
    reply = ask_http(addresses.http, "/v1/completions", json.dumps(body).encode())
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
def test_bad_messages_are_refused(addresses: Addresses, messages: Any) -> None:
    body = json.dumps({"model": "onnx", "messages": messages}).encode()
    reply = ask_http(addresses.http, "/v1/chat/completions", body)
    assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"parallel_tool_calls": True}, {"tools": []}], ids=str)
def test_words_about_tools_that_nobody_gave_ask_for_nothing(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    asked: Any = {"model": "onnx", "messages": [{"role": "user", "content": "Tell"}], "temperature": 0, "max_tokens": 5}
    plain = client.chat.completions.create(**asked).choices
    assert client.chat.completions.create(**asked, **fields).choices == plain


@pytest.mark.parametrize("choice", ["required", "auto", {"type": "function", "function": {"name": "f"}}], ids=str)
def test_tools_that_are_to_be_chosen_are_refused(client: openai.OpenAI, choice: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="'tool_choice' is not supported"):
        client.chat.completions.create(
            model="onnx", messages=[{"role": "user", "content": "x"}], tool_choice=choice, max_tokens=1
        )


@pytest.mark.parametrize("options", [{}, {"include_usage": True}], ids=str)
def test_options_of_a_stream_that_is_none_are_refused_in_openais_words(client: openai.OpenAI, options: Any) -> None:
    asked: Any = {"model": "onnx", "prompt": "x", "max_tokens": 1}
    for stream in ({}, {"stream": False}):
        with pytest.raises(
            openai.BadRequestError, match=r"The 'stream_options' parameter is only allowed when 'stream' is enabled\."
        ):
            client.completions.create(**(asked | stream), stream_options=options)
    assert client.completions.create(**asked, stream_options=None).usage


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
