"""Generated configs, for every kind: tuned from the manifest, judged by a real tritonserver, edited by their owner."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from tritonserver import tritonserver

from nemoport import artifact, compatibility
from nemoport.artifact import Artifact, Signature, Tensor
from nemoport.compatibility import instead, triton
from nemoport.errors import DamagedInput, PolicyError, UnsupportedInput, UsageError
from nemoport.repository import config, values
from nemoport.repository.kinds import KINDS
from nemoport.repository.labels import label
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.repository.regenerate import keep, regenerate
from nemoport.repository.verify import verify
from nemoport.repository.versions import state
from nemoport.spec import Plan

from .made import SPEC, check_loadable, make_artifact, make_python, publish_proven, write_verdict

WORDED = {"tokenizer", "ensemble"}
"""Those that take text, which `tests/test_text_ensemble.py` builds and serves."""
TOKENS = Tensor("input_ids", "int64", ("batch", "sequence"))
VECTOR = Tensor("embedding", "float32", ("batch", 8))
ENCODER = Signature((TOKENS,), (VECTOR,))
TEXT = Signature((Tensor("text_input", "string", ("n",)),), (Tensor("text_output", "string", ("n",)),))
CACHED = Signature((TOKENS, Tensor("past.0", "float32", ("batch", 1, "past", 4))), (VECTOR,))


def stand_in(directory: Path, kind: str, signature: Signature | None) -> Path:
    """An artifact of a kind, whose files hold nothing: for what a config says, and what is read of it."""
    directory.mkdir(parents=True)
    (directory / KINDS[kind].file).write_text("")
    (directory / artifact.LEDGER).write_text("")
    files = tuple(artifact.describe(directory / name, directory) for name in (KINDS[kind].file, artifact.LEDGER))
    made = Artifact(
        kind=kind,
        spec=SPEC,
        plan=Plan(),
        dtype="float32",
        files=files,
        loads=("Triton",),
        source={"format": "by hand"},
        signature=signature,
    )
    artifact.write_manifest(directory, made)
    return directory


def live(directory: Path, repository: Path, name: str) -> config.Config:
    write_verdict(publish(directory, repository, name).evidence)
    promote(repository, name)
    return state(repository, name).config


def test_a_real_server_takes_the_config_of_every_kind(tmp_path: Path) -> None:
    """The stand-ins for the backends judge the config and no more; python models run, so these are real."""
    repository = tmp_path / "repository"
    for kind in KINDS.keys() - {"python", "llmapi", "onnx", "tensorrt"} - WORDED:
        signature = None if KINDS[kind].completes else ENCODER
        live(stand_in(tmp_path / kind, kind, signature), repository, kind)
    edit(repository, "torchscript", model_warmup=None)  # a stand-in cannot run it
    regenerate(repository, "torchscript")
    publish_proven(make_artifact(tmp_path / "onnx"), repository, "onnx")
    for kind in ("python", "llmapi"):
        publish_proven(make_python(tmp_path / kind, kind=kind), repository, kind)
    with tritonserver(repository) as server:
        assert server.index() == {(kind, "1"): "READY" for kind in KINDS.keys() - {"tensorrt"} - WORDED}
        assert server.get("/v2/models/torchscript/config")["dynamic_batching"]
        assert [row["name"] for row in server.get("/v2/models/onnx/config")["model_warmup"]] == [
            "batch of 1",
            "batch of 8",
        ]


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_a_kind_that_needs_a_gpu_says_so_to_a_server_without_one(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    live(stand_in(tmp_path / "plan", "tensorrt", ENCODER), repository, "plan")
    with tritonserver(repository, load=["*"], exit_on_error=False) as server:
        assert server.index().get(("plan", "1")) != "READY"
        assert "no GPUs are available" in server.log.read_text()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ensemble"])
def test_what_is_tuned_follows_from_the_manifest(tmp_path: Path, kind: str) -> None:
    signature = TEXT if KINDS[kind].completes else ENCODER
    found = live(stand_in(tmp_path / kind, kind, signature), tmp_path / "repository", "m")
    group = found.tuning["instance_group"][0]
    assert group.get("kind", "KIND_AUTO") == KINDS[kind].instances
    assert ("dynamic_batching" in found.tuning) == ("model_warmup" in found.tuning) == KINDS[kind].graph
    assert found.max_batch_size == (8 if signature is ENCODER else 0)


def test_a_model_with_a_cache_is_neither_merged_nor_warmed_up(tmp_path: Path) -> None:
    found = live(stand_in(tmp_path / "a", "onnx", CACHED), tmp_path / "repository", "m")
    assert set(found.tuning) == {"instance_group"}


@pytest.mark.parametrize("kind", sorted(set(compatibility.KINDS) - KINDS.keys()))
def test_kinds_that_triton_does_not_serve_name_the_way_out(tmp_path: Path, kind: str) -> None:
    made = dataclasses.replace(artifact.read_manifest(make_artifact(tmp_path / "a")), kind=kind)
    with pytest.raises(UnsupportedInput, match=f"kind {kind} cannot be published: {instead(kind, 'triton')}$"):
        config.from_artifact(made, "m", 1)
    assert "convert with --to" in instead(kind, "triton")


def test_an_artifact_without_its_file_is_damaged(tmp_path: Path) -> None:
    made = artifact.read_manifest(make_artifact(tmp_path / "a"))
    with pytest.raises(DamagedInput, match=r"has no model\.onnx"):
        config.from_artifact(dataclasses.replace(made, files=()), "m", 1)
    with pytest.raises(DamagedInput, match="has no signature"):
        config.from_artifact(dataclasses.replace(made, signature=None), "m", 1)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    publish_proven(make_artifact(tmp_path / "a"), tmp_path / "repository")
    return tmp_path / "repository"


def edit(repository: Path, name: str = "m", /, **changes: object) -> None:
    path = repository / name / values.FILE
    path.write_text("# ours\n" + yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


def test_generating_at_once_again_changes_nothing(repository: Path) -> None:
    before = (repository / "m/config.pbtxt").read_bytes()
    assert regenerate(repository, "m").already
    assert (repository / "m/config.pbtxt").read_bytes() == before
    assert not config.edited(before.decode())


def test_edited_values_survive_and_reach_the_config_and_its_labels(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "b", seed=2), repository)
    label(repository, "m", "canary", "1")
    batching = {"max_queue_delay_microseconds": 500}
    edit(
        repository,
        max_batch_size=4,
        dynamic_batching=batching,
        model_warmup=None,
        parameters={"threads": {"string_value": "2"}},
    )
    written = (repository / "m" / values.FILE).read_bytes()
    for _ in range(2):
        regenerate(repository, "m")
        for file in ("config.pbtxt", "configs/canary.pbtxt"):
            found = config.parse((repository / "m" / file).read_text(), file)
            assert found.max_batch_size == 4
            assert found.tuning["dynamic_batching"] == {"max_queue_delay_microseconds": "500"}
            assert found.tuning["parameters"] == {"threads": {"string_value": "2"}}
            assert "model_warmup" not in found.tuning
        assert (repository / "m" / values.FILE).read_bytes() == written
    assert state(repository, "m").live == (1, 2)
    assert not [row for row in verify(repository) if row.problem]
    check_loadable(repository)
    with tritonserver(repository) as server:
        assert server.get("/v2/models/m/config")["dynamic_batching"]["max_queue_delay_microseconds"] == 500


def test_what_was_edited_in_the_config_itself_is_not_lost_silently(repository: Path) -> None:
    path = repository / "m/config.pbtxt"
    path.write_text(path.read_text().replace("max_batch_size: 8", "max_batch_size: 2"))
    with pytest.raises(UsageError, match=r"edited by hand.*config\.values\.yaml.*--force"):
        regenerate(repository, "m")
    assert "changed by hand" in str(verify(repository)[0].problem)
    keep(repository, "m")
    assert keep(repository, "m").already
    assert not [row for row in verify(repository) if row.problem]
    regenerate(repository, "m", force=True)
    assert state(repository, "m").config.max_batch_size == 8


def test_values_that_could_not_serve_a_live_version_are_refused(repository: Path) -> None:
    edit(repository, max_batch_size=0)
    before = (repository / "m/config.pbtxt").read_bytes()
    regenerate(repository, "m")  # without batching, the batch axis stands in dims: the same shapes
    assert state(repository, "m").config.inputs[0].dims == (-1, -1)
    assert (repository / "m/config.pbtxt").read_bytes() != before


@pytest.mark.parametrize(
    "text, reason",
    [
        ("max_batch: 4", r'what is no field of a config.*"max_batch"'),
        ("max_batch_size: many", "must be a whole number"),
        ("backend: vllm", "sets backend, which follows from the artifact"),
        ("[1, 2]", "holds a list"),
        ("a: [", "is not YAML"),
        ("triton_release: 24.1", "write year and month"),
        ("triton_release: '23.05'", "needs 24.10 or later"),
        ("model_metrics: {}", "model_metrics, which Triton 24.10 does not know"),
    ],
)
def test_values_that_are_wrong_are_said(text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        values.read(text, "here")


def test_a_later_release_knows_more_fields(repository: Path) -> None:
    edit(repository, model_metrics={"metric_control": []})
    with pytest.raises(UsageError, match=r"24\.10 does not know"):
        regenerate(repository, "m")
    done = regenerate(repository, "m", runtime=triton("26.07"))
    assert done.details == {"triton_release": "26.07"}
    assert "model_metrics" in state(repository, "m").config.tuning
    assert 'triton_release: "26.07"' in (repository / "m" / values.FILE).read_text()


def test_a_config_for_another_signature_is_refused(tmp_path: Path, repository: Path) -> None:
    edit(repository, input=[])
    with pytest.raises(UsageError, match="sets input"):
        regenerate(repository, "m")
    with pytest.raises(PolicyError, match="publish it under another name"):
        publish(make_artifact(tmp_path / "c", signature=Signature((TOKENS,), (VECTOR,))), repository, "m")
