"""Models that come, change and go while the server runs."""

from __future__ import annotations

import base64
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonserver import tritonserver

from nemoport.errors import DamagedInput
from nemoport.runner.overrides import overrides_from, placed_files
from nemoport.runner.polling import poll, polling
from nemoport.runner.refusal import Code, Refusal
from nemoport.runner.request import request_of
from nemoport.runner.serve import serving_all
from nemoport.runner.server import Server, start

from .models import WEIGHT, linear, write_model
from .python_models import ADD_SUB, ECHO, X_CONFIG, write_python
from .test_http import ask

X = np.ones((1, 4), np.float32)


def scale(server: Server) -> float:
    answer = server.infer("m", request_of({"X": X})).arrays()["Y"]
    return float(answer[0, 0] / (X @ WEIGHT)[0, 0])


def test_polling_follows_the_repository(tmp_path: Path) -> None:
    model = write_model(tmp_path, "m", linear())
    server = start([tmp_path])
    poll(server)
    before = server.find("m")
    write_model(tmp_path, "m", linear(2.0), versions=["2"])
    write_model(tmp_path, "new", linear())
    assert server.find("m") is before
    poll(server)
    assert (server.find("m").version, scale(server), server.find("new").version) == (2, 2.0, 1)
    (model / "2/model.onnx").write_bytes(b"junk")
    poll(server)
    assert scale(server) == 2.0
    shutil.rmtree(model / "2")
    shutil.rmtree(tmp_path / "new")
    poll(server)
    assert (server.find("m").version, scale(server)) == (1, 1.0)
    with pytest.raises(Refusal, match="unknown model: 'new'"):
        server.find("new")


def test_polling_goes_on_by_itself(tmp_path: Path) -> None:
    write_model(tmp_path, "m", linear())
    server = start([tmp_path])
    with polling(server, 0.02):
        write_model(tmp_path, "m", linear(3.0), versions=["2"])
        until(lambda: server.find("m").version == 2)
    assert scale(server) == 3.0


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_load_of_unchanged_files_does_nothing_and_keeps_an_overridden_config(tmp_path: Path) -> None:
    write_model(tmp_path, "m", linear(), "max_batch_size: 2")
    server = start([tmp_path], explicit=True, load_model=["m"])
    before = server.find("m")
    server.load("m")
    assert server.find("m") is before
    server.load("m", overrides_from("m", {"config": '{"max_batch_size": 3}'}))
    assert server.find("m").config.max_batch_size == 3
    server.load("m")
    assert server.find("m").config.max_batch_size == 3
    write_model(tmp_path, "m", linear(), "max_batch_size: 5")
    server.load("m")
    assert server.find("m").config.max_batch_size == 5


def test_a_load_brings_its_own_files_which_go_with_it(tmp_path: Path) -> None:
    write_model(tmp_path, "m", linear(), versions=["1"])
    server = start([tmp_path], explicit=True, load_model=["m"])
    content = linear(5.0).SerializeToString()
    server.load("m", overrides_from("m", {"config": "{}", "file:7/model.onnx": base64.b64encode(content).decode()}))
    assert (server.find("m").version, scale(server)) == (7, 5.0)
    scratch = server._models["m"].scratch
    assert scratch is not None
    assert scratch.is_dir()
    server.load("m")
    assert (server.find("m").version, scale(server)) == (1, 1.0)
    assert not scratch.exists()
    server.load("elsewhere", overrides_from("elsewhere", {"config": "{}", "file:1/model.onnx": content}))
    assert server.find("elsewhere").version == 1
    server.close()


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"config": 3}, "attempt to access JSON non-string as string"),
        ({"config": "{"}, "is no ModelConfig"),
        ({"config": '{"nope": 1}'}, "is no ModelConfig"),
        ({"config": "[" * 100_000}, "is no ModelConfig"),
        ({"file:1/model.onnx": "eA=="}, "needs the parameter 'config' too"),
        ({"config": "{}", "file:1/model.onnx": "!"}, "is not base64"),
        ({"config": "{}", "file:1/model.onnx": 1}, "attempt to access JSON non-string"),
        ({"config": "{}", "file:../x": "eA=="}, "is no path inside the model"),
        ({"config": "{}", "file:/etc/x": "eA=="}, "is no path inside the model"),
        ({"config": "{}", "file:": "eA=="}, "is no path inside the model"),
        ({"config": "{}", "file:" + "n" * 256: "eA=="}, "is no path inside the model"),
        ({"config": "{}", "file:a\0b": "eA=="}, "is no path inside the model"),
        ({"zz": 3}, "unexpected parameter 'zz'"),
    ],
)
def test_overrides_that_make_no_sense_are_the_client_s_fault(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message) as refused:
        overrides_from("m", parameters)
    assert refused.value.code is Code.INVALID_ARG


def test_a_file_in_the_way_of_another_is_the_client_s_fault(tmp_path: Path) -> None:
    server = start([tmp_path], explicit=True)
    with pytest.raises(Refusal, match="its files cannot be written"):
        server.load("m", overrides_from("m", {"config": "{}", "file:1": b"", "file:1/model.onnx": b""}))


def test_a_name_that_no_file_system_holds_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(Refusal, match="its files cannot be written"):
        placed_files("m" * 300, overrides_from("m", {"config": "{}", "file:1/model.onnx": b""}))
    assert not list(tmp_path.iterdir())


def test_explicit_mode_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DamagedInput):
        start([tmp_path], explicit=True, load_model=["m"])


FILES = {"file:3/model.py": base64.b64encode(ADD_SUB.encode()).decode()}
LOADS: list[tuple[str, Any]] = [
    ("/v2/repository/models/m/load", {"parameters": {"config": '{"backend": "python", "max_batch_size": 4}'}}),
    ("/v2/models/m/config", None),
    ("/v2/repository/models/m/load", {}),
    ("/v2/models/m/config", None),
    ("/v2/repository/models/m/load", {"parameters": {"config": '{"backend": "python"}', **FILES}}),
    ("/v2/models/m", None),
    ("/v2/repository/models/m/load", {}),
    ("/v2/models/m", None),
    ("/v2/repository/models/other/load", {"parameters": {"config": '{"backend": "python"}', **FILES}}),
    ("/v2/models/other", None),
]


def test_overrides_do_what_they_do_on_triton(tmp_path: Path) -> None:
    write_python(tmp_path, "m", ADD_SUB)

    def answers(address: str) -> list[Any]:
        said = [ask(address, path, None if body is None else json.dumps(body).encode()) for path, body in LOADS]
        return [(reply.status, reply.body and reply.json) for reply in said]

    with tritonserver(tmp_path, load=["m"]) as real:
        expected = answers(real.http.removeprefix("http://"))
    with serving_all(start([tmp_path], explicit=True, load_model=["m"])) as ours:
        assert answers(ours.http) == expected


AWAY: list[tuple[str, Any]] = [
    ("/v2/repository/index", {}),
    ("/v2/repository/models/there/load", {}),
    ("/v2/repository/models/gone/load", {}),
    ("/v2/repository/models/nope/load", {}),
    ("/v2/models/gone/ready", None),
    ("/v2/repository/models/gone/unload", {}),
]


def test_a_repository_that_is_away_for_a_while_is_told_as_on_triton(tmp_path: Path) -> None:
    write_python(tmp_path / "a", "there", ADD_SUB)
    write_python(tmp_path / "b", "gone", ADD_SUB)
    repositories = [tmp_path / "a", tmp_path / "b"]

    def answers(address: str) -> list[Any]:
        """While the second is away, and when it is back."""
        said = []
        for away in ("c", "b"):
            (tmp_path / {"b": "c", "c": "b"}[away]).rename(tmp_path / away)
            until(lambda: b"UNLOADING" not in ask(address, "/v2/repository/index", b"").body)
            said += [ask(address, path, None if body is None else json.dumps(body).encode()) for path, body in AWAY]
        return [(reply.status, reply.body and reply.json) for reply in said]

    with tritonserver(repositories[0], also=repositories[1:], load=["there", "gone"]) as real:
        expected = answers(real.http.removeprefix("http://"))
    with serving_all(start(repositories, explicit=True, load_model=["there", "gone"])) as ours:
        assert answers(ours.http) == expected
    assert expected[0] == (500, {"error": f"failed to open directory {tmp_path / 'b'}"})


EXECUTE = "    def execute"
COMPLETES = "    @staticmethod\n    def auto_complete_config(config):\n        {}\n\n" + EXECUTE
FAIL = {
    "initialize": (ECHO.replace(EXECUTE, "    def initialize(self, args):\n        1 / 0\n\n" + EXECUTE), X_CONFIG),
    "complete": (ECHO.replace(EXECUTE, COMPLETES.format("1 / 0")), X_CONFIG),
    "completes-nothing": (ECHO.replace(EXECUTE, COMPLETES.format("return None")), X_CONFIG),
    "module": ("1 / 0", X_CONFIG),
    "import": ("import nowhere_at_all", X_CONFIG),
    "backend": (ECHO, X_CONFIG.replace('"python"', '"nowhere"')),
    "gpu": (ECHO, X_CONFIG + "instance_group { kind: KIND_GPU }"),
}


def test_what_keeps_a_model_from_loading_is_of_the_class_that_it_is_of_on_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name, (code, config) in FAIL.items():
        write_python(tmp_path, name, code, config)

    def classes(address: str) -> dict[str, str]:
        said = {name: ask(address, f"/v2/repository/models/{name}/load", b"").error for name in FAIL}
        return {name: error.partition("UNAVAILABLE state: ")[2].partition(":")[0] for name, error in said.items()}

    with tritonserver(tmp_path, load=[], exit_on_error=False) as real:
        expected = classes(real.http.removeprefix("http://"))
    with serving_all(start([tmp_path], explicit=True)) as ours:
        assert classes(ours.http) == expected
    assert set(expected.values()) == {"Internal", "Invalid argument"}


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_the_clients_load_with_overrides(tmp_path: Path, kind: str) -> None:
    write_model(tmp_path, "m", linear())
    server = start([tmp_path], explicit=True)
    clients: Any = {"http": tritonclient.http, "grpc": tritonclient.grpc}
    with (
        serving_all(server) as addresses,
        clients[kind].InferenceServerClient(getattr(addresses, kind)) as client,
    ):
        client.load_model(
            "m", config='{"max_batch_size": 2}', files={"file:4/model.onnx": linear(4.0).SerializeToString()}
        )
        assert (server.find("m").version, server.find("m").config.max_batch_size, scale(server)) == (4, 2, 4.0)
    server.close()
