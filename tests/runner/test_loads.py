"""Loads at once: what waits for which, and what does not."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc

from nemoport.runner.name_locks import NameLocks, WaitsForItself
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import request_of
from nemoport.runner.serve import Addresses, serving_all
from nemoport.runner.server import Server, start

from .models import linear, write_model
from .python_models import ADD_SUB, ECHO, TEXT, TEXT_CONFIG, X_CONFIG, write_python
from .test_control import until
from .test_ending import INITIALIZES, write
from .test_ensembles import FIRST, SECOND, ensemble, step
from .test_http import ask

LOAD = "/v2/repository/models/{}/load"


@contextmanager
def loading(server: Server, root: Path, *names: str) -> Iterator[Addresses]:
    """While models that do not come to an end of their initialization are loaded; after the block they do."""
    with serving_all(server) as addresses, ThreadPoolExecutor(max(len(names), 1)) as pool:
        replies = [pool.submit(ask, addresses.http, LOAD.format(name), b"") for name in names]
        until((root / "begun").exists)
        try:
            yield addresses
        finally:
            (root / "go").touch()
        assert {reply.result(30).status for reply in replies} == {200}


def test_a_load_waits_for_no_other_model(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write(repository, "slow", INITIALIZES)
    write_model(repository, "there", linear())
    write_model(repository, "new", linear())
    write_python(repository, "echo", ECHO, X_CONFIG)
    write_python(repository, "text", TEXT, TEXT_CONFIG, words="SUFFIX = '1'")
    write_python(repository, "add_sub", ADD_SUB)
    (repository / "good/1").mkdir(parents=True)
    (repository / "good/config.pbtxt").write_text(ensemble(FIRST, SECOND))
    server = start([repository], explicit=True, load_model=["there"])
    with loading(server, tmp_path, "slow") as addresses:
        for name in ("there", "new", "echo", "text", "good"):
            assert ask(addresses.http, LOAD.format(name), b"").status == 200
        assert ask(addresses.http, "/v2/repository/models/new/unload", b"").status == 200
        assert {row["name"]: row.get("state") for row in ask(addresses.http, "/v2/repository/index", b"").json} == {
            **dict.fromkeys(("there", "echo", "text", "good", "add_sub"), "READY"),
            "new": "UNAVAILABLE",
            "slow": None,
        }


def test_loads_of_one_model_at_once_load_it_once(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    counted = 'with Path(place, "begun").open("a") as begun: begun.write("b")'
    code = INITIALIZES.replace('Path(place, "begun").touch()', counted)
    write(repository, "slow", code)
    server = start([repository], explicit=True)
    with loading(server, tmp_path, "slow", "slow", "slow"):
        pass
    assert (tmp_path / "begun").read_text() == "b"


def test_requests_wait_for_no_load(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    write(repository, "slow", INITIALIZES)
    write_model(repository, "m", linear(), "max_batch_size: 30000")
    server = start([repository], explicit=True, load_model=["m"])
    rows = 30_000  # more than is read without a thread
    body = json.dumps(
        {"inputs": [{"name": "X", "datatype": "FP32", "shape": [rows, 4], "data": [1] * 4 * rows}]}
    ).encode()
    with loading(server, tmp_path, *["slow"] * 9) as addresses:
        assert ask(addresses.http, "/v2/models/m/infer", body).status == 200
        assert ask(addresses.http, "/v2/repository/index", b"").status == 200
        with tritonclient.grpc.InferenceServerClient(addresses.grpc) as client:
            assert client.get_model_repository_index(client_timeout=20).models


def test_modules_of_one_name_stay_apart_where_models_load_at_once(tmp_path: Path) -> None:
    for at in range(6):
        write_python(tmp_path, f"m{at}", TEXT, TEXT_CONFIG, words=f"import time\ntime.sleep(0.01)\nSUFFIX = '{at}'")
    server = start([tmp_path], explicit=True)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(server.load, [f"m{at}" for at in range(6)]))
    for at in range(6):
        made = server.infer(f"m{at}", request_of({"TEXT": np.array([[b"a"]], np.object_)})).arrays()
        assert made["UPPER"].tolist() == [[f"A{at}".encode()]]


def test_ensembles_in_a_circle_that_are_loaded_at_once_are_refused_by_name(tmp_path: Path) -> None:
    names = ("one", "two", "three")
    for name, member in zip(names, (*names[1:], names[0]), strict=True):
        config = ensemble(step("A B", "SUM D", member).replace("INPUT0", "A").replace("INPUT1", "B"))
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "config.pbtxt").write_text(config.replace('"OUTPUT0"', '"SUM"').replace('"OUTPUT1"', '"D"'))
    server = start([tmp_path], explicit=True)
    with ThreadPoolExecutor(3) as pool:
        said = [pool.submit(server.load, name).exception(20) for name in names]
    assert all(isinstance(each, Refusal) for each in said)
    assert any("circular dependency between ensembles" in row["reason"] for row in server.index())


def test_whoever_would_wait_for_itself_is_told() -> None:
    locks, both = NameLocks(), threading.Barrier(2)

    def take(first: str, second: str) -> list[str]:
        with locks.held(first):
            both.wait(10)
            try:
                with locks.held(second):
                    return []
            except WaitsForItself as refused:
                return refused.held

    with ThreadPoolExecutor(2) as pool:
        said = [pool.submit(take, *pair) for pair in (("a", "b"), ("b", "a"))]
        assert sorted(len(each.result(10)) for each in said) == [0, 1]  # one is refused, and the other goes on
    assert locks.names() == []
    with locks.held("a"), pytest.raises(WaitsForItself) as refused, locks.held("a"):
        pass
    assert refused.value.held == ["a"]
