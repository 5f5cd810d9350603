"""Repositories around an engine, as the command lays them out or refuses to, and their configs read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporters.commands import command, sentence
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

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
