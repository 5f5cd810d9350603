"""Pipeline stages in a repository: one `build` makes a model of each stage and the ensemble that chains them, which our
runner and a real tritonserver load, and which answers what the whole graph answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tritonclient.http as triton
from exporters.commands import artifact_of, command, sentence
from numpy.typing import NDArray
from tritonserver import tritonserver
from validation.small import write

from nemoport import artifact
from nemoport.repository import config, versions
from nemoport.runner.client import Client
from nemoport.runner.serve import serving
from nemoport.runner.server import start
from nemoport.validation import Request, validate

Values = Mapping[str, NDArray[Any]]

LAYERS, PP = 5, 3
NAMES = ("tiny", *(f"tiny-stage{number}" for number in range(PP)))
PIPELINE = """
repository: repository
cache: cache
models: [{name: tiny, source: source, to: onnx, pp: 3, promote: true}]
"""
STEPS = [f"tiny {verb}" for verb in ("convert", "validate", "publish", "promote")]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model of five layers, built in three stages."""
    room = tmp_path_factory.mktemp("stages")
    write(room / "source", num_hidden_layers=LAYERS, tie_word_embeddings=True)
    (room / "pipeline.yaml").write_text(PIPELINE)
    assert statuses(room) == dict.fromkeys([*STEPS, "check"], "did")
    return room


@pytest.fixture
def repository(room: Path, tmp_path: Path) -> Path:
    """A copy, to spoil."""
    for name in ("repository", "repository.evidence"):
        shutil.copytree(room / name, tmp_path / name)
    return tmp_path / "repository"


def statuses(room: Path) -> dict[str, str]:
    told = command("build", room / "pipeline.yaml", "--json")
    assert told.exit_code == 0, told.stderr
    return {f"{step['model']} {step['verb']}".strip(): step["status"] for step in json.loads(told.stdout)["steps"]}


def of_cache(room: Path) -> Path:
    (made,) = (room / "cache").glob("tiny-*")
    return made


@pytest.fixture(scope="module")
def conversation(room: Path) -> list[tuple[Values, Values]]:
    """Requests and the answers of the whole graph: a prompt of two rows, and two steps that go on."""
    command("convert", room / "source", "--to", "onnx", "-o", room / "whole")
    session = onnxruntime.InferenceSession(room / "whole" / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = [each.name for each in session.get_outputs()]
    past = {
        each.name: np.zeros((2, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_key_values.")
    }
    asked: list[tuple[Values, Values]] = []
    total = 0
    for new in (7, 1, 3):
        total += new
        given = {
            "input_ids": np.random.default_rng(new).integers(0, 53, (2, new)),
            "attention_mask": np.ones((2, total), np.int64),
            "position_ids": np.tile(np.arange(total - new, total), (2, 1)),
            **past,
        }
        answers = dict(zip(outputs, session.run(outputs, given), strict=True))
        past = {name.replace("present.", "past_key_values."): x for name, x in answers.items() if "present." in name}
        asked.append((given, answers))
    return asked


def ask(client: Any, given: Values) -> dict[str, NDArray[Any]]:
    requested = []
    for name, array in given.items():
        requested.append(triton.InferInput(name, array.shape, "FP32" if array.dtype == np.float32 else "INT64"))
        requested[-1].set_data_from_numpy(np.ascontiguousarray(array))
    answer = client.infer("tiny", requested)
    return {each["name"]: answer.as_numpy(each["name"]) for each in answer.get_response()["outputs"]}


def test_the_runner_answers_what_the_whole_graph_answers_bit_for_bit(
    room: Path, conversation: list[tuple[Values, Values]]
) -> None:
    with serving(start([room / "repository"])) as address, Client(address) as client:
        for given, wanted in conversation:
            found = client.infer("tiny", given)
            assert found.keys() == wanted.keys()
            assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_real_tritonserver_loads_them_and_answers_the_same(
    room: Path, conversation: list[tuple[Values, Values]]
) -> None:
    with tritonserver(room / "repository") as server:
        assert server.index() == {(name, "1"): "READY" for name in NAMES}
        with triton.InferenceServerClient(server.http.removeprefix("http://")) as client:
            for given, wanted in conversation:
                found = ask(client, given)
                assert found.keys() == wanted.keys()
                for name in wanted:
                    np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=1e-5, err_msg=name)


def test_the_ledger_accounts_for_every_tensor(room: Path) -> None:
    """Of the source once; of what is written once in its file, and a tied embedding in two files."""
    made = of_cache(room)
    assert artifact_of(made).plan.pp == PP
    rows = [json.loads(line) for line in (made / artifact.LEDGER).read_text().splitlines()]
    sources = [row["source"] for row in rows if "source" in row]
    assert sorted(sources) == sorted(set(sources))
    assert len(sources) == 2 + 9 * LAYERS
    written = [(row["file"], row["target"]) for row in rows if "target" in row]
    assert len(set(written)) == len(written)
    assert [file for file, target in written if target == "embed.weight"] == [
        "stage0/model.onnx.data",
        "stage2/model.onnx.data",
    ]
    of_stages: list[str] = []
    for number in range(PP):
        evidence = versions.evidence_of(room / "repository", f"tiny-stage{number}") / "1"
        ledger = [json.loads(line) for line in (evidence / artifact.LEDGER).read_text().splitlines()]
        of_stages += [f"stage{number}/{row['file']} {row['target']}" for row in ledger if "target" in row]
    assert of_stages == [" ".join(each) for each in written]


def test_a_second_build_does_no_work(room: Path) -> None:
    assert statuses(room) == {**dict.fromkeys(STEPS, "found done"), "check": "did"}


@pytest.mark.parametrize("name", NAMES)
def test_every_model_of_them_has_a_green_verdict_on_its_bytes(name: str, room: Path) -> None:
    evidence = versions.evidence_of(room / "repository", name) / "1"
    report = json.loads((evidence / artifact.REPORT).read_bytes())
    assert report["passed"]
    assert report["artifact"] == artifact.identity(evidence)


@pytest.mark.parametrize("name", ["tiny", "tiny-stage1"])
def test_one_of_them_is_judged_in_its_row(name: str, repository: Path) -> None:
    report = validate(Request(subject=repository, model=name))
    assert report.passed, report.checks
    assert any(check.name.startswith("token by token") for check in report.checks)


def other_caches(text: str) -> str:
    """Keys of one layer for those of another: Triton takes it, names and types fit."""
    one, other, kept = "past_key_values.0.key", "past_key_values.1.key", "kept"
    for before, after in ((one, kept), (other, one), (kept, other)):
        text = text.replace(f'  value: "{before}"', f'  value: "{after}"')
    return text


def other_step(text: str) -> str:
    return text.replace('"tiny-stage1"', '"tiny-stage2"')


@pytest.mark.parametrize("spoil", [other_caches, other_step])
def test_a_row_that_is_wired_wrongly_is_red(spoil: Callable[[str], str], repository: Path) -> None:
    path = repository / "tiny" / config.FILE
    before = path.read_text()
    path.write_text(spoil(before))
    assert path.read_text() != before
    assert not validate(Request(subject=repository, model="tiny")).passed


def test_published_without_a_verdict_none_goes_live(room: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    command("convert", room / "source", "--to", "onnx", "--pp", PP, "-o", bare)
    told = command("publish", bare, "--model-repository", tmp_path / "models", "--name", "tiny", "--json")
    said = json.loads(told.stdout)
    assert [said["model"], *(stage["model"] for stage in said["stages"])] == list(NAMES)
    refused = command("repo", "promote", tmp_path / "models", "tiny-stage0")
    assert refused.exit_code == 5
    assert "never validated" in sentence(refused.stderr)
    assert validate(Request(subject=tmp_path / "models", model="tiny-stage0")).passed
    assert command("repo", "promote", tmp_path / "models", "tiny-stage0").exit_code == 0


@pytest.mark.parametrize("says", ["", "version_policy { specific { versions: [ 1 ] } }"])
def test_models_of_others_beside_them_do_not_matter(says: str, repository: Path) -> None:
    (repository / "others/1").mkdir(parents=True)
    (repository / "others" / config.FILE).write_text(f'backend: "python"\n{says}\n')
    report = validate(Request(subject=repository, model="tiny-stage1"))
    assert report.passed, report.checks


def test_a_release_that_does_not_load_them_is_refused_in_the_words_of_the_whole(room: Path, tmp_path: Path) -> None:
    more = ("--model-repository", tmp_path / "models", "--name", "tiny", "--triton-release", "24.10")
    result = command("publish", of_cache(room), *more)
    assert result.exit_code == 5
    assert f"{of_cache(room)} cannot be published as tiny" in sentence(result.stderr)
    assert not (tmp_path / "models").exists()


def test_a_stage_that_is_missing_is_named(room: Path, tmp_path: Path) -> None:
    models = tmp_path / "models"
    command("publish", of_cache(room), "--model-repository", models, "--name", "tiny")
    shutil.rmtree(models.with_name("models.staging") / "tiny-stage1")
    shutil.rmtree(models.with_name("models.evidence") / "tiny-stage1")
    (check,) = [check for check in validate(Request(subject=models, model="tiny-stage0")).checks if not check.passed]
    assert "stage 1 is not in the repository; publish their artifact again" in check.found
