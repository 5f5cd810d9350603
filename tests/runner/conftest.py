"""The demo's trained model as every kind of artifact that answers in text, in one repository."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from nemoport.exporters import convert, stream
from nemoport.runner.serve import Addresses, serving_all
from nemoport.runner.server import start
from nemoport.spec import Plan

CHECKPOINT = Path(__file__).parents[2] / "examples/demo/checkpoint"
TEMPLATE = (
    "{% for message in messages %}{{ message.role | upper }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token }}{% endif %}"
)


@pytest.fixture(scope="session")
def fables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models `onnx`, `hf` and `trtllm` (of two ranks), in float32 and with a chat template."""
    root = tmp_path_factory.mktemp("fables")
    for kind, tp in (("onnx", 1), ("hf", 1), ("trtllm", 2)):
        made = tmp_path_factory.mktemp("made") / kind
        stream.run(convert.plan(CHECKPOINT, kind, made, plan=Plan(tp=tp, dtype="float32")))
        version = root / kind / "1"
        shutil.copytree(made, version, ignore=shutil.ignore_patterns("manifest.json", "ledger.jsonl", "origin.json"))
        (version / "chat_template.jinja").write_text(TEMPLATE)
    threads = 'backend: "onnxruntime" parameters { key: "intra_op_thread_count" value { string_value: "1" } }'
    (root / "onnx/config.pbtxt").write_text(threads)
    return root


@pytest.fixture(scope="module")
def texts(fables: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    """The fables, the same for vLLM's backend, and two models that do not answer in text."""
    root = tmp_path_factory.mktemp("texts")
    for kind in ("onnx", "hf", "trtllm"):
        shutil.copytree(fables / kind, root / kind)
    (root / "vllm/1").mkdir(parents=True)
    (root / "vllm/1/model.json").write_text(json.dumps({"model": "../../hf/1", "gpu_memory_utilization": 0.5}))
    shutil.copytree(fables / "onnx", root / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    server = start([root])
    with serving_all(server) as found:
        yield found
    server.close()


@pytest.fixture
def openai_client(texts: Addresses) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://{texts.http}/v1", api_key="none", max_retries=0) as made:
        yield made
