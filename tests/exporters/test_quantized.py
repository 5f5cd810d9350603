"""A checkpoint that is quantized already is known for what it is, and never converted as if it were not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .commands import command, sentence
from .fixtures import HUGGINGFACE, LLAMA

MODELOPT = {
    "producer": {"name": "modelopt", "version": "0.47.0"},
    "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16},
}
"""hf_quant_config.json as ModelOpt 0.47 writes it."""


def beside(directory: Path) -> None:
    (directory / "hf_quant_config.json").write_text(json.dumps(MODELOPT))


def inside(said: dict[str, Any]) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"quantization_config": said}))

    return change


def state(directory: Path) -> None:
    (directory / "iter_0000010/modelopt_state").mkdir()


_GPTQ = {"quant_method": "gptq", "bits": 4}
_INSIDE = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": MODELOPT["producer"]}
MARKS = {
    "hf_quant_config.json": (HUGGINGFACE, beside, ("NVFP4", "FP8", "modelopt 0.47.0")),
    "config.json, modelopt": (HUGGINGFACE, inside(_INSIDE), ("FP8", None, "modelopt 0.47.0")),
    "config.json, gptq": (HUGGINGFACE, inside(_GPTQ), ("gptq", None, "gptq")),
    "modelopt_state": (LLAMA["megatron_lm"].path, state, (None, None, "modelopt")),
}


@pytest.mark.parametrize("source, mark, said", MARKS.values(), ids=MARKS)
def test_inspect_names_the_quantization_and_convert_refuses_it(
    source: Path, mark: Callable[[Path], None], said: tuple[str | None, ...], tmp_path: Path
) -> None:
    directory = shutil.copytree(source, tmp_path / "checkpoint")
    assert "quantization" not in json.loads(command("inspect", directory, "--json").stdout)
    mark(directory)
    facts = json.loads(command("inspect", directory, "--json").stdout)
    found = facts["quantization"]
    assert (found["algorithm"], found["kv_cache"], found["producer"]) == said
    assert "is quantized" in facts["problem"]
    assert "modelopt" in command("inspect", directory).stdout or said[2] == "gptq"
    for target in ("hf", "trtllm", "onnx"):
        result = command("convert", directory, "--to", target, "-o", tmp_path / "out")
        assert result.exit_code == 3
        assert "is quantized" in sentence(result.stderr)
        assert not (tmp_path / "out").exists()
