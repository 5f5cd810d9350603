"""Artifacts for engines of texts through their whole life: published, validated, promoted, checked and served; by this
runner, and by a real tritonserver with a package of this test's in the place of tensorrt_llm."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tritonserver import Server, tritonserver

from nemoport.check import Request as Look
from nemoport.check import check
from nemoport.errors import MachineError
from nemoport.exporters import convert, stream
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.runner.model import LoadOptions, load_version
from nemoport.runner.serve import serving_all
from nemoport.runner.server import start
from nemoport.spec import Plan
from nemoport.validation import Request, validate

from .test_http import Reply, ask

CHECKPOINT = Path(__file__).parents[2] / "examples/demo/checkpoint"
PROMPT = "The clever fox "
BOTH: dict[str, Any] = {"text_input": "a ", "max_tokens": 1, "exclude_input_in_output": False}

STAND_IN = '''
"""Answers with what it was made of: the prompt's words, one at a time, in capitals."""
import asyncio
import json
import os
from types import SimpleNamespace

class SamplingParams:
    def __init__(self, *, max_tokens=32, temperature=None, top_p=None, top_k=None, seed=None, stop=None):
        self.max_tokens, self.said = max_tokens, [temperature, top_p, top_k, seed, stop]

class LLM:
    def __init__(self, model, backend, tensor_parallel_size, pipeline_parallel_size):
        with open(os.path.join(model, "config.json")) as file:
            self.family = json.load(file)["model_type"]

    def generate_async(self, prompt, sampling_params, streaming):
        return Running(prompt, sampling_params, self.family)

    def shutdown(self):
        pass

class Running:
    def __init__(self, prompt, sampling, family):
        if prompt == "fail":
            raise ValueError("as asked")
        self.words = (prompt.upper().split() + [family, json.dumps(sampling.said)])[: sampling.max_tokens]
        self.given, self.aborted = 0, False

    def abort(self):
        self.aborted = True

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.given == len(self.words) or self.aborted:
            raise StopAsyncIteration
        await asyncio.sleep(0)
        self.given += 1
        reason = "length" if self.given == len(self.words) else None
        text = " ".join(self.words[: self.given])
        return SimpleNamespace(outputs=[SimpleNamespace(text=text, finish_reason=reason)])
'''


def live(kind: str, repository: Path, scratch: Path) -> Path:
    """The demo's model as one kind, validated and promoted; the live version's directory."""
    made = scratch / kind
    stream.run(convert.plan(CHECKPOINT, kind, made, plan=Plan(tp=2, dtype="float32")))
    assert validate(Request(subject=made)).passed
    publish(made, repository, "fables")
    assert validate(Request(subject=repository, model="fables", version="staging-1")).passed
    promote(repository, "fables", "1")
    report = check(Look(directory=repository))
    assert not report.findings, report.findings
    return repository / "fables/1"


def test_a_vllm_artifact_lives_through_to_an_answer_wherever_it_lies(tmp_path: Path) -> None:
    live("vllm", tmp_path / "repository", tmp_path)
    moved = (tmp_path / "repository").rename(tmp_path / "moved")
    server = start([moved])
    with serving_all(server) as addresses:
        body = json.dumps({"text_input": PROMPT, "max_tokens": 12}).encode()
        reply = ask(addresses.http, "/v2/models/fables/generate", body)
    server.close()
    assert (reply.status, reply.json["text_output"]) == (200, "Rufus loved ")


@pytest.fixture(scope="module")
def llmapi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("llmapi")
    live("llmapi", repository / "repository", repository)
    return repository / "repository"


def test_without_tensorrt_llm_the_runner_says_what_is_missing(llmapi: Path) -> None:
    with pytest.raises(MachineError, match="needs the package tensorrt_llm") as caught:
        load_version(llmapi / "fables", "1", LoadOptions())
    assert caught.value.exit_code == 4
    assert "trtllm-python-py3" in str(caught.value)


def test_a_real_server_runs_an_llmapi_artifact_and_runs_it_again_where_it_was_moved(
    llmapi: Path, tmp_path: Path
) -> None:
    """PyYAML comes along too: a container with TensorRT-LLM has it, the server of this test has not."""
    repository = tmp_path / "repository"
    shutil.copytree(llmapi, repository)
    beside = repository / "fables/1"
    (beside / "tensorrt_llm").mkdir()
    (beside / "tensorrt_llm/__init__.py").write_text(STAND_IN)
    shutil.copytree(Path(yaml.__file__).parent, beside / "yaml", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for place in ("here", "there"):
        repository = repository.rename(tmp_path / place)
        with tritonserver(repository) as server:
            config = server.get("/v2/models/fables/config")
            assert config["model_transaction_policy"]["decoupled"]
            whole = generate(server, text_input="a b", max_tokens=9, seed=2**63 + 1, stop=["x", "y"], top_k=3)
            assert whole["text_output"] == f'A B llama [null, null, 3, {2**63 + 1}, ["x", "y"]]'
            assert whole["finish_reason"] == "length"
            assert generate(server, text_input="a b", parameters={"max_tokens": 1})["text_output"] == "A"
            assert generate(server, **BOTH)["text_output"] == "a A"
            pieces = asked(server, "generate_stream", text_input="a b", max_tokens=3, stream=True).body.decode()
            events = [json.loads(line.removeprefix("data: ")) for line in pieces.split("\n\n") if line]
            assert [each["text_output"] for each in events] == ["A", " B", " llama"]
            failed = asked(server, "generate", text_input="fail")
            assert (failed.status, "ValueError: as asked" in failed.error) == (400, True)


def generate(server: Server, **fields: Any) -> dict[str, Any]:
    reply = asked(server, "generate", **fields)
    assert reply.status == 200, reply.body
    found: dict[str, Any] = reply.json
    return found


def asked(server: Server, how: str, **fields: Any) -> Reply:
    return ask(server.http.removeprefix("http://"), f"/v2/models/fables/{how}", json.dumps(fields).encode())
