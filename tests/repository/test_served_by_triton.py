"""A real tritonserver, in its default mode, takes the repository as it is after every step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from urllib.request import urlopen

import pytest
from tritonserver import Refused, Server, tritonserver

from nemoport.repository.labels import label
from nemoport.repository.promote import promote
from nemoport.repository.publish import publish
from nemoport.repository.verify import admit, verify
from nemoport.repository.versions import staging_area, state
from nemoport.runner.model import LoadOptions
from nemoport.runner.serve import serving
from nemoport.runner.server import start

from .made import make_artifact, make_python, publish_proven, write_verdict


def _answer(server: Server, version: str = "") -> tuple[str, Sequence[float]]:
    """The version that answered, and its logits for the token 3."""
    pinned = f"/versions/{version}" if version else ""
    tensor = {"name": "input_ids", "datatype": "INT64", "shape": [1, 1], "data": [3]}
    answer = server.post(f"/v2/models/m{pinned}/infer", {"inputs": [tensor]})
    return answer["model_version"], answer["outputs"][0]["data"]


def test_a_server_takes_the_repository_after_every_step(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    first = publish(make_artifact(tmp_path / "a"), repository, "m")
    with tritonserver(repository) as server:
        assert server.index() == {}

    write_verdict(first.evidence)
    promote(repository, "m")
    with tritonserver(repository) as server:
        assert server.index() == {("m", "1"): "READY"}
        assert server.get("/v2/models/m")["inputs"] == [{"name": "input_ids", "datatype": "INT64", "shape": [-1, -1]}]
        assert server.get("/v2/models/m/config")["max_batch_size"] == 8
        assert _answer(server) == ("1", [3, 6, 9, 12, 15])

    second = publish(make_artifact(tmp_path / "b", seed=2), repository, "m")
    with tritonserver(repository) as server:
        assert server.index() == {("m", "1"): "READY"}
        assert "ignore version directory 'staging-2'" in server.log.read_text()

    write_verdict(second.evidence)
    promote(repository, "m")
    with tritonserver(repository) as server:
        assert server.index() == {("m", "1"): "READY", ("m", "2"): "READY"}
        assert _answer(server) == ("2", [6, 12, 18, 24, 30])
        assert _answer(server, "1") == ("1", [3, 6, 9, 12, 15])


def test_a_running_server_follows_a_promotion_when_it_is_told_to_load(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    publish_proven(make_artifact(tmp_path / "a"), repository)
    with tritonserver(repository, load=["*"]) as server:
        publish_proven(make_artifact(tmp_path / "b", seed=2), repository)
        assert _answer(server)[0] == "1"
        server.post("/v2/repository/models/m/load", {})
        assert _answer(server)[0] == "2"


def test_an_interrupted_promotion_is_not_served(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    publish_proven(make_artifact(tmp_path / "a"), repository)
    publish(make_artifact(tmp_path / "b", seed=2), repository, "m").path.rename(repository / "m/2")
    with tritonserver(repository) as server:
        assert server.index() == {("m", "1"): "READY"}


def test_a_model_without_a_live_version_at_the_root_would_stop_the_server(tmp_path: Path) -> None:
    """Why the first version of a new model is staged beside the repository."""
    repository = tmp_path / "repository"
    publish(make_artifact(tmp_path / "a"), repository, "m")
    (staging_area(repository) / "m").rename(repository / "m")
    assert state(repository, "m").live == ()
    with pytest.raises(Refused, match="at least one version must be available"), tritonserver(repository):
        pass


def test_evidence_at_the_root_would_stop_the_server(tmp_path: Path) -> None:
    """Why evidence lies beside the repository."""
    repository = tmp_path / "repository"
    publish_proven(make_artifact(tmp_path / "a"), repository)
    (repository / ".evidence").mkdir()
    with pytest.raises(Refused, match="failed to load all models"), tritonserver(repository):
        pass


def test_one_tree_serves_stable_and_canary(tmp_path: Path) -> None:
    """The label's config, with --model-config-name, on a real server and on ours; a name without a config is stable."""
    repository = tmp_path / "repository"
    publish_proven(make_python(tmp_path / "a"), repository)
    write_verdict(publish(make_python(tmp_path / "b", seed=2), repository, "m").evidence)
    label(repository, "m", "canary", "2")
    body = {"inputs": [{"name": "X", "datatype": "FP32", "shape": [1], "data": [3.0]}]}
    for name, index, answer in (("", ["1"], 3), ("canary", ["1", "2"], 6), ("other", ["1"], 3)):
        with tritonserver(repository, config_name=name) as server:
            assert sorted(version for _, version in server.index()) == index
            assert server.post("/v2/models/m/infer", body)["outputs"][0]["data"] == [answer]
        ours = start([repository], LoadOptions(model_config_name=name))
        assert sorted(row["version"] for row in ours.index()) == index
        with serving(ours) as address, urlopen(f"http://{address}/v2/models/m/infer", json.dumps(body).encode()) as got:
            assert json.loads(got.read())["outputs"][0]["data"] == [answer]
        ours.close()


def test_a_repository_that_was_served_is_still_verified(tmp_path: Path) -> None:
    """A server puts compiled modules beside a python model. They are no problem, and are gone before a server that
    wants verified models loads it, because Python would run them in place of the source."""
    repository = tmp_path / "repository"
    publish_proven(make_python(tmp_path / "a"), repository)
    with tritonserver(repository):
        pass
    assert list(repository.rglob("*.pyc"))
    assert [row.problem for row in verify(repository)] == [None, None]
    admit(repository / "m")
    assert not list(repository.rglob("*.pyc"))
