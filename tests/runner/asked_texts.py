"""What is asked of models that answer in text, and how their answers are read."""

from __future__ import annotations

import json
import time
from typing import Any

from nemoport.runner.serve import Addresses

from .test_http import Reply
from .test_http import ask as ask_http
from .test_metrics import scraped

PROMPT = "The clever fox "
MODELS = ("onnx", "hf", "trtllm", "vllm")
FIELDS: dict[str, Any] = {"text_input": PROMPT, "max_tokens": 12}


def generate(texts: Addresses, fields: dict[str, Any], model: str = "onnx", path: str = "generate") -> Reply:
    return ask_http(texts.http, f"/v2/models/{model}/{path}", json.dumps(fields).encode())


def text(texts: Addresses, **fields: Any) -> str:
    reply = generate(texts, FIELDS | fields)
    assert reply.status == 200, reply.body
    found = reply.json["text_output"]
    assert isinstance(found, str)
    return found


def events(reply: Reply) -> list[Any]:
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    *lines, end = reply.body.decode().split("\n\n")
    assert not end
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def of(texts: Addresses, model: str) -> dict[str, int]:
    """The metrics of generation of a model."""
    labels = f'model="{model}",version="1"'
    found = scraped(texts.metrics)
    return {name.removesuffix(labels).strip(): value for name, value in found.items() if name.endswith(labels)}


def wait_until(holds: Any) -> None:
    until = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.002)


def stats(texts: Addresses, model: str) -> Any:
    return ask_http(texts.http, f"/v2/models/{model}/stats").json["model_stats"][0]
