"""A process may be killed at any moment: what is served stays whole, and the same command again ends where an
undisturbed one ends."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.repository.versions import state

from .killed import count_changes, kill_before
from .made import check_loadable, make_artifact, publish_proven, tree, write_verdict

ROUNDS = int(os.environ.get("NEMOPORT_SOAK_ROUNDS", "5"))
"""Moments that are tried in each case, the same ones every time; a large number tries all of them."""


def _publish(root: Path) -> None:
    publish(root / "b", root / "repository", "m")


def _promote(root: Path) -> None:
    promote(root / "repository", "m")


def _nothing(root: Path) -> None:
    pass


def _one_live(root: Path) -> None:
    publish_proven(root / "a", root / "repository")


def _staged(root: Path) -> None:
    write_verdict(publish(root / "b", root / "repository", "m").evidence)


def _one_live_one_staged(root: Path) -> None:
    _one_live(root)
    _staged(root)


@pytest.mark.soak
@pytest.mark.parametrize(
    "before, command",
    [(_nothing, _publish), (_one_live, _publish), (_staged, _promote), (_one_live_one_staged, _promote)],
    ids=["first publish", "later publish", "first promotion", "later promotion"],
)
def test_a_killed_command_harms_nothing_and_can_be_repeated(
    tmp_path: Path, before: Callable[[Path], None], command: Callable[[Path], None]
) -> None:
    start = tmp_path / "start"
    start.mkdir()
    make_artifact(start / "a")
    make_artifact(start / "b", seed=2)
    before(start)
    live = _live(start)
    undisturbed = _copied(start, tmp_path / "undisturbed")
    changes = range(1, count_changes(command, undisturbed) + 1)

    for moment in sorted(random.Random(0).sample(changes, min(ROUNDS, len(changes)))):
        root = _copied(start, tmp_path / f"killed-{moment}")
        kill_before(moment, command, root)
        check_loadable(root / "repository")
        assert set(live) <= set(_live(root)), f"killed before change {moment}: {live} are no longer all live"
        command(root)
        assert tree(root / "repository") == tree(undisturbed / "repository"), f"killed before change {moment}"
        check_loadable(root / "repository")


def _copied(start: Path, root: Path) -> Path:
    return Path(shutil.copytree(start, root))


def _live(root: Path) -> tuple[int, ...]:
    repository = root / "repository"
    return state(repository, "m").live if (repository / "m").is_dir() else ()
