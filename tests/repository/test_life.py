"""Rollback, retire, prune and labels; and what is remembered of them."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from nemoport import artifact
from nemoport.errors import DamagedInput, PolicyError, UsageError
from nemoport.repository import config, history
from nemoport.repository.change import PROMOTION
from nemoport.repository.compare import diff, rows
from nemoport.repository.labels import label, unlabel
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.repository.retreat import prune, retire, rollback
from nemoport.repository.verify import verify
from nemoport.repository.versions import evidence_of, models, state

from .made import check_loadable, make_artifact, make_python, publish_proven, tree, write_verdict


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def three_live(tmp_path: Path, repository: Path) -> None:
    for number in (1, 2, 3):
        publish_proven(make_artifact(tmp_path / f"a{number}", seed=number), repository)


def events(repository: Path, name: str = "m") -> list[str]:
    return [event.what for event in history.read(evidence_of(repository, name) / history.FILE)]


def listed(repository: Path, file: str = config.FILE) -> tuple[int, ...]:
    path = repository / "m" / file
    return config.parse(path.read_text(), str(path)).versions


def test_a_rollback_takes_back_the_newest_promotion_once(tmp_path: Path, repository: Path) -> None:
    three_live(tmp_path, repository)
    assert rollback(repository, "m").version == 2
    before = tree(repository)
    assert rollback(repository, "m").already
    assert tree(repository) == before
    assert (state(repository, "m").live, state(repository, "m").unlisted) == ((1, 2), (3,))
    assert rollback(repository, "m", "1").live == (1,)
    assert promote(repository, "m", "3").live == (1, 3)
    check_loadable(repository)


def test_a_version_that_was_rolled_back_is_not_what_promote_means(tmp_path: Path, repository: Path) -> None:
    three_live(tmp_path, repository)
    rollback(repository, "m")
    assert promote(repository, "m").already
    assert state(repository, "m").served == 2


def test_there_is_no_way_back_from_the_first(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "a"), repository)
    with pytest.raises(UsageError, match="serves no version before 1"):
        rollback(repository, "m")
    with pytest.raises(UsageError, match="version 7 of m is not live, only 1"):
        rollback(repository, "m", "7")


def test_a_model_leaves_with_its_last_version_and_comes_back(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "a"), repository)
    assert retire(repository, "m", "1").live == ()
    assert retire(repository, "m", "1").already
    assert list(repository.iterdir()) == []
    assert models(repository) == ("m",)
    assert promote(repository, "m", "1").live == (1,)
    check_loadable(repository)


def test_what_a_label_needs_is_not_retired(tmp_path: Path, repository: Path) -> None:
    three_live(tmp_path, repository)
    label(repository, "m", "canary", "2")
    with pytest.raises(PolicyError, match=r"needed by the label canary.*label .* m canary --remove"):
        retire(repository, "m", "2")
    retire(repository, "m", "3")
    retire(repository, "m", "1")
    assert state(repository, "m").live == (2,)
    unlabel(repository, "m", "canary")
    assert retire(repository, "m", "2").live == ()


def test_prune_keeps_the_newest_the_labelled_and_the_waiting(tmp_path: Path, repository: Path) -> None:
    publish(make_artifact(tmp_path / "a0", seed=9), repository, "m")
    three_live(tmp_path, repository)  # 2, 3 and 4
    publish(make_artifact(tmp_path / "a5", seed=5), repository, "m")
    label(repository, "m", "canary", "2")
    assert prune(repository, "m", 1).details == {"removed": [1, 3]}
    assert (state(repository, "m").live, state(repository, "m").every) == ((2, 4), (2, 4, 5))
    assert prune(repository, "m", 1).already
    assert publish(tmp_path / "a0", repository, "m").version == 6  # a number is never used again
    assert {path.name for path in (repository.parent / "repository.evidence/m").iterdir()} >= {"1", "3"}
    with pytest.raises(UsageError, match="--keep 0 would leave nothing"):
        prune(repository, "m", 0)


def test_a_canary_is_a_second_config_on_the_same_tree(tmp_path: Path, repository: Path) -> None:
    three_live(tmp_path, repository)
    with pytest.raises(PolicyError, match="never validated"):
        label(repository, "m", "canary", str(publish(make_artifact(tmp_path / "a4", seed=4), repository, "m").version))
    write_verdict(evidence_of(repository, "m") / "4")
    label(repository, "m", "canary", "staging-4")
    assert (listed(repository), listed(repository, "configs/canary.pbtxt")) == ((1, 2, 3), (1, 2, 3, 4))
    rollback(repository, "m", "1")
    assert (listed(repository), listed(repository, "configs/canary.pbtxt")) == ((1,), (1, 4))
    assert state(repository, "m").names(4) == ("canary",)
    label(repository, "m", "stable", "4")
    assert (state(repository, "m").served, state(repository, "m").names(4)) == (4, ("stable", "canary"))
    unlabel(repository, "m", "canary")
    assert not list((repository / "m/configs").iterdir())
    assert [row.problem for row in verify(repository)] == [None] * 5


def test_a_config_of_its_owner_in_that_directory_is_no_label(tmp_path: Path, repository: Path) -> None:
    three_live(tmp_path, repository)
    own = repository / "m/configs/tuned.pbtxt"
    own.parent.mkdir()
    own.write_text(config.with_versions((repository / "m/config.pbtxt").read_text(), [2], "here"))
    before = own.read_bytes()
    label(repository, "m", "canary", "2")
    assert state(repository, "m").labels == {"canary": 2}
    assert own.read_bytes() == before


def test_labels_that_cannot_be(tmp_path: Path, repository: Path) -> None:
    publish(make_artifact(tmp_path / "a"), repository, "m")
    with pytest.raises(UsageError, match="no live version for canary to stand beside"):
        label(repository, "m", "canary", "1")
    with pytest.raises(UsageError, match="cannot be a label"):
        label(repository, "m", "../m", "1")
    with pytest.raises(UsageError, match="no version 7; it has 1"):
        label(repository, "m", "canary", "7")
    with pytest.raises(UsageError, match="stable is what m serves by itself"):
        unlabel(repository, "m", "stable")


def test_a_forced_promotion_is_on_record(tmp_path: Path, repository: Path) -> None:
    published = publish(make_artifact(tmp_path / "a"), repository, "m")
    write_verdict(published.evidence, passed=False)
    promote(repository, "m", force=True)
    event = history.read(evidence_of(repository, "m") / history.FILE)[-1]
    said = {"forced": True, "verdict": "red", "artifact": artifact.identity(published.evidence)}
    assert said.items() <= event.details.items()
    assert said.items() <= json.loads((published.evidence / PROMOTION).read_bytes()).items()
    assert "@" in event.by


def test_history_tells_what_took_place_and_nothing_else(tmp_path: Path, repository: Path) -> None:
    three_live(tmp_path, repository)
    rollback(repository, "m")
    promote(repository, "m", "2")
    with pytest.raises(UsageError):
        retire(repository, "m", "9")
    assert events(repository) == ["publish", "promote"] * 3 + ["rollback"]


@pytest.mark.parametrize("change", ["drop", "edit"])
def test_a_history_that_was_changed_is_seen(tmp_path: Path, repository: Path, change: str) -> None:
    three_live(tmp_path, repository)
    path = evidence_of(repository, "m") / history.FILE
    lines = path.read_text().splitlines(keepends=True)
    lines[1:2] = [] if change == "drop" else [lines[1].replace("green", "white")]
    path.write_text("".join(lines))
    with pytest.raises(DamagedInput, match=r"event [23] does not follow from the line before it"):
        history.check(path)


def test_a_line_that_a_crash_tore_is_written_again(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "a"), repository)
    path = evidence_of(repository, "m") / history.FILE
    with path.open("a") as file:
        file.write('{"number": 3, "wh')
    publish(make_artifact(tmp_path / "b", seed=2), repository, "m")
    history.check(path)
    assert events(repository) == ["publish", "promote", "publish"]


def test_two_versions_differ_in_what_was_changed(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "a"), repository)
    published = publish(make_artifact(tmp_path / "b", seed=2), repository, "m")
    verdict = {"passed": False, "artifact": artifact.identity(published.evidence)}
    verdict |= {"checks": [{"name": "logits", "found": "KL 1"}]}
    (published.evidence / artifact.REPORT).write_text(json.dumps(verdict))
    found = {(row.about, row.what): (row.a, row.b) for row in diff(repository, "m", "1", "staging-2")}
    assert found == {("accuracy", "verdict"): (True, False), ("accuracy", "logits"): (None, "KL 1")}
    assert [(row["version"], row["state"], row["labels"], row["verdict"]) for row in rows(repository, "m")] == [
        (1, "live", ("stable",), "green"),
        (2, "staged", (), "red"),
    ]
    with pytest.raises(UsageError, match="never had a version 9"):
        diff(repository, "m", "1", "9")


def _publish_and_promote(root: Path, number: int) -> int:
    repository = root / "repository"
    published = publish(root / f"a{number}", repository, "m")
    write_verdict(published.evidence)
    promote(repository, "m", str(published.version))
    publish(root / f"b{number}", repository, f"m{number}")
    return published.version


def test_eight_writers_at_once_lose_nothing(tmp_path: Path, repository: Path) -> None:
    for number in range(8):
        make_python(tmp_path / f"a{number}", seed=number)
        make_python(tmp_path / f"b{number}", seed=number)
    with ProcessPoolExecutor(8, mp_context=get_context("forkserver")) as processes:
        versions = list(processes.map(_publish_and_promote, [tmp_path] * 8, range(8)))
    assert sorted(versions) == list(range(1, 9)) == list(state(repository, "m").live)
    assert models(repository) == ("m", *(f"m{number}" for number in range(8)))
    assert sorted(events(repository)) == ["promote"] * 8 + ["publish"] * 8
    for number, version in enumerate(versions):
        assert f"* {number})" in (repository / "m" / str(version) / "model.py").read_text()
    assert {row.problem for row in verify(repository)} == {None}
    check_loadable(repository)
