"""`nemoport repo` as scripts rely on it: one JSON object a verb, exit codes, and a line for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from repository.made import make_artifact, publish_proven, write_verdict
from repository.test_provenance import ed25519_key, write_keys

from nemoport.cli import main
from nemoport.cli.repo import repo
from nemoport.repository import values
from nemoport.repository.publish import publish


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["repo", *map(str, arguments)], prog_name="nemoport")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def said(*arguments: object) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """m: 1 and 2 live, 3 staged and proven."""
    for number in (1, 2):
        publish_proven(make_artifact(tmp_path / f"a{number}", seed=number), tmp_path / "repository")
    write_verdict(publish(make_artifact(tmp_path / "a3", seed=3), tmp_path / "repository", "m").evidence)
    return tmp_path / "repository"


@pytest.mark.parametrize("verb", sorted(repo.commands))
def test_every_verb_has_help_and_json(verb: str) -> None:
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert repo.commands[verb].help


def test_a_life_in_json(tmp_path: Path, repository: Path) -> None:
    (model,) = said("list", repository)["models"]
    assert (model["live"], model["staged"], model["labels"]) == ([1, 2], [3], {})
    assert [row["state"] for row in model["versions"]] == ["live", "live", "staged"]
    assert said("label", repository, "m", "canary", 3)["already"] is False
    assert said("promote", repository, "m", 3)["live"] == [1, 2, 3]
    assert said("rollback", repository, "m")["version"] == 2
    assert said("rollback", repository, "m")["already"] is True
    assert said("label", repository, "m", "canary", "--remove")["live"] == [1, 2]
    assert said("retire", repository, "m", 1)["live"] == [2]
    assert said("prune", repository, "--keep", 1, "--dry-run")["models"] == [{"model": "m", "removed": [1, 3]}]
    assert said("prune", repository, "m", "--keep", 1)["models"] == [{"model": "m", "removed": [1, 3]}]
    assert said("config", repository, "m")["already"] is True
    assert said("diff", repository, "m", 1, 2)["differences"] == []
    events = said("history", repository, "m")["events"]
    assert [event["what"] for event in events[-4:]] == ["rollback", "unlabel", "retire", "prune"]
    private, public = write_keys(tmp_path / "keys", ed25519_key())
    assert said("sign", repository, "m", "--key", private)["version"] == 2
    assert said("verify", repository, "--key", public)["passed"] is True


def test_a_journey_in_json(tmp_path: Path, repository: Path) -> None:
    url = f"file://{tmp_path}/far"
    assert said("push", repository, url)["models"][0]["versions"] == [1, 2]
    assert said("verify", url)["passed"] is True
    assert said("pull", url, tmp_path / "other")["models"][0]["already"] is False
    assert said("list", tmp_path / "other")["models"][0]["live"] == [1, 2]


def test_people_read_a_line_or_a_table(tmp_path: Path, repository: Path) -> None:
    assert run("promote", repository, "m").stdout == "promoted m version 3; live: 1, 2, 3\n"
    assert run("promote", repository, "m").stdout == "already: promoted m version 3; live: 1, 2, 3\n"
    assert run("rollback", repository, "m").stdout == "rolled back to m version 2; live: 1, 2\n"
    for verb in (["list"], ["history", "m"], ["verify"], ["prune", "--keep", "9"]):
        assert "m" in run(verb[0], repository, *verb[1:]).stdout
    assert run("diff", repository, "m", 1, 2).stdout == "nothing\n"
    assert "m" in run("push", repository, f"file://{tmp_path}/far").stdout


def test_exit_codes(tmp_path: Path, repository: Path) -> None:
    (repository / "m/2/model.onnx").write_bytes(b"")
    (tmp_path / "a3/model.onnx").write_bytes(b"")
    (repository / "m" / values.FILE).write_text("max_batch: 1")
    expected = {
        ("verify", repository): 1,
        ("promote", repository, "nobody"): 2,
        ("prune", repository): 2,
        ("label", repository, "m", "canary"): 2,
        ("config", repository, "m"): 2,
        ("config", repository, "m", "--keep", "--force"): 2,
        ("push", repository, "nowhere"): 2,
        ("push", repository, f"file://{tmp_path}/far"): 3,
        ("sign", repository, "m", "--key", tmp_path / "none"): 4,
        ("label", repository, "m", "canary", 3): 0,
        ("retire", repository, "m", 2): 0,
        ("retire", repository, "m", 1): 5,
    }
    assert {arguments: run(*arguments).exit_code for arguments in expected} == expected


def test_serve_refuses_what_was_changed_and_what_is_not_signed(tmp_path: Path, repository: Path) -> None:
    """Refused while loading, before any socket is answered, so the command ends."""
    quiet = ["--http-port", "0", "--allow-grpc", "false", "--allow-metrics", "false"]
    _, public = write_keys(tmp_path / "keys", ed25519_key())
    unsigned = CliRunner().invoke(main, ["serve", str(repository), *quiet, "--key", str(public)])
    assert unsigned.exit_code != 0
    assert "is not signed" in unsigned.output
    (repository / "m/2/model.py").write_text("import os")
    changed = CliRunner().invoke(main, ["serve", str(repository), *quiet, "--require-verified"])
    assert changed.exit_code != 0
    assert "model.py, which was not published" in changed.output
