"""Push, pull and verify, on S3's protocol and on a directory."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tritonserver import tritonserver

from nemoport.errors import DamagedInput, MachineError, PolicyError, UsageError
from nemoport.repository import remote as remotes
from nemoport.repository.labels import label
from nemoport.repository.lock import ourselves
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.repository.remote import Remote, connect
from nemoport.repository.retreat import rollback
from nemoport.repository.transfer import pull, push
from nemoport.repository.verify import verify, verify_remote
from nemoport.repository.versions import evidence_of, state

from . import killed
from .made import check_loadable, make_artifact, make_python, publish_proven, tree, write_verdict
from .s3 import Store, kill_at, s3_server

KILLS = int(os.environ.get("NEMOPORT_SOAK_KILLS", "10"))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with s3_server(monkeypatch) as server:
        yield server


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/far/prod"
    return str(request.getfixturevalue("store").url("prod"))


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """m: 1 and 2 live, 3 a canary; n: only staged."""
    place = tmp_path / "repository"
    for number in (1, 2):
        publish_proven(make_artifact(tmp_path / f"a{number}", seed=number), place)
    write_verdict(publish(make_artifact(tmp_path / "a3", seed=3), place, "m").evidence)
    label(place, "m", "canary", "3")
    publish(tmp_path / "a1", place, "n")
    return place


def problems(there: Remote) -> list[str | None]:
    return [row.problem for row in verify_remote(there)]


def test_what_is_pushed_is_pulled_byte_for_byte(tmp_path: Path, repository: Path, url: str) -> None:
    there = connect(url)
    (sent,) = push(repository, there, ["m"])
    assert (sent.versions, sent.files, sent.already) == ((1, 2, 3), 6, False)
    assert problems(there) == [None] * 3
    other = tmp_path / "other"
    (got,) = pull(there, other, there.models())
    assert (got.versions, got.files) == ((1, 2, 3), 6)
    found = {path.replace("other", "repository", 1): content for path, content in tree(other).items()}
    assert found == {path: content for path, content in tree(repository).items() if "/n" not in path}
    assert not [row for row in verify(other) if row.problem]
    check_loadable(other)


def test_a_second_time_nothing_goes_over_the_line(tmp_path: Path, repository: Path, url: str) -> None:
    there = connect(url)
    push(repository, there, ["m"])
    pull(there, tmp_path / "other", ["m"])
    assert [(sent.files, sent.already) for sent in push(repository, there, ["m"])] == [(0, True)]
    assert [(sent.files, sent.already) for sent in pull(there, tmp_path / "other", ["m"])] == [(0, True)]


def test_only_what_is_new_is_sent_and_a_rollback_is_only_a_config(tmp_path: Path, repository: Path, url: str) -> None:
    there = connect(url)
    push(repository, there, ["m"])
    promote(repository, "m", "3")
    (sent,) = push(repository, there, ["m"])
    assert (sent.files, sent.already) == (0, False)
    rollback(repository, "m", "1")
    push(repository, there, ["m"])
    pull(there, tmp_path / "other", ["m"])
    assert (state(tmp_path / "other", "m").live, state(tmp_path / "other", "m").labels) == ((1,), {"canary": 3})


def test_a_history_that_went_another_way_is_refused(tmp_path: Path, repository: Path, url: str) -> None:
    there, other = connect(url), tmp_path / "other"
    push(repository, there, ["m"])
    pull(there, other, ["m"])
    publish_proven(make_artifact(tmp_path / "a8", seed=8), other)
    push(other, there, ["m"])
    publish_proven(make_artifact(tmp_path / "a9", seed=9), repository)
    with pytest.raises(PolicyError, match=r"has events of m that .*repository does not"):
        push(repository, there, ["m"])
    with pytest.raises(PolicyError, match=r"has events of m that .*prod does not"):
        pull(there, repository, ["m"])


def test_bytes_that_changed_there_are_found_and_not_taken(tmp_path: Path, repository: Path, url: str) -> None:
    there = connect(url)
    push(repository, there, ["m"])
    path = f"{there.root}/m/2/model.onnx.data"
    content = there.read(path)
    assert content
    there.write(path, content[::-1])
    there.write(f"{there.root}/m/1/more.py", b"")
    assert [problem and problem.partition(" ")[0] for problem in problems(there)] == [
        f"{there.root}/m/1",
        "weights",
        None,
    ]
    with pytest.raises(DamagedInput, match="differs from its manifest"):
        pull(there, tmp_path / "other", ["m"])
    assert not list((tmp_path / "other").iterdir())
    there.write(path, content)
    assert [sent.files for sent in pull(there, tmp_path / "other", ["m"])] == [4]  # version 1 was brought before


def test_local_files_that_changed_are_not_pushed(repository: Path, url: str) -> None:
    weights = repository / "m/2/model.onnx.data"
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(DamagedInput, match="differs from its digest"):
        push(repository, connect(url), ["m"])
    assert connect(url).models() == ()


def test_one_writer_at_a_time_there_too(repository: Path, url: str) -> None:
    there = connect(url)
    elsewhere = replace(ourselves(), host="elsewhere", user="ada")
    there.write(f"{there.evidence}/.lock", json.dumps(asdict(elsewhere)).encode())
    with pytest.raises(MachineError, match="being changed by ada@elsewhere"):
        push(repository, there, ["m"])
    there.write(f"{there.evidence}/.lock", json.dumps(asdict(replace(elsewhere, until=0.0))).encode())
    push(repository, there, ["m"])
    assert there.read(f"{there.evidence}/.lock") is None


def test_what_cannot_be_pushed_or_reached(repository: Path, url: str) -> None:
    with pytest.raises(UsageError, match="n is not live"):
        push(repository, connect(url), ["n"])
    with pytest.raises(UsageError, match="has no model 'm'; it has none"):
        pull(connect(url), repository, ["m"])
    for wrong in ("s3://models", "nowhere", "nosuch://a/b"):
        with pytest.raises(UsageError):
            connect(wrong)


def test_a_name_that_leads_outside_is_refused(repository: Path, tmp_path: Path, store: Store) -> None:
    there = connect(store.url("prod"))
    push(repository, there, ["m"])
    path = f"{there.evidence}/m/2/manifest.json"
    manifest = there.read(path)
    assert manifest
    there.write(path, manifest.replace(b'"model.onnx"', b'"../../x"'))
    with pytest.raises(DamagedInput, match="outside the artifact"):
        pull(there, tmp_path / "other", ["m"])


def _push(root: Path, url: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    push(root / "repository", connect(url), ["m"])


@pytest.mark.soak
def test_a_push_that_is_killed_leaves_old_or_new_on_s3(tmp_path: Path, store: Store) -> None:
    """The server kills the client just before a write of its; what it leaves is served, and the next push ends it."""
    repository, seen = tmp_path / "repository", set[tuple[int, ...]]()
    publish_proven(make_python(tmp_path / "a1", 1), repository)
    push(repository, connect(store.url("prod")), ["m"])
    write_verdict(publish(make_python(tmp_path / "a2", 2), repository, "m").evidence)
    promote(repository, "m")
    start = {path: store.files.cat_file(path) for path in store.files.find(store.bucket)}
    store.writes.clear()
    push(repository, connect(store.url("prod")), ["m"])
    moments = range(1, len(store.writes) + 1)
    for moment in sorted(random.Random(2).sample(moments, min(max(KILLS // 3, 2), len(moments)))):
        store.files.rm(f"{store.bucket}/prod", recursive=True)
        store.files.rm(f"{store.bucket}/prod.evidence", recursive=True)
        for path, content in start.items():
            store.files.pipe_file(path, content)
        process = killed.started(_push, tmp_path, store.url("prod"), store.environment)
        kill_at(store, moment, process[0].pid)
        killed.go(process)
        store.end = None
        served = store.download("prod", tmp_path / f"seen-{moment}")
        with tritonserver(served) as server:
            live = tuple(sorted(int(version) for _, version in server.index()))
            assert set(server.index().values()) == {"READY"}
            tensor = {"name": "X", "datatype": "FP32", "shape": [1], "data": [2.0]}
            answer = server.post("/v2/models/m/infer", {"inputs": [tensor]})
            assert answer["outputs"][0]["data"] == [2.0 * live[-1]]
        seen.add(live)
        push(repository, connect(store.url("prod")), ["m"])
        assert problems(connect(store.url("prod"))) == [None] * 2
    assert seen <= {(1,), (1, 2)}


def test_a_push_of_a_new_model_to_s3_can_be_repeated_from_anywhere(tmp_path: Path, store: Store) -> None:
    """An object store cannot show a model at once: until the copy is done there, this model is not whole. The others
    are not touched, and the same command ends it."""
    repository = tmp_path / "repository"
    publish_proven(make_artifact(tmp_path / "a1", seed=1), repository)
    push(repository, connect(store.url("whole")), ["m"])
    moments = range(2, len(store.writes))
    for moment in random.Random(3).sample(moments, 2):
        prefix = f"broken-{moment}"
        process = killed.started(_push, tmp_path, store.url(prefix), store.environment)
        kill_at(store, moment, process[0].pid)
        killed.go(process)
        store.end = None
        push(repository, connect(store.url(prefix)), ["m"])
        assert problems(connect(store.url(prefix))) == [None]
        assert not store.files.find(f"{store.bucket}/{prefix}.staging")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(MachineError, match=r"fsspec.*pip install 'nemoport\[remote\]'"):
        remotes.connect("s3://models/prod")


def test_evidence_is_not_forgotten(repository: Path, url: str) -> None:
    there = connect(url)
    push(repository, there, ["m"])
    for version in ("1", "2", "3"):
        here = {path.name for path in (evidence_of(repository, "m") / version).iterdir()}
        assert set(there.sizes(f"{there.evidence}/m/{version}")) == here
