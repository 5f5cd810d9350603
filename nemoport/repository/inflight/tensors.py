"""The tensors of the five models, and how they are wired: rows.

Names, types and shapes are a contract with the `tensorrtllm` backend and with clients that know these models:
TensorRT-LLM 1.2, triton_backend/all_models/inflight_batcher_llm/*/config.pbtxt. What is for encoders and for pictures
is left out. A shape is without the batch axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

INT, LONG, BIG, FLOAT, HALF, BOOL, BYTE, TEXT = (
    *("TYPE_INT32", "TYPE_INT64", "TYPE_UINT64", "TYPE_FP32", "TYPE_FP16", "TYPE_BOOL", "TYPE_UINT8", "TYPE_STRING"),
)
LOGITS = "logits"
"""A type that the engine decides."""


@dataclass(frozen=True, kw_only=True)
class Tensor:
    name: str
    type: str
    dims: tuple[int, ...] = (1,)
    optional: bool = False
    scalar: bool = False
    """The backend is given one number for each item, without an axis."""
    ragged: bool = False
    """Of items with different lengths, batched as they are."""


def _each(kind: str, names: str, **more: bool | tuple[int, ...]) -> tuple[Tensor, ...]:
    return tuple(Tensor(name=name, type=kind, **more) for name in names.split())  # type: ignore[arg-type]


def _optional(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(replace(tensor, optional=True) for tensor in tensors)


SAMPLING = {
    "top_k": "runtime_top_k",
    "top_p": "runtime_top_p",
    "temperature": "temperature",
    "length_penalty": "len_penalty",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_tokens",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "seed": "seed",
}
"""A client's name, and the backend's."""
PASSED = (
    *("return_log_probs", "return_context_logits", "return_generation_logits", "return_perf_metrics"),
    *("num_return_sequences", "beam_width", "exclude_input_in_output", "lora_task_id", "lora_weights", "lora_config"),
    *("guided_decoding_guide_type", "guided_decoding_guide"),
)
"""A client's name is the backend's."""

WORDS = (
    *_each(TEXT, "BAD_WORDS_DICT STOP_WORDS_DICT EMBEDDING_BIAS_WORDS", dims=(-1,)),
    *_each(FLOAT, "EMBEDDING_BIAS_WEIGHTS", dims=(-1,)),
    *_each(INT, "END_ID PAD_ID"),
)
PREPROCESSING = (
    (*_each(TEXT, "QUERY"), *_each(INT, "REQUEST_OUTPUT_LEN"), *_optional(WORDS)),
    (
        *_each(INT, "INPUT_ID", dims=(-1,)),
        *_each(INT, "REQUEST_INPUT_LEN REQUEST_OUTPUT_LEN"),
        *_each(INT, "BAD_WORDS_IDS STOP_WORDS_IDS", dims=(2, -1)),
        *_each(FLOAT, "EMBEDDING_BIAS", dims=(-1,)),
        *_each(INT, "OUT_END_ID OUT_PAD_ID"),
    ),
)
POSTPROCESSING = (
    (*_each(INT, "TOKENS_BATCH", dims=(-1, -1)), *_each(INT, "SEQUENCE_LENGTH", dims=(-1,))),
    _each(TEXT, "OUTPUT", dims=(-1,)),
)
_NUMBERS = (
    *_each(INT, "num_return_sequences end_id pad_id beam_width", scalar=True),
    *_each(FLOAT, "draft_acceptance_threshold temperature runtime_top_p runtime_top_p_min", scalar=True),
    *_each(INT, "runtime_top_k runtime_top_p_reset_ids min_tokens prompt_vocab_size", scalar=True),
    *_each(FLOAT, "runtime_top_p_decay len_penalty repetition_penalty beam_search_diversity_rate", scalar=True),
    *_each(FLOAT, "presence_penalty frequency_penalty", scalar=True),
    *_each(BIG, "seed lora_task_id", scalar=True),
    *_each(BOOL, "early_stopping return_log_probs return_context_logits return_generation_logits", scalar=True),
    *_each(BOOL, "return_perf_metrics return_num_input_tokens return_num_output_tokens", scalar=True),
    *_each(BOOL, "exclude_input_in_output stop streaming", scalar=True),
)
_ROWS = (
    *_each(INT, "input_ids draft_input_ids", dims=(-1,), ragged=True),
    *_each(LOGITS, "draft_logits", dims=(-1, -1), ragged=True),
    *_each(INT, "stop_words_list bad_words_list", dims=(2, -1), ragged=True),
    *_each(FLOAT, "embedding_bias", dims=(-1,), ragged=True),
    *_each(HALF, "prompt_embedding_table lora_weights", dims=(-1, -1), ragged=True),
    *_each(BIG, "prompt_table_extra_ids", dims=(-1,), ragged=True),
    *_each(INT, "lora_config", dims=(-1, 3), ragged=True),
    *_each(BYTE, "context_phase_params", dims=(-1,), ragged=True),
    *_each(INT, "retention_token_range_starts retention_token_range_ends", dims=(-1,), ragged=True),
    *_each(INT, "retention_token_range_priorities retention_token_range_durations_ms", dims=(-1,), ragged=True),
    *_each(INT, "retention_decode_priority retention_decode_duration_ms", ragged=True),
    *_each(TEXT, "guided_decoding_guide_type guided_decoding_guide", ragged=True),
    *_each(INT, "lookahead_window_size lookahead_ngram_size lookahead_verification_set_size", ragged=True),
)
ANSWERED = (
    *_each(FLOAT, "cum_log_probs", dims=(-1,)),
    *_each(FLOAT, "output_log_probs", dims=(-1, -1)),
    *_each(LOGITS, "context_logits", dims=(-1, -1)),
    *_each(LOGITS, "generation_logits", dims=(-1, -1, -1)),
    *_each(INT, "batch_index sequence_index"),
    *_each(INT, "kv_cache_alloc_new_blocks kv_cache_reused_blocks kv_cache_alloc_total_blocks"),
    *_each(LONG, "arrival_time_ns first_scheduled_time_ns first_token_time_ns last_token_time_ns"),
    *_each(FLOAT, "acceptance_rate"),
    *_each(INT, "total_accepted_draft_tokens total_draft_tokens"),
)
"""What the backend says beside tokens, and the client is told as it is."""
TENSORRT_LLM = (
    (*_each(INT, "input_lengths request_output_len", scalar=True), *_optional((*_ROWS, *_NUMBERS))),
    (
        *_each(INT, "output_ids", dims=(-1, -1)),
        *_each(INT, "sequence_length", dims=(-1,)),
        *ANSWERED,
        *_each(BYTE, "context_phase_params", dims=(-1,)),
        *_each(INT, "num_input_tokens num_output_tokens"),
    ),
)
_BACKEND = {tensor.name: tensor for tensor in TENSORRT_LLM[0]}
_ASKED = (
    *_each(TEXT, "text_input"),
    *_each(INT, "max_tokens"),
    *_optional(
        (
            *_each(TEXT, "bad_words stop_words embedding_bias_words", dims=(-1,)),
            *_each(FLOAT, "embedding_bias_weights", dims=(-1,)),
            *_each(INT, "end_id pad_id"),
            *_each(BOOL, "stream"),
        )
    ),
    *(
        replace(_BACKEND[theirs], name=name, scalar=False)
        for name, theirs in {**SAMPLING, **dict(zip(PASSED, PASSED, strict=True))}.items()
    ),
)
TEXT_OUTPUT = _each(TEXT, "text_output", dims=(-1,))
ENSEMBLE = (_ASKED, (*TEXT_OUTPUT, *ANSWERED))
BLS = (
    (
        *(replace(tensor, ragged=False) for tensor in _ASKED),
        *_optional((*_each(INT, "num_draft_tokens"), *_each(BOOL, "use_draft_logits"))),
    ),
    (*TEXT_OUTPUT, *ANSWERED),
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A member's tensors by its own names, and those of the whole: a client's, or with `_` what passes between two."""

    model: str
    takes: Mapping[str, str]
    gives: Mapping[str, str]


STEPS = (
    Step(
        model="preprocessing",
        takes={
            "QUERY": "text_input",
            "REQUEST_OUTPUT_LEN": "max_tokens",
            "BAD_WORDS_DICT": "bad_words",
            "STOP_WORDS_DICT": "stop_words",
            "EMBEDDING_BIAS_WORDS": "embedding_bias_words",
            "EMBEDDING_BIAS_WEIGHTS": "embedding_bias_weights",
            "END_ID": "end_id",
            "PAD_ID": "pad_id",
        },
        gives={tensor.name: f"_{tensor.name}" for tensor in PREPROCESSING[1]},
    ),
    Step(
        model="tensorrt_llm",
        takes={
            "input_ids": "_INPUT_ID",
            "input_lengths": "_REQUEST_INPUT_LEN",
            "request_output_len": "_REQUEST_OUTPUT_LEN",
            "bad_words_list": "_BAD_WORDS_IDS",
            "stop_words_list": "_STOP_WORDS_IDS",
            "embedding_bias": "_EMBEDDING_BIAS",
            "end_id": "_OUT_END_ID",
            "pad_id": "_OUT_PAD_ID",
            "streaming": "stream",
            **{theirs: name for name, theirs in SAMPLING.items()},
            **dict(zip(PASSED, PASSED, strict=True)),
        },
        gives={
            "output_ids": "_TOKENS_BATCH",
            "sequence_length": "_SEQUENCE_LENGTH",
            **{tensor.name: tensor.name for tensor in ANSWERED},
        },
    ),
    Step(
        model="postprocessing",
        takes={"TOKENS_BATCH": "_TOKENS_BATCH", "SEQUENCE_LENGTH": "_SEQUENCE_LENGTH"},
        gives={"OUTPUT": "text_output"},
    ),
)
