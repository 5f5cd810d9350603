"""The repository of five models around an engine of TensorRT-LLM: what a real server makes of it, with a stand-in for
the one backend that it has not."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonserver import Server, tritonserver

from nemoport.runner.serve import serving
from nemoport.runner.server import start

from .engines import TOKENIZER, engine
from .laid_out import MODELS, PROMPT, laid_out


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return PreTrainedTokenizerFast.from_pretrained(TOKENIZER)


@dataclass(frozen=True)
class Served:
    server: Server
    repository: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Laid out, moved, and served from its own directory with a draft model beside it."""
    place = tmp_path_factory.mktemp("inflight")
    target = engine(place / "target", mode="draft_tokens_external", max_draft_len=8)
    draft = engine(place / "draft", tokenizer=False)
    laid_out(target, place / "laid out", "--draft", draft, "--max-batch-size", 1)
    shutil.rmtree(target)
    moved = (place / "laid out").rename(place / "moved")
    with tritonserver(Path("."), directory=moved, flags=("--disable-auto-complete-config",)) as server:
        yield Served(server, moved)


def test_a_server_takes_every_model_as_it_lies_there(served: Served) -> None:
    assert served.server.index() == {(name, "1"): "READY" for name in (*MODELS, "tensorrt_llm_draft")}


def generated(server: Server, model: str, **said: Any) -> dict[str, Any]:
    answer: dict[str, Any] = server.post(f"/v2/models/{model}/generate", {"text_input": PROMPT, **said})
    return answer


def streamed(server: Server, model: str, **said: Any) -> list[str]:
    body = json.dumps({"text_input": PROMPT, "stream": True, **said}).encode()
    with urlopen(Request(f"{server.http}/v2/models/{model}/generate_stream", body), timeout=30) as answer:
        events = [json.loads(line[len(b"data: ") :]) for line in answer if line.startswith(b"data: ")]
    assert not any("error" in event for event in events), events
    return [event["text_output"] for event in events]


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
@pytest.mark.parametrize("exclude", [True, False])
def test_text_goes_in_and_comes_out(model: str, exclude: bool, served: Served, tokenizer: Any) -> None:
    """The stand-in repeats the prompt."""
    count = len(tokenizer(PROMPT)["input_ids"])
    answer = generated(served.server, model, max_tokens=count, exclude_input_in_output=exclude)
    assert answer["text_output"] == (PROMPT if exclude else PROMPT * 2)
    assert answer["cum_log_probs"] == -1.5


def test_the_pieces_of_a_stream_are_the_answer_and_no_character_is_cut(served: Served, tokenizer: Any) -> None:
    count = len(tokenizer(PROMPT)["input_ids"])
    pieces = streamed(served.server, "tensorrt_llm_bls", max_tokens=count, exclude_input_in_output=True)
    assert "".join(pieces) == PROMPT
    assert count > len(pieces) > count // 2
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(streamed(served.server, "ensemble", max_tokens=count, exclude_input_in_output=True)) == count


def test_an_answer_ends_after_a_word_to_stop_at(served: Served, tokenizer: Any) -> None:
    """`rown` is no token and begins in the middle of one."""
    said = {"max_tokens": 40, "exclude_input_in_output": True, "stop_words": ["rown"]}
    assert generated(served.server, "tensorrt_llm_bls", **said)["text_output"] == "the quick brown"
    assert "".join(streamed(served.server, "tensorrt_llm_bls", **said)) == "the quick brown"


def test_the_engine_is_stopped_when_the_client_of_a_stream_has_left(served: Served) -> None:
    """The stop is a request to the engine, too."""

    def done(model: str) -> int:
        (row,) = served.server.get(f"/v2/models/{model}/stats")["model_stats"]
        return int(row["inference_stats"]["success"]["count"])

    led, asked = done("tensorrt_llm_bls"), done("tensorrt_llm")
    request = pb.ModelInferRequest(model_name="tensorrt_llm_bls")
    for name, datatype, content in (
        ("text_input", "BYTES", pb.InferTensorContents(bytes_contents=[PROMPT.encode()])),
        ("max_tokens", "INT32", pb.InferTensorContents(int_contents=[90])),
        ("stream", "BOOL", pb.InferTensorContents(bool_contents=[True])),
    ):
        request.inputs.add(name=name, datatype=datatype, shape=[1, 1], contents=content)
    with grpc.insecure_channel(served.server.grpc) as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter([request]), timeout=30)
        assert not next(call).error_message
        call.cancel()
    end = time.monotonic() + 30
    while done("tensorrt_llm_bls") == led:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert done("tensorrt_llm") == asked + 2


@pytest.mark.parametrize("drafted", [1, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 13, 40])
@pytest.mark.parametrize("logits", [False, True])
def test_draft_tokens_change_nothing_but_the_way(
    drafted: int, count: int, logits: bool, served: Served, tokenizer: Any
) -> None:
    """The draft model is wrong at every third token. The stand-ins take `top_k` for how many tokens they repeat."""
    said = {"max_tokens": count, "exclude_input_in_output": True, "top_k": len(tokenizer(PROMPT)["input_ids"])}
    plain = generated(served.server, "tensorrt_llm_bls", **said)["text_output"]
    more = {"num_draft_tokens": drafted, "use_draft_logits": logits}
    assert generated(served.server, "tensorrt_llm_bls", **said, **more)["text_output"] == plain


@pytest.mark.parametrize(
    "said, words",
    [
        ({"max_tokens": 0}, "it counts, from 1 on"),
        ({"max_tokens": 3, "stream": True, "num_draft_tokens": 2}, "without num_draft_tokens"),
        ({"max_tokens": 3, "text_input": ""}, "have no token"),
        ({"max_tokens": 3, "embedding_bias_words": ["a", "b"], "embedding_bias_weights": [1.0]}, "have 1 weights"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(said: dict[str, Any], words: str, served: Served) -> None:
    assert words in told(served.server, "tensorrt_llm_bls", **said)


def told(server: Server, model: str, **said: Any) -> str:
    with pytest.raises(HTTPError) as raised:
        generated(server, model, **said)
    with raised.value as answer:
        return str(json.loads(answer.read())["error"])


def test_it_can_be_moved_and_loaded_again_and_answers_once_where_that_was_chosen(
    tmp_path: Path, tokenizer: Any
) -> None:
    options = ("--tokenizer", TOKENIZER, "--no-decoupled", "--max-batch-size", 1)
    laid_out(engine(tmp_path / "engine", tokenizer=False), tmp_path / "a", *options)
    for place in ("b", "c with space"):
        shutil.move(tmp_path / "a", tmp_path / place)
        with tritonserver(Path("."), directory=tmp_path / place) as server:
            assert server.index() == {(name, "1"): "READY" for name in MODELS}
            answer = generated(server, "tensorrt_llm_bls", max_tokens=3, exclude_input_in_output=True)
            assert answer["text_output"] == tokenizer.decode(tokenizer(PROMPT)["input_ids"][:3])
            assert "with --decoupled" in told(server, "tensorrt_llm_bls", max_tokens=3, stream=True)
        shutil.move(tmp_path / place, tmp_path / "a")


WORDS = [b"fox", b"", b" brown fox", "ö".encode()]
ASKED: Sequence[Mapping[str, Any]] = (
    {"QUERY": [[PROMPT.encode()]], "REQUEST_OUTPUT_LEN": [[5]]},
    {
        "QUERY": [[b"a"], [PROMPT.encode()]],
        "REQUEST_OUTPUT_LEN": [[5], [6]],
        "STOP_WORDS_DICT": [WORDS, [b"", b"", b"", b"the"]],
        "BAD_WORDS_DICT": [[b""], [b""]],
        "END_ID": [[9], [8]],
        "EMBEDDING_BIAS_WORDS": [[b"fox"], [b"a"]],
        "EMBEDDING_BIAS_WEIGHTS": [[1.5], [-2.0]],
    },
)
TYPES = {
    **dict.fromkeys(("REQUEST_OUTPUT_LEN", "END_ID", "TOKENS_BATCH", "SEQUENCE_LENGTH"), "INT32"),
    "EMBEDDING_BIAS_WEIGHTS": "FP32",
}
"""The others are texts."""


def asked(address: str, model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for name, value in given.items():
        datatype = TYPES.get(name, "BYTES")
        array = np.array(value)
        flat = [each.decode() if isinstance(each, bytes) else each for each in array.ravel().tolist()]
        rows.append({"name": name, "datatype": datatype, "shape": list(array.shape), "data": flat})
    body = json.dumps({"inputs": rows}).encode()
    with urlopen(Request(f"{address}/v2/models/{model}/infer", body), timeout=30) as answer:
        outputs = json.loads(answer.read())["outputs"]
    return {row["name"]: np.array(row["data"]).reshape(row["shape"]) for row in outputs}


def test_both_ends_are_transformers_own_on_tritonserver_and_on_our_runner(tmp_path: Path, tokenizer: Any) -> None:
    repository = laid_out(engine(tmp_path / "engine"), tmp_path / "repository")
    ends = ["preprocessing", "postprocessing"]
    runner = start([repository], explicit=True, load_model=ends)
    with tritonserver(repository, load=ends) as triton, serving(runner) as ours:
        for address in (triton.http, f"http://{ours}"):
            for given in ASKED:
                check_preprocessed(asked(address, "preprocessing", given), given, tokenizer)
            ids = tokenizer(PROMPT)["input_ids"]
            tokens = {"TOKENS_BATCH": [[[*ids, 7], [*ids[:4], 1, *ids[4:]]]], "SEQUENCE_LENGTH": [[len(ids), 5]]}
            (texts,) = asked(address, "postprocessing", tokens)["OUTPUT"]
            assert texts.tolist() == [PROMPT, tokenizer.decode([*ids[:4], 1], skip_special_tokens=True)]


def check_preprocessed(made: dict[str, Any], given: Mapping[str, Any], tokenizer: Any) -> None:
    def ids(text: bytes) -> list[int]:
        found: list[int] = tokenizer(text.decode(), add_special_tokens=False)["input_ids"]
        return found

    queries = [row[0] for row in given["QUERY"]]
    lengths = made["REQUEST_INPUT_LEN"].ravel().tolist()
    assert lengths == [len(ids(query)) for query in queries]
    for row, query, length in zip(made["INPUT_ID"].tolist(), queries, lengths, strict=True):
        assert row == ids(query) + [tokenizer.pad_token_id] * (len(row) - length)
    assert made["OUT_END_ID"].tolist() == given.get("END_ID", [[tokenizer.eos_token_id]] * len(queries))
    assert made["OUT_PAD_ID"].tolist() == [[tokenizer.pad_token_id]] * len(queries)
    assert made["REQUEST_OUTPUT_LEN"].tolist() == given["REQUEST_OUTPUT_LEN"]
    for name, theirs in (("STOP_WORDS_IDS", "STOP_WORDS_DICT"), ("BAD_WORDS_IDS", "BAD_WORDS_DICT")):
        for row, words in zip(made[name].tolist(), given.get(theirs, [[]] * len(queries)), strict=True):
            assert spelled(row) == [ids(word) for word in words if word]
    bias = made["EMBEDDING_BIAS"]
    if "EMBEDDING_BIAS_WORDS" not in given:
        assert bias.shape == (len(queries), 0)
        return
    assert bias.shape == (len(queries), 300)
    for row, words, weights in zip(bias, given["EMBEDDING_BIAS_WORDS"], given["EMBEDDING_BIAS_WEIGHTS"], strict=True):
        assert {int(i): row[i] for i in np.flatnonzero(row)} == dict.fromkeys(ids(words[0]), weights[0])


def spelled(row: list[list[int]]) -> list[list[int]]:
    """Words from their two rows, as tensorrt_llm's runtime reads them: tokens, and where each word ends."""
    tokens, ends = row
    ends = [end for end in ends if end != -1]
    return [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]
