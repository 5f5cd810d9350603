"""`--fix` repairs what is mechanical, says what it did, and has nothing to do the second time."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemoport.check import Request, check
from nemoport.check.finding import Rewrite
from nemoport.check.repair import repair, rewritten
from nemoport.check.subject import Target

from .cases import CASES, write

REPAIRED = (
    *("unknown-field-inside", "unknown-type", "unknown-kind", "no-comma", "no-comma-in-dims", "renamed"),
    *("backend-as-platform", "misspelt-backend", "no-directory", "other-input", "other-type", "batch-repeated"),
    *("other-dims", "variable-over-fixed", "narrowed-output", "no-member"),
)
"""Whole after it, as far as they can be; `unknown-field` says max_batch_size twice then."""
STILL_WRONG = {
    "backend-as-platform": {"NP211"},
    "no-member": {"NP706"},
    "no-comma": set[str](),
}


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    request = Request(directory=tmp_path, target=Target(0))
    before = check(request)
    report, done = repair(request)
    after = tree(tmp_path)
    assert done
    assert {each.code for each in before.findings if each.repair} <= {code for each in done for code in each.codes}
    assert not [each for each in report.findings if each.repair]
    assert report.count("error") < before.count("error")
    again, nothing = repair(request)
    assert nothing == ()
    assert again.findings == report.findings
    assert tree(tmp_path) == after


@pytest.mark.parametrize("name", REPAIRED)
def test_what_is_mechanical_is_repaired(name: str, tmp_path: Path) -> None:
    write(tmp_path, name, "plan", "add")
    _, done = repair(Request(directory=tmp_path, model=name))
    left = {each.code for each in check(Request(directory=tmp_path, model=name)).findings if each.severity == "error"}
    assert left == STILL_WRONG.get(name, set())
    assert (name in STILL_WRONG) or done


def test_comments_stay_and_the_change_is_shown(tmp_path: Path) -> None:
    write(tmp_path, "add")
    config = tmp_path / "add/config.pbtxt"
    config.write_text(
        "# ours\n" + config.read_text().replace('"INPUT1" data_type: TYPE_INT32', '"INPUT1" data_type: INT32')
    )
    _, (done,) = repair(Request(directory=tmp_path, model="add"))
    assert config.read_text().startswith("# ours\n")
    assert "data_type: INT32" in done.diff
    assert "data_type: TYPE_INT32" in done.diff
    assert done.codes == ("NP105",)


def test_what_is_good_is_left_alone(tmp_path: Path) -> None:
    write(tmp_path)
    before = tree(tmp_path)
    bad = {each.model for each in check(Request(directory=tmp_path)).findings}
    repair(Request(directory=tmp_path))
    after = tree(tmp_path)
    assert {path for path in before if before[path] != after[path]} <= {
        path for path in before if path.partition("/")[0] in bad
    }
    assert len(CASES) - len(bad) > 40


def test_of_two_rewrites_that_overlap_one_is_done() -> None:
    assert rewritten("abcdef", [Rewrite(4, 5, "X"), Rewrite(0, 2, "Y"), Rewrite(1, 3, "Z")]) == "YcdXf"
