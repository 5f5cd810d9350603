"""A process may be killed at any moment: what is served stays whole, old or new and nothing between, and the same
command again ends where an undisturbed one ends."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tritonserver import tritonserver

from nemoport.repository import history, values
from nemoport.repository.labels import label, unlabel
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.repository.regenerate import regenerate
from nemoport.repository.remote import connect
from nemoport.repository.retreat import prune, retire, rollback
from nemoport.repository.transfer import pull, push
from nemoport.repository.versions import evidence_of, models, state

from .killed import count_changes, kill_before
from .made import check_loadable, make_python, tree, write_verdict

KILLS = int(os.environ.get("NEMOPORT_SOAK_KILLS", "10"))
"""Kills in each test, at the same moments every time."""
AT_ONCE = 10
"""Killed repositories that one real server loads together."""


@dataclass(frozen=True)
class Case:
    versions: int
    """How many are live before the command."""
    staged: bool
    """Whether one more waits, proven."""
    run: Callable[[Path, str], object]
    prepare: Callable[[Path, str], object] = lambda root, name: None
    served: str = "repository"
    """What a server is started on."""


def _repository(root: Path) -> Path:
    return root / "repository"


def _remote(root: Path) -> str:
    return f"file://{root}/remote"


def _change_values(root: Path, name: str) -> None:
    path = _repository(root) / name / values.FILE
    path.write_text(path.read_text().replace("count: 1", "count: 2"))


def _push(root: Path, name: str) -> object:
    return push(_repository(root), connect(_remote(root)), [name])


def _pushed_and_changed(root: Path, name: str) -> None:
    _push(root, name)
    promote(_repository(root), name)


def _pull(root: Path, name: str) -> object:
    return pull(connect(_remote(root)), root / "other", [name])


CASES = {
    "first publish": Case(0, False, lambda root, name: publish(root / "next", _repository(root), name)),
    "later publish": Case(1, False, lambda root, name: publish(root / "next", _repository(root), name)),
    "first promotion": Case(0, True, lambda root, name: promote(_repository(root), name)),
    "later promotion": Case(1, True, lambda root, name: promote(_repository(root), name)),
    "rollback": Case(3, False, lambda root, name: rollback(_repository(root), name)),
    "retire": Case(2, True, lambda root, name: retire(_repository(root), name, "1")),
    "retire the last": Case(1, True, lambda root, name: retire(_repository(root), name, "1")),
    "prune": Case(3, True, lambda root, name: prune(_repository(root), name, 1)),
    "label": Case(2, True, lambda root, name: label(_repository(root), name, "canary", "3")),
    "unlabel": Case(
        2,
        True,
        lambda root, name: unlabel(_repository(root), name, "canary"),
        lambda root, name: label(_repository(root), name, "canary", "3"),
    ),
    "config": Case(1, False, lambda root, name: regenerate(_repository(root), name), _change_values),
    "first push": Case(2, False, _push, served="remote"),
    "later push": Case(1, True, _push, _pushed_and_changed, served="remote"),
    "first pull": Case(2, False, _pull, _push, served="other"),
    "later pull": Case(
        1,
        True,
        _pull,
        lambda root, name: (_push(root, name), _pull(root, name), promote(_repository(root), name), _push(root, name)),
        served="other",
    ),
}


def _run(case: str, root: Path, name: str) -> None:
    CASES[case].run(root, name)


def _start(root: Path, case: Case, name: str) -> None:
    """The state before the command; artifact N is Y = N * X."""
    root.mkdir()
    for number in range(1, case.versions + case.staged + 1):
        published = publish(make_python(root / f"v{number}", number), _repository(root), name)
        write_verdict(published.evidence)
        if number <= case.versions:
            promote(_repository(root), name)
    make_python(root / "next", 9)
    case.prepare(root, name)


def _live(root: Path, case: Case, name: str) -> tuple[int, ...]:
    place = root / case.served
    return state(place, name).live if (place / name).is_dir() else ()


@pytest.mark.soak
@pytest.mark.parametrize("which", CASES)
def test_a_killed_command_harms_nothing_and_can_be_repeated(tmp_path: Path, which: str) -> None:
    case = CASES[which]
    start = tmp_path / "root"
    _start(start, case, "m")
    before, kept = _live(start, case, "m"), Path(shutil.copytree(start, tmp_path / "kept"))
    changes = range(1, count_changes(_run, which, start, "m") + 1)
    after, whole = _live(start, case, "m"), _everything(start)

    for moment in sorted(random.Random(0).sample(changes, min(max(KILLS // 4, 2), len(changes)))):
        shutil.rmtree(start)
        shutil.copytree(kept, start)
        kill_before(moment, _run, which, start, "m")
        check_loadable(start / case.served)
        assert _live(start, case, "m") in (before, after), f"killed before change {moment}"
        case.run(start, "m")
        assert _everything(start) == whole, f"killed before change {moment}"
        for place in (_repository(start), start / "other"):
            for name in models(place):
                history.check(evidence_of(place, name) / history.FILE)


def _everything(root: Path) -> dict[str, bytes | None]:
    return {
        path: content for place in ("repository", "remote", "other") for path, content in tree(root / place).items()
    }


@pytest.mark.soak
def test_a_real_server_loads_what_a_killed_command_left_old_or_new(tmp_path: Path) -> None:
    """Each killed repository has a model of another name, so that one server takes several; in its default mode it
    does not start if a single one of them is not whole."""
    chance, killed = random.Random(1), list[tuple[Path, str, set[tuple[int, ...]]]]()
    for number in range(KILLS):
        name, which = f"m{number}", list(CASES)[(7 * number) % len(CASES)]
        case = CASES[which]
        root, undisturbed = tmp_path / f"root-{number}", tmp_path / "undisturbed"
        _start(root, case, name)
        shutil.copytree(root, undisturbed)
        old = _live(root, case, name)
        changes = count_changes(_run, which, undisturbed, name)
        new = _live(undisturbed, case, name)
        shutil.rmtree(undisturbed)
        kill_before(chance.randint(1, changes), _run, which, root, name)
        (root / case.served).mkdir(exist_ok=True)
        killed.append((root / case.served, name, {old, new}))
        if len(killed) == AT_ONCE or number == KILLS - 1:
            _check_served(killed)
            for place, *_ in killed:
                shutil.rmtree(place.parent)
            killed.clear()


def _check_served(killed: list[tuple[Path, str, set[tuple[int, ...]]]]) -> None:
    first, *others = [place for place, _, _ in killed]
    with tritonserver(first, also=others) as server:
        index = server.index()
        assert set(index.values()) <= {"READY"}
        for _, name, allowed in killed:
            found = tuple(sorted(int(version) for model, version in index if model == name))
            assert found in allowed, f"{name} serves {found}, not one of {allowed}"
            if found:
                tensor = {"name": "X", "datatype": "FP32", "shape": [1], "data": [2.0]}
                answer = server.post(f"/v2/models/{name}/infer", {"inputs": [tensor]})
                assert answer["outputs"][0]["data"] == [2.0 * found[-1]]
