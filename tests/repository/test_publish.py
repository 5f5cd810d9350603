"""A published version is staged: whole, known by its evidence, and out of every server's sight."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nemoport import artifact
from nemoport.artifact import Signature, Tensor
from nemoport.errors import DamagedInput, MachineError, PolicyError, UnsupportedInput, UsageError
from nemoport.repository import config, lock, storage
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.repository.versions import locate, models, state

from .made import LOGITS, check_loadable, make_artifact, publish_proven, tree, write_verdict


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def test_the_first_version_of_a_new_model_stays_out_of_the_repository(tmp_path: Path, repository: Path) -> None:
    published = publish(make_artifact(tmp_path / "a"), repository, "m")
    assert published.version == 1
    assert list(repository.iterdir()) == []
    assert set(tree(repository)) == {
        "repository.staging/m",
        "repository.staging/m/config.pbtxt",
        "repository.staging/m/config.values.yaml",
        "repository.staging/m/staging-1",
        "repository.staging/m/staging-1/model.onnx",
        "repository.staging/m/staging-1/model.onnx.data",
        "repository.evidence/m",
        "repository.evidence/m/history.jsonl",
        "repository.evidence/m/1",
        "repository.evidence/m/1/sbom.cdx.json",
        "repository.evidence/m/1/statement.intoto.json",
        "repository.evidence/m/1/manifest.json",
        "repository.evidence/m/1/ledger.jsonl",
        "repository.evidence/m/1/origin.json",
    }


def test_a_later_version_is_staged_inside_its_model(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "a"), repository)
    published = publish(make_artifact(tmp_path / "b", seed=2), repository, "m")
    assert published.path == repository / "m" / "staging-2"
    assert state(repository, "m").live == (1,)
    check_loadable(repository)


def test_the_same_bytes_are_the_same_version(tmp_path: Path, repository: Path) -> None:
    first = publish(make_artifact(tmp_path / "a"), repository, "m")
    before = tree(repository)
    again = publish(tmp_path / "a", repository, "m")
    assert (again.version, again.path, again.already) == (first.version, first.path, True)
    assert tree(repository) == before


def test_two_artifacts_are_two_versions_of_a_new_model(tmp_path: Path, repository: Path) -> None:
    publish(make_artifact(tmp_path / "a"), repository, "m")
    assert publish(make_artifact(tmp_path / "b", seed=2), repository, "m").version == 2
    assert state(repository, "m").staged == (1, 2)


def test_a_number_is_never_used_twice(tmp_path: Path, repository: Path) -> None:
    publish(make_artifact(tmp_path / "a"), repository, "m")
    second = publish(make_artifact(tmp_path / "b", seed=2), repository, "m")
    shutil.rmtree(second.path)
    assert publish(tmp_path / "b", repository, "m").version == 3


def test_a_verdict_and_the_origin_come_along(tmp_path: Path, repository: Path) -> None:
    made = make_artifact(tmp_path / "a")
    write_verdict(made)
    (made / artifact.ORIGIN).write_bytes(b"{}")
    evidence = publish(made, repository, "m").evidence
    assert {artifact.REPORT, artifact.ORIGIN} <= {path.name for path in evidence.iterdir()}


def test_an_artifact_that_differs_from_its_manifest_leaves_nothing(tmp_path: Path, repository: Path) -> None:
    made = make_artifact(tmp_path / "a")
    (made / "model.onnx.data").write_bytes(b"x" * (made / "model.onnx.data").stat().st_size)
    with pytest.raises(DamagedInput, match=r"weights in model.onnx.data differs from its digest"):
        publish(made, repository, "m")
    assert tree(repository) == {}


@pytest.mark.parametrize("name", ["", "../m", "a/b", ".hidden", "with space", "-flag"])
def test_a_name_that_is_no_directory_name_is_refused(tmp_path: Path, repository: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a model"):
        publish(make_artifact(tmp_path / "a"), repository, name)


@pytest.mark.parametrize("name", ["lock", "evidence", "model", "staging-1", "7"])
def test_any_other_name_is_only_a_name(tmp_path: Path, repository: Path, name: str) -> None:
    assert publish_proven(make_artifact(tmp_path / "a"), repository, name) == 1
    assert models(repository) == (name,)
    check_loadable(repository)


def test_an_artifact_of_another_signature_needs_another_name(tmp_path: Path, repository: Path) -> None:
    publish(make_artifact(tmp_path / "a"), repository, "m")
    before = tree(repository)
    other = Signature(inputs=(Tensor("input_ids", "int32", ("batch", "sequence")),), outputs=(LOGITS,))
    with pytest.raises(PolicyError, match=r"TYPE_INT32.*publish it under another name"):
        publish(make_artifact(tmp_path / "b", signature=other), repository, "m")
    assert tree(repository) == before


def test_the_batch_size_of_a_model_is_set_once(tmp_path: Path, repository: Path) -> None:
    publish(make_artifact(tmp_path / "a"), repository, "m", max_batch_size=4)
    assert state(repository, "m").config.max_batch_size == 4
    publish(make_artifact(tmp_path / "b", seed=2), repository, "m", max_batch_size=4)
    with pytest.raises(UsageError, match="has max_batch_size 4"):
        publish(make_artifact(tmp_path / "c", seed=3), repository, "m", max_batch_size=16)


def test_a_model_that_does_not_list_its_versions_is_left_alone(tmp_path: Path, repository: Path) -> None:
    (repository / "m/1").mkdir(parents=True)
    with pytest.raises(UnsupportedInput, match=r"config.pbtxt is missing"):
        publish(make_artifact(tmp_path / "a"), repository, "m")
    (repository / "m" / config.FILE).write_text('name: "m"\n')
    with pytest.raises(UnsupportedInput, match="does not list its versions"):
        publish(tmp_path / "a", repository, "m")


def test_a_version_is_located_by_its_directory_or_as_the_newest(tmp_path: Path, repository: Path) -> None:
    publish(make_artifact(tmp_path / "a"), repository, "m")
    assert locate(repository, "m", None).directory == "staging-1"
    write_verdict(locate(repository, "m", "staging-1").evidence)
    promote(repository, "m")
    assert locate(repository, "m", None).directory == "1"
    publish(make_artifact(tmp_path / "b", seed=2), repository, "m")
    newest = locate(repository, "m", None)
    assert (newest.model, newest.directory, newest.version) == (repository / "m", "staging-2", 2)
    assert locate(repository, "m", "1").directory == "1"
    with pytest.raises(UsageError, match="no version 9; it has 1, staging-2"):
        locate(repository, "m", "9")
    with pytest.raises(UsageError, match="no model 'n'; it has m"):
        locate(repository, "n", None)


def test_what_a_killed_process_left_is_gone_after_the_next_publish(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "a"), repository)
    before = tree(repository)
    stale = tmp_path / "repository.staging/.publish-999999999/model"
    stale.mkdir(parents=True)
    (tmp_path / "repository.evidence/..journal.999999999").write_text("half")
    (repository / "m/.config.pbtxt.999999999").write_text("half")
    publish(tmp_path / "a", repository, "m")
    assert tree(repository) == before


def test_one_process_at_a_time_changes_a_repository(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0)
    made = make_artifact(tmp_path / "a")
    with (
        storage.changing(repository, "m"),
        pytest.raises(MachineError, match=f"another nemoport \\(.*, process {os.getpid()}, since 2"),
    ):
        publish(made, repository, "m")


PUBLISH = """
import sys
from pathlib import Path
from nemoport.errors import MachineError
from nemoport.repository.publish import publish

artifact, repository, mount = map(Path, sys.argv[1:])
try:
    publish(artifact, repository, "m")
except MachineError as error:
    print(error)
for path in sorted(mount.rglob("*")):
    print(path.relative_to(mount))
"""


def _publish_to_a_mount(tmp_path: Path, options: str, repository: str) -> tuple[str, list[str]]:
    """The error's sentence, and what is left on the small file system."""
    made, mount = make_artifact(tmp_path / "a"), tmp_path / "mount"
    mount.mkdir()
    (made / artifact.ORIGIN).write_bytes(bytes(100_000))
    inside = f'mount -t tmpfs -o {options} none "{mount}" && exec "$0" "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", inside, sys.executable]
    if not shutil.which("unshare") or subprocess.run([*command, "-c", ""], capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here: unshare --user --mount is not allowed")
    arguments = [str(made), str(mount / repository), str(mount)]
    done = subprocess.run([*command, "-c", PUBLISH, *arguments], capture_output=True, text=True, check=True)
    sentence, *left = done.stdout.splitlines()
    return sentence, left


@pytest.mark.parametrize(
    "options, reason", [("size=4k", "bytes free and the version needs"), ("nr_inodes=9", "the disk is full; make room")]
)
def test_a_full_disk_is_one_sentence_and_leaves_no_version(tmp_path: Path, options: str, reason: str) -> None:
    sentence, left = _publish_to_a_mount(tmp_path, options, "repository")
    assert reason in sentence
    assert left == ["repository", "repository.evidence", "repository.evidence/.lock", "repository.staging"]


def test_a_repository_that_is_a_mount_is_refused(tmp_path: Path) -> None:
    sentence, left = _publish_to_a_mount(tmp_path, "size=1m", ".")
    assert "use a directory inside the mount as the repository" in sentence
    assert left == []
