"""What the backend would find out late is refused before anything is laid out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from exporters.commands import command, sentence

from .engines import engine
from .laid_out import laid_out, refused

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
