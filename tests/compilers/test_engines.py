"""From a checkpoint to the repository that serves its engine: what is said on the way comes out at the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from exporters.commands import command, sentence
from exporters.conftest import Once
from exporters.fixtures import LLAMA
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from nemoport import artifact
from nemoport.spec import Attention

from .stand_ins import machine


@pytest.fixture
def engines(once: Once, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of two ranks, that look ahead."""
    machine(tmp_path / "a machine").enter(monkeypatch)
    asked = ("--max-batch-size", 4, "--speculative-decoding-mode", "lookahead_decoding", "--max-draft-len", 3)
    checkpoint = once(LLAMA["nemo2"], "trtllm", tp=2)
    ended = command("compile", checkpoint, "--to", "trtllm", "-o", tmp_path / "engines", *asked)
    assert ended.exit_code == 0, ended.stderr
    return tmp_path / "engines"


SIZES = [
    word
    for name, size in {"window_size": 2, "ngram_size": 2, "verification_set_size": 2}.items()
    for word in ("--set", f"lookahead_{name}={size}")
]


def parameters(repository: Path) -> dict[str, str]:
    text = (repository / "tensorrt_llm/config.pbtxt").read_text()
    config = text_format.Parse(text, model_config_pb2.ModelConfig())
    assert config.max_batch_size == 4
    return {name: value.string_value for name, value in config.parameters.items()}


def test_what_was_compiled_is_what_is_laid_out(engines: Path, tmp_path: Path) -> None:
    ended = command("layout", "inflight_batcher_llm", engines, "-o", tmp_path / "repository", *SIZES)
    assert ended.exit_code == 0, ended.stderr
    said = parameters(tmp_path / "repository")
    assert (said["decoding_mode"], said["lookahead_ngram_size"]) == ("lookahead", "2")
    assert "max_attention_window_size" not in said
    version = tmp_path / "repository/tensorrt_llm/1"
    assert {path.name for path in version.iterdir()} == {"config.json", "rank0.engine", "rank1.engine"}
    for path in version.iterdir():
        assert path.read_bytes() == (engines / path.name).read_bytes()


def test_the_windows_of_layers_are_told_to_the_backend(engines: Path, tmp_path: Path) -> None:
    made = artifact.read_manifest(engines)
    mixers = [block.mixer for block in made.spec.blocks]
    blocks = tuple(
        replace(block, mixer=replace(mixer, window=None if index % 2 else 16))
        for index, (block, mixer) in enumerate(zip(made.spec.blocks, mixers, strict=True))
        if isinstance(mixer, Attention)
    )
    artifact.write_manifest(engines, replace(made, spec=replace(made.spec, blocks=blocks)))
    command("layout", "inflight_batcher_llm", engines, "-o", tmp_path / "repository", *SIZES)
    said = parameters(tmp_path / "repository")
    assert said["max_attention_window_size"] == "16,128"
    assert said["enable_kv_cache_reuse"] == "false"


def test_an_engine_that_is_not_the_one_that_was_built_is_refused(engines: Path, tmp_path: Path) -> None:
    (engines / "rank1.engine").write_text("another one")
    ended = command("layout", "inflight_batcher_llm", engines, "-o", tmp_path / "repository", *SIZES)
    assert ended.exit_code == 3
    assert "rank1.engine has" in sentence(ended.stderr)
    assert not (tmp_path / "repository").exists()


def test_an_engine_cannot_be_published_as_one_model(engines: Path, tmp_path: Path) -> None:
    ended = command("publish", engines, "--model-repository", tmp_path / "repository", "--name", "m")
    assert ended.exit_code == 3
    assert "layout inflight_batcher_llm" in sentence(ended.stderr)
