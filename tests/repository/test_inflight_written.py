"""What is laid out around an engine: nothing to fill in, tensors and parameters as the backend documents them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from exporters.commands import command
from tritonclient.grpc import model_config_pb2

from nemoport.repository.inflight.settings import PARAMETERS, draft_tokens

from .engines import engine
from .laid_out import MODELS, config_of, laid_out, parameters, refused


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
