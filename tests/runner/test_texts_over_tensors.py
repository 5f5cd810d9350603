"""Text over tensors: Triton's gRPC, unary and as a stream."""

from __future__ import annotations

import json
import queue
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from nemoport.runner.serve import Addresses, serving_all
from nemoport.runner.server import start

from .asked_texts import PROMPT, of, stats, wait_until
from .test_metrics import scraped


def test_tensors_of_text_go_in_and_come_out(texts: Addresses) -> None:
    given, streams, told = (triton.InferInput(name, [1], kind) for name, kind in TENSORS)
    given.set_data_from_numpy(np.array([PROMPT.encode()], np.object_))
    streams.set_data_from_numpy(np.array([True]))
    told.set_data_from_numpy(np.array([json.dumps({"max_tokens": 5}).encode()], np.object_))
    heard: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(texts.grpc) as client:
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


def text_tensors(stream: bool) -> list[triton.InferInput]:
    given, streams, _ = (triton.InferInput(name, [1], kind) for name, kind in TENSORS)
    given.set_data_from_numpy(np.array([b"x"], np.object_))
    streams.set_data_from_numpy(np.array([stream]))
    return [given, streams]


@pytest.mark.parametrize("model, stream", [("hf", False), ("vllm", False), ("vllm", True)])
def test_a_text_over_tensors_counts_once_it_is_made(texts: Addresses, model: str, stream: bool) -> None:
    before, heard = stats(texts, model), queue.Queue[Any]()
    with triton.InferenceServerClient(texts.grpc) as client:
        client.start_stream(lambda result, error: heard.put((result, error)))
        client.async_stream_infer(model, text_tensors(stream), parameters={"max_tokens": 40, "ignore_eos": True})
        last = False
        while not last:
            result, error = heard.get(timeout=20)
            assert error is None
            last = result.get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()
    after = stats(texts, model)
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
def test_a_client_of_tensors_that_goes_away_frees_its_row(texts: Addresses, model: str, stream: bool) -> None:
    canceled = f'nv_inference_request_failure model="{model}",reason="CANCELED",version="1"'
    tokens, before, failed = (
        of(texts, model)["nv_generation_tokens"],
        stats(texts, model)["inference_stats"],
        scraped(texts.metrics)[canceled],
    )
    long = {"max_tokens": 200, "ignore_eos": True}
    with triton.InferenceServerClient(texts.grpc) as client:
        if stream:
            client.start_stream(lambda result, error: None)
            for _ in range(2):
                client.async_stream_infer(model, text_tensors(True), parameters=long)
        else:
            calls = [
                client.async_infer(model, text_tensors(False), lambda result, error: None, parameters=long)
                for _ in range(2)
            ]
        wait_until(lambda: of(texts, model)["nv_generation_running_request_count"] == 2)
        if stream:
            client.stop_stream(cancel_requests=True)
        else:
            for call in calls:
                call.cancel()
        wait_until(lambda: of(texts, model)["nv_generation_running_request_count"] == 0)
    assert of(texts, model)["nv_generation_tokens"] < tokens + 400
    after = stats(texts, model)["inference_stats"]
    assert after["success"] == before["success"]
    assert after["fail"]["count"] == before["fail"]["count"] + 2
    assert scraped(texts.metrics)[canceled] == failed + 2
