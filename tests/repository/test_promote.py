"""Only what was proven is promoted, and the moment of promotion is one rename."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemoport import artifact
from nemoport.errors import PolicyError, UnsupportedInput, UsageError
from nemoport.repository import config
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.repository.versions import models, state

from .made import check_loadable, make_artifact, publish_proven, tree, write_verdict


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


def test_a_promoted_version_is_live_and_the_ones_before_it_stay(tmp_path: Path, repository: Path) -> None:
    assert publish_proven(make_artifact(tmp_path / "a"), repository) == 1
    assert publish_proven(make_artifact(tmp_path / "b", seed=2), repository) == 2
    found = state(repository, "m")
    assert (found.live, found.served, found.staged, found.unlisted) == ((1, 2), 2, (), ())
    assert list((tmp_path / "repository.staging").iterdir()) == []
    check_loadable(repository)


def test_a_version_that_was_never_validated_is_refused_even_with_force(tmp_path: Path, repository: Path) -> None:
    publish(make_artifact(tmp_path / "a"), repository, "m")
    before = tree(repository)
    command = f"run: nemoport validate {repository} --model m --version staging-1"
    for force in (False, True):
        with pytest.raises(PolicyError, match="never validated") as refused:
            promote(repository, "m", force=force)
        assert str(refused.value).endswith(command)
    assert tree(repository) == before


def test_a_verdict_on_other_bytes_is_refused(tmp_path: Path, repository: Path) -> None:
    published = publish(make_artifact(tmp_path / "a"), repository, "m")
    other = make_artifact(tmp_path / "b", seed=2)
    write_verdict(other)
    (published.evidence / artifact.REPORT).write_bytes((other / artifact.REPORT).read_bytes())
    with pytest.raises(PolicyError, match="its verdict is on other bytes"):
        promote(repository, "m", force=True)


def test_a_red_verdict_is_refused_and_force_takes_it(tmp_path: Path, repository: Path) -> None:
    published = publish(make_artifact(tmp_path / "a"), repository, "m")
    write_verdict(published.evidence, passed=False)
    with pytest.raises(PolicyError, match="did not pass"):
        promote(repository, "m")
    assert promote(repository, "m", force=True).live == (1,)


@pytest.mark.parametrize("verdict", [{}, [], {"passed": True}, {"artifact": None}])
def test_a_verdict_that_says_too_little_is_refused(tmp_path: Path, repository: Path, verdict: object) -> None:
    published = publish(make_artifact(tmp_path / "a"), repository, "m")
    (published.evidence / artifact.REPORT).write_text(json.dumps(verdict))
    with pytest.raises(PolicyError, match="other bytes"):
        promote(repository, "m")


def test_only_true_is_passed(tmp_path: Path, repository: Path) -> None:
    published = publish(make_artifact(tmp_path / "a"), repository, "m")
    verdict = {"passed": "false", "artifact": artifact.identity(published.evidence)}
    (published.evidence / artifact.REPORT).write_text(json.dumps(verdict))
    with pytest.raises(PolicyError, match="did not pass"):
        promote(repository, "m")


@pytest.mark.parametrize("force", [False, True])
def test_files_that_changed_since_they_were_published_are_refused(
    tmp_path: Path, repository: Path, force: bool
) -> None:
    published = publish(make_artifact(tmp_path / "a"), repository, "m")
    write_verdict(published.evidence)
    weights = published.path / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[::-1])
    with pytest.raises(PolicyError, match=r"weights in model.onnx.data differs from its digest \(1 of 2"):
        promote(repository, "m", force=force)
    assert list(repository.iterdir()) == []


def test_a_ledger_that_changed_since_it_was_published_is_refused(tmp_path: Path, repository: Path) -> None:
    published = publish(make_artifact(tmp_path / "a"), repository, "m")
    write_verdict(published.evidence)
    other = make_artifact(tmp_path / "b", seed=2)
    for place, name in ((published.path, "model.onnx.data"), (published.evidence, artifact.LEDGER)):
        (place / name).write_bytes((other / name).read_bytes())
    with pytest.raises(PolicyError, match=r"ledger.jsonl differs from its digest"):
        promote(repository, "m")


def test_a_config_that_cannot_serve_the_version_is_refused(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "a"), repository)
    published = publish(make_artifact(tmp_path / "b", seed=2), repository, "m")
    write_verdict(published.evidence)
    path = repository / "m" / config.FILE
    path.write_text(path.read_text().replace("TYPE_INT64", "TYPE_INT32"))
    with pytest.raises(PolicyError, match=r"cannot serve version 1.*TYPE_INT32"):
        promote(repository, "m")
    assert state(repository, "m").live == (1,)


def test_what_was_edited_in_the_config_is_kept(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "a"), repository)
    path = repository / "m" / config.FILE
    path.write_text(path.read_text() + "\n# ours\noptimization { priority: PRIORITY_MAX }\n")
    publish_proven(make_artifact(tmp_path / "b", seed=2), repository)
    assert path.read_text().endswith("\n# ours\noptimization { priority: PRIORITY_MAX }\n")
    assert state(repository, "m").live == (1, 2)


def test_a_policy_that_is_not_a_list_is_not_promoted_to(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "a"), repository)
    path = repository / "m" / config.FILE
    path.write_text(path.read_text().replace("specific { versions: [ 1 ] }", "all { }"))
    with pytest.raises(UnsupportedInput, match="does not list its versions"):
        promote(repository, "m")


def test_promoting_twice_is_promoting_once(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "a"), repository)
    before = tree(repository)
    assert [promote(repository, "m", version).already for version in (None, "1", "staging-1")] == [True] * 3
    assert tree(repository) == before


def test_a_version_that_config_does_not_list_has_to_be_named(tmp_path: Path, repository: Path) -> None:
    publish_proven(make_artifact(tmp_path / "a"), repository)
    published = publish(make_artifact(tmp_path / "b", seed=2), repository, "m")
    write_verdict(published.evidence)
    published.path.rename(repository / "m" / "2")
    assert state(repository, "m").unlisted == (2,)
    assert promote(repository, "m").live == (1,)
    assert promote(repository, "m", "2").live == (1, 2)


def test_an_older_staged_version_can_be_chosen(tmp_path: Path, repository: Path) -> None:
    first = publish(make_artifact(tmp_path / "a"), repository, "m")
    publish(make_artifact(tmp_path / "b", seed=2), repository, "m")
    write_verdict(first.evidence)
    assert promote(repository, "m", "staging-1").live == (1,)
    assert state(repository, "m").staged == (2,)
    check_loadable(repository)


def test_what_is_not_there_is_named(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(UsageError, match="has no model 'm'; it has none"):
        promote(repository, "m")
    assert not repository.exists()
    publish(make_artifact(tmp_path / "a"), repository, "m")
    with pytest.raises(UsageError, match="no version 7; staged: 1, live: none"):
        promote(repository, "m", "7")
    with pytest.raises(UsageError, match="'latest' is no version"):
        promote(repository, "m", "latest")
    assert models(repository) == ("m",)
