"""Engine directories for tests: what `trtllm-build` 1.2 writes into config.json, as far as anybody reads it (builder.py
of tensorrt_llm, EngineConfig.to_dict), and files in place of the engines."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOKENIZER = Path(__file__).parents[1] / "data/megatron/nemo2/llama_tp1pp1/context/_tok"
"""Byte-level, 300 tokens, `</s>` at the end and no template that adds one."""
MODES = {"draft_tokens_external": 2, "medusa": 4, "lookahead_decoding": 8, "explicit_draft_tokens": 16, "eagle": 32}


def engine(place: Path, *, ranks: int = 1, tokenizer: bool = True, vocabulary: int = 300, **build: Any) -> Path:
    """Of so many ranks; `build` is of its build_config, and under `plugins` of its plugin_config."""
    place.mkdir(parents=True)
    for rank in range(ranks):
        (place / f"rank{rank}.engine").write_bytes(b"a stand-in for an engine")
    (place / "config.json").write_text(json.dumps(config(ranks, vocabulary, build)))
    if tokenizer:
        for path in TOKENIZER.iterdir():
            shutil.copy(path, place)
    return place


def config(ranks: int, vocabulary: int, build: Mapping[str, Any]) -> dict[str, Any]:
    plugins = {
        "dtype": "bfloat16",
        "gpt_attention_plugin": "auto",
        "gemm_plugin": "auto",
        "lora_plugin": None,
        "context_fmha": True,
        "paged_kv_cache": True,
        "remove_input_padding": True,
        "tokens_per_block": 32,
        "use_paged_context_fmha": True,
        "streamingllm": False,
    }
    return {
        "version": "1.2.1",
        "pretrained_config": {
            "architecture": "LlamaForCausalLM",
            "dtype": "bfloat16",
            "logits_dtype": "float32",
            "vocab_size": vocabulary,
            "max_position_embeddings": 128,
            "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1, "cp_size": 1},
        },
        "build_config": {
            "max_input_len": 127,
            "max_seq_len": 128,
            "max_batch_size": 2,
            "max_beam_width": 1,
            "max_num_tokens": 256,
            "kv_cache_type": "PAGED",
            "speculative_decoding_mode": MODES.get(str(build.get("mode")), 1),
            "max_draft_len": 0,
            "weight_streaming": False,
            "plugin_config": {**plugins, **build.get("plugins", {})},
            **{name: value for name, value in build.items() if name not in ("mode", "plugins")},
        },
    }
