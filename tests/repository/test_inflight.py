"""The repository of five models around an engine of TensorRT-LLM: what a real server makes of it, with a stand-in for
the one backend that it has not, and what is refused before it is laid out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from exporters.commands import command, sentence
from google.protobuf import text_format
from transformers import PreTrainedTokenizerFast
from tritonclient.grpc import model_config_pb2
from tritonserver import Server, tritonserver

from nemoport.repository.inflight.settings import PARAMETERS, draft_tokens
from nemoport.runner.serve import serving
from nemoport.runner.server import start

from .engines import TOKENIZER, engine

MODELS = ("preprocessing", "tensorrt_llm", "postprocessing", "ensemble", "tensorrt_llm_bls")
PROMPT = "the quick brown fox jumps över Größe with my box of five dozen jugs"


def laid_out(source: Path, out: Path, *more: object) -> Path:
    ended = command("layout", "inflight_batcher_llm", source, "-o", out, *more)
    assert ended.exit_code == 0, ended.stderr
    return out


def refused(source: Path, out: Path, *more: object) -> tuple[int, str]:
    ended = command("layout", "inflight_batcher_llm", source, "-o", out, *more)
    assert not out.exists()
    return ended.exit_code, sentence(ended.stderr)


def config_of(repository: Path, model: str) -> Any:
    return text_format.Parse((repository / model / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def parameters(repository: Path, model: str = "tensorrt_llm") -> dict[str, str]:
    return {name: value.string_value for name, value in config_of(repository, model).parameters.items()}


# ------------------------------------------------------------------------------------------------- on a real server


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


# --------------------------------------------------------------------------------------------------- what is written


def test_nothing_is_left_to_fill_in(tmp_path: Path) -> None:
    repository = laid_out(engine(tmp_path / "engine"), tmp_path / "repository")
    assert {path.name for path in repository.iterdir()} == {*MODELS, "serve.sh"}
    for path in (path for path in repository.rglob("*") if path.is_file()):
        assert b"${" not in path.read_bytes().replace(b"${BASH_SOURCE[0]}", b""), path
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert (repository / "tensorrt_llm/1/rank0.engine").read_bytes() == b"a stand-in for an engine"


def test_the_linter_has_nothing_to_say(tmp_path: Path) -> None:
    repository = laid_out(engine(tmp_path / "engine"), tmp_path / "repository")
    ended = command("check", repository, "--json")
    errors = [each for each in json.loads(ended.stdout)["findings"] if each["severity"] == "error"]
    assert not errors


def test_the_same_engine_gives_the_same_bytes(tmp_path: Path) -> None:
    one, other = (laid_out(engine(tmp_path / name / "engine"), tmp_path / name / "out") for name in "ab")
    assert {path.relative_to(one): path.read_bytes() for path in one.rglob("*") if path.is_file()} == {
        path.relative_to(other): path.read_bytes() for path in other.rglob("*") if path.is_file()
    }


# docs/model_config.md of tensorrtllm_backend, "Model Input and Output": the tables, without what is for pictures.
_I, _F, _B, _U, _S = "TYPE_INT32", "TYPE_FP32", "TYPE_BOOL", "TYPE_UINT64", "TYPE_STRING"
COMMON = {
    **dict.fromkeys(("end_id", "pad_id", "min_tokens", "num_return_sequences", "beam_width"), _I),
    **dict.fromkeys(("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty"), _F),
    **dict.fromkeys(("return_log_probs", "return_context_logits", "return_generation_logits"), _B),
    **dict.fromkeys(("guided_decoding_guide_type", "guided_decoding_guide"), _S),
    **dict.fromkeys(("seed", "lora_task_id"), _U),
    "return_perf_metrics": _B,
    "lora_config": _I,
    "lora_weights": "TYPE_FP16",
}
ENGINES = {
    **dict.fromkeys(("input_ids", "input_lengths", "request_output_len", "draft_input_ids", "stop_words_list"), _I),
    **dict.fromkeys(("bad_words_list", "runtime_top_k", "runtime_top_p_reset_ids", "prompt_vocab_size"), _I),
    **dict.fromkeys(("draft_logits", "draft_acceptance_threshold", "runtime_top_p", "runtime_top_p_min"), _F),
    **dict.fromkeys(("runtime_top_p_decay", "len_penalty", "beam_search_diversity_rate", "embedding_bias"), _F),
    **dict.fromkeys(("early_stopping", "stop", "streaming"), _B),
}
CLIENTS = {
    **dict.fromkeys(("text_input", "bad_words", "stop_words", "embedding_bias_words"), _S),
    **dict.fromkeys(("max_tokens", "top_k"), _I),
    **dict.fromkeys(("top_p", "length_penalty", "embedding_bias_weights"), _F),
    "stream": _B,
}
ANSWERS = {
    **dict.fromkeys(
        ("cum_log_probs", "output_log_probs", "context_logits", "generation_logits", "acceptance_rate"), _F
    ),
    **dict.fromkeys(("kv_cache_alloc_new_blocks", "kv_cache_reused_blocks", "kv_cache_alloc_total_blocks"), _I),
    **dict.fromkeys(("batch_index", "total_accepted_draft_tokens", "total_draft_tokens"), _I),
}
DOCUMENTED: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]] = {
    "tensorrt_llm": (COMMON | ENGINES, ANSWERS | {"output_ids": _I, "sequence_length": _I}),
    "tensorrt_llm_bls": (
        COMMON | CLIENTS | {"num_draft_tokens": _I, "use_draft_logits": _B},
        ANSWERS | {"text_output": _S},
    ),
    "ensemble": (COMMON | CLIENTS, ANSWERS | {"text_output": _S}),
}


@pytest.mark.parametrize("model", DOCUMENTED)
def test_every_documented_tensor_is_there_with_its_type(model: str, tmp_path: Path) -> None:
    config = config_of(laid_out(engine(tmp_path / "engine"), tmp_path / "repository"), model)
    for rows, documented in zip((config.input, config.output), DOCUMENTED[model], strict=True):
        found = {row.name: model_config_pb2.DataType.Name(row.data_type) for row in rows}
        assert {name: found.get(name) for name in documented} == documented


# docs/model_config.md of tensorrtllm_backend: the optional parameters of the tensorrt_llm model.
PARAMETERS_DOCUMENTED = set(
    """
max_attention_window_size sink_token_length exclude_input_in_output cancellation_check_period_ms stats_check_period_ms
iter_stats_max_iterations request_stats_max_iterations normalize_log_probs gpu_device_ids num_nodes gpu_weights_percent
max_tokens_in_paged_kv_cache kv_cache_free_gpu_mem_fraction kv_cache_host_memory_bytes enable_kv_cache_reuse
lora_cache_optimal_adapter_size lora_cache_max_adapter_size lora_cache_gpu_memory_fraction lora_cache_host_memory_bytes
max_beam_width decoding_mode enable_chunked_context multi_block_mode enable_context_fmha_fp32_acc cuda_graph_mode
cuda_graph_cache_size batch_scheduler_policy medusa_choices eagle_choices guided_decoding_backend tokenizer_dir
xgrammar_tokenizer_info_path lookahead_window_size lookahead_ngram_size lookahead_verification_set_size
speculative_decoding_fast_logits gpt_model_type gpt_model_path executor_worker_path FORCE_CPU_ONLY_INPUT_TENSORS
""".split()  # noqa: SIM905  (to be read beside the tables)
)


def test_the_backend_is_told_nothing_that_it_does_not_document(tmp_path: Path) -> None:
    assert {each.name for each in PARAMETERS} <= PARAMETERS_DOCUMENTED
    said = parameters(laid_out(engine(tmp_path / "engine"), tmp_path / "repository"))
    assert said.keys() <= PARAMETERS_DOCUMENTED
    assert said["gpt_model_type"] == "inflight_fused_batching"
    assert said["gpt_model_path"] == "tensorrt_llm/1"
    assert said["enable_kv_cache_reuse"] == "true"
    assert {name for name, value in said.items() if not value} == {
        *("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend")
    }


@pytest.mark.parametrize("name", [each.name for each in PARAMETERS])
@pytest.mark.parametrize("value", ["", "${x}", "many", "-1", "{0}, {", "1.5"])
def test_a_value_that_the_backend_could_not_read_is_refused(name: str, value: str, tmp_path: Path) -> None:
    code, said = refused(engine(tmp_path / "engine"), tmp_path / "out", "--set", f"{name}={value}")
    assert code == 2
    assert name in said


SPECULATION: Mapping[str, tuple[dict[str, Any], tuple[str, ...], dict[str, str]]] = {
    "medusa": (
        {"mode": "medusa", "max_draft_len": 63},
        ("medusa_choices={0}, {0, 0}, {1}",),
        {"decoding_mode": "medusa", "medusa_choices": "{0}, {0, 0}, {1}"},
    ),
    "medusa, its usual tree": ({"mode": "medusa", "max_draft_len": 63}, (), {"decoding_mode": "medusa"}),
    "eagle": (
        {"mode": "eagle", "max_draft_len": 3},
        ("eagle_choices={0},{1}",),
        {"decoding_mode": "eagle", "eagle_choices": "{0},{1}"},
    ),
    "redrafter": ({"mode": "explicit_draft_tokens", "max_draft_len": 9}, (), {"decoding_mode": "redrafter"}),
    "lookahead": (
        {"mode": "lookahead_decoding", "max_draft_len": draft_tokens(7, 5, 4)},
        ("lookahead_window_size=7", "lookahead_ngram_size=5", "lookahead_verification_set_size=4"),
        {"decoding_mode": "lookahead", "lookahead_window_size": "7", "lookahead_verification_set_size": "4"},
    ),
    "draft": (
        {"mode": "draft_tokens_external", "max_draft_len": 4},
        ("kv_cache_free_gpu_mem_fraction=0.5",),
        {"enable_kv_cache_reuse": "true", "kv_cache_free_gpu_mem_fraction": "0.5"},
    ),
    "no mode": ({}, (), {"batch_scheduler_policy": "guaranteed_no_evict"}),
}


@pytest.mark.parametrize("case", SPECULATION)
def test_how_it_speculates_follows_from_the_engine(case: str, tmp_path: Path) -> None:
    build, given, wanted = SPECULATION[case]
    options = [word for pair in given for word in ("--set", pair)]
    said = parameters(laid_out(engine(tmp_path / "engine", **build), tmp_path / "repository", *options))
    assert {name: said[name] for name in wanted} == wanted
    assert ("decoding_mode" in said) == ("decoding_mode" in wanted)


LOOKS = {"mode": "lookahead_decoding", "max_draft_len": 10}
SIZES = ("--set", "lookahead_window_size=7", "--set", "lookahead_ngram_size=5")
REFUSED: Mapping[str, tuple[dict[str, Any], tuple[str, ...], int, str]] = {
    "a cache in one piece": ({"kv_cache_type": "CONTINUOUS"}, (), 3, "--kv-cache-type paged"),
    "padding": ({"plugins": {"remove_input_padding": False}}, (), 3, "remove_input_padding"),
    "no attention plugin": ({"plugins": {"gpt_attention_plugin": None}}, (), 3, "gpt_attention_plugin"),
    "no tokenizer": ({"tokenizer": False}, (), 3, "--tokenizer"),
    "another's tokenizer": ({"vocabulary": 200}, (), 3, "knows the token 299, and the engine 200"),
    "too large a batch": ({}, ("--max-batch-size", "3"), 2, "was built for 2"),
    "no such parameter": ({}, ("--set", "max_tokens=3"), 2, "there are batch_scheduler_policy"),
    "no pair": ({}, ("--set", "max_tokens"), 2, "NAME=VALUE"),
    "no blocks to reuse": (
        {"plugins": {"use_paged_context_fmha": False}},
        ("--set", "enable_chunked_context=true"),
        2,
        "--plugin use_paged_context_fmha=enable",
    ),
    "another mode's": ({}, ("--set", "medusa_choices={0}"), 2, "--speculative-decoding-mode medusa"),
    "a tree without a parent": (
        {"mode": "medusa", "max_draft_len": 9},
        ("--set", "medusa_choices={0}, {1, 0}"),
        2,
        "{1, 0} has no parent {1}",
    ),
    "a tree that is too large": (
        {"mode": "eagle", "max_draft_len": 1},
        ("--set", "eagle_choices={0}, {1}"),
        2,
        "has 2 paths",
    ),
    "the usual tree is too large": ({"mode": "medusa", "max_draft_len": 9}, (), 2, "mc_sim_7b_63"),
    "sizes are missing": (LOOKS, SIZES, 2, "lookahead_verification_set_size is not said"),
    "sizes do not fit": (LOOKS, (*SIZES, "--set", "lookahead_verification_set_size=4"), 2, "needs exactly 43"),
    "no draft tokens": ({"mode": "medusa"}, ("--set", "medusa_choices={0}"), 2, "has 1 paths"),
    "draft without blocks": (
        {"mode": "draft_tokens_external", "max_draft_len": 4, "plugins": {"use_paged_context_fmha": False}},
        (),
        2,
        "use_paged_context_fmha",
    ),
    "other GPUs than ranks": ({"ranks": 2}, ("--set", "gpu_device_ids=0"), 2, "are not the 2 GPUs"),
    "draft without a draft": ({}, ("--set", "draft.max_tokens_in_paged_kv_cache=3"), 2, "give --draft"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_backend_would_find_out_late_is_refused_first(case: str, tmp_path: Path) -> None:
    build, options, wanted, words = REFUSED[case]
    code, said = refused(engine(tmp_path / "engine", **build), tmp_path / "out", *options)
    assert words in said
    assert code == wanted


def test_a_draft_model_must_be_one_for_this_engine(tmp_path: Path) -> None:
    target = engine(tmp_path / "target", mode="draft_tokens_external", max_draft_len=4)
    other = engine(tmp_path / "other", vocabulary=400)
    assert "vocab_size 400" in refused(target, tmp_path / "out", "--draft", other)[1]
    assert "takes no draft tokens" in refused(other, tmp_path / "out", "--draft", target)[1]


@pytest.mark.parametrize("damage", ["gone", "no JSON", "another's", "a rank"])
def test_a_damaged_engine_is_refused(damage: str, tmp_path: Path) -> None:
    made = engine(tmp_path / "engine", ranks=2)
    path = made / "config.json"
    match damage:
        case "gone":
            path.unlink()
        case "no JSON":
            path.write_text("{")
        case "another's":
            path.write_text('{"version": "1.2.1", "architecture": "LlamaForCausalLM"}')
        case "a rank":
            (made / "rank1.engine").unlink()
    assert refused(made, tmp_path / "out")[0] == 3


@pytest.mark.parametrize(
    "file, content",
    [
        ("tokenizer.json", '"x"'),
        ("tokenizer.json", '{"model": [1]}'),
        ("tokenizer.json", '{"model": {"vocab": [1]}}'),
        ("tokenizer.json", '{"model": {"vocab": {"a": "b"}}}'),
        ("tokenizer.json", '{"added_tokens": [{"text": "</s>"}]}'),
        ("tokenizer_config.json", '{"eos_token": {"text": "</s>"}}'),
        ("tokenizer_config.json", '{"eos_token": ["</s>"]}'),
        ("generation_config.json", '{"eos_token_id": "</s>"}'),
        ("generation_config.json", '{"eos_token_id": [1, -1]}'),
        ("generation_config.json", '{"eos_token_id": 2.5}'),
        ("generation_config.json", '{"eos_token_id": 300}'),
    ],
)
def test_a_tokenizer_that_does_not_say_its_tokens_is_refused(file: str, content: str, tmp_path: Path) -> None:
    made = engine(tmp_path / "engine")
    (made / file).write_text(content)
    code, said = refused(made, tmp_path / "out")
    assert code == 3
    assert said.endswith(("save the tokenizer again", "give its own tokenizer with --tokenizer")), said


def test_nothing_is_written_over(tmp_path: Path) -> None:
    made = engine(tmp_path / "engine")
    laid_out(made, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    ended = command("layout", "inflight_batcher_llm", made, "-o", tmp_path / "out")
    assert ended.exit_code == 2
    assert "exists; remove it" in sentence(ended.stderr)
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


# --------------------------------------------------------------------------------------------------------- serve.sh

RECORDS = """\
#!/bin/sh
{ pwd; printf '%s\\n' "$@"; } > "$RECORD"
"""


@pytest.mark.parametrize(
    "ranks, drafts, program", [(1, False, "tritonserver"), (3, False, "mpirun"), (2, True, "mpirun")]
)
def test_the_script_serves_from_its_own_directory(ranks: int, drafts: bool, program: str, tmp_path: Path) -> None:
    target = engine(tmp_path / "engine", ranks=ranks, mode="draft_tokens_external", max_draft_len=4)
    options = ("--draft", engine(tmp_path / "draft", ranks=ranks)) if drafts else ()
    repository = laid_out(target, tmp_path / "the repository", *options)
    if shellcheck := shutil.which("shellcheck"):
        subprocess.run([shellcheck, str(repository / "serve.sh")], check=True)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("tritonserver", "mpirun"):
        (programs / name).write_text(RECORDS)
        (programs / name).chmod(0o755)
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
    subprocess.run([repository / "serve.sh", "--http-port", "1 2"], check=True, cwd="/", env=environment)
    place, *words = (tmp_path / "record").read_text().splitlines()
    assert place == str(repository)
    assert words[-2:] == ["--http-port", "1 2"] if ranks == 1 or drafts else ["--http-port", "1 2"] in _pairs(words)
    assert words.count(f"--model-repository={repository}") == (1 if drafts else ranks)
    assert words.count("--load-model=tensorrt_llm") == (0 if drafts else ranks - 1)
    assert ("mpirun" if "-n" in words else "tritonserver") == program


def _pairs(words: list[str]) -> list[list[str]]:
    return [list(pair) for pair in pairwise(words)]


def test_the_script_says_what_is_missing(tmp_path: Path) -> None:
    repository = laid_out(engine(tmp_path / "engine"), tmp_path / "repository")
    ended = subprocess.run([repository / "serve.sh"], capture_output=True, text=True, check=False)
    assert ended.returncode == 4
    assert re.match("tritonserver is not on PATH; .* TensorRT-LLM 1.2.1", sentence(ended.stderr))
