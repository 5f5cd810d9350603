"""Ensembles: the same wirings, good and bad, on a real tritonserver and on this one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonserver import tritonserver

from nemoport.runner.model import load_version
from nemoport.runner.refusal import Refusal
from nemoport.runner.request import request_of
from nemoport.runner.serve import serving
from nemoport.runner.server import start

from .models import SIMPLE_CONFIG, add_sub, write_model
from .python_models import ADD_SUB, FAILING, X_CONFIG, write_python
from .test_http import ask
from .test_same_python_models import X, infer, over_http

TENSORS = """input [ { name: "A" data_type: TYPE_INT32 dims: 16 }, { name: "B" data_type: TYPE_INT32 dims: 16 } ]
output [ { name: "SUM" data_type: TYPE_INT32 dims: 16 }, { name: "D" data_type: TYPE_INT32 dims: 16 } ]"""


def step(inputs: str, outputs: str, model: str = "add_sub", version: str = "model_version: -1") -> str:
    """`inputs` and `outputs` are the ensemble's tensors of the model's two each; - leaves one out."""
    maps = [("input_map", f"INPUT{at}", tensor) for at, tensor in enumerate(inputs.split())]
    maps += [("output_map", f"OUTPUT{at}", tensor) for at, tensor in enumerate(outputs.split())]
    mapped = " ".join(f'{kind} {{ key: "{its}" value: "{ours}" }}' for kind, its, ours in maps if ours != "-")
    return f'step {{ model_name: "{model}" {version} {mapped} }}'


def ensemble(*steps: str, tensors: str = TENSORS, rest: str = "max_batch_size: 8") -> str:
    return f'platform: "ensemble" {rest} {tensors} ensemble_scheduling {{ {" ".join(steps)} }}'


FIRST, SECOND = step("A B", "S D"), step("S B", "SUM -")  # SUM = A + B + B, D = A - B
ONE = """input { name: "A" data_type: TYPE_INT32 dims: 1 } output { name: "O" data_type: TYPE_INT32 dims: 1 }"""
FAILS = """step { model_name: "failing" model_version: -1 input_map { key: "X" value: "A" }
output_map { key: "Y" value: "O" } }"""
CONFIGS = {
    "good": ensemble(FIRST, SECOND),
    "turned": ensemble(SECOND, FIRST),
    "pin": ensemble(step("A B", "S D", version="model_version: 1"), SECOND),
    "batch0": ensemble(FIRST, SECOND, rest="", tensors=TENSORS.replace("dims: 16", "dims: [ -1, 16 ]")),
    "fails": ensemble(FAILS, tensors=ONE, rest=""),
    "whole": ensemble(step("A B", "S D", "whole_add_sub"), SECOND),
    "nested": ensemble(step("A B", "SUM D", "good").replace("INPUT0", "A").replace("INPUT1", "B"))
    .replace('"OUTPUT0"', '"SUM"')
    .replace('"OUTPUT1"', '"D"'),
    "pin9": ensemble(step("A B", "S D", version="model_version: 9"), SECOND),
    "unpinned": ensemble(step("A B", "S D", version=""), SECOND),
    "nomodel": ensemble(step("A B", "S D", "nope"), SECOND),
    "dangling": ensemble(FIRST, step("S Q", "SUM -")),
    "cycle": ensemble(step("A Z", "S D"), step("S B", "SUM Z")),
    "twice": ensemble(FIRST, step("S B", "SUM D")),
    "unused-input": ensemble(step("A A", "S D"), step("S A", "SUM -")),
    "unused-tensor": ensemble(FIRST, step("S B", "SUM Y")),
    "unmade-output": ensemble(FIRST),
    "dtype": ensemble(FIRST, SECOND, tensors=TENSORS.replace("TYPE_INT32", "TYPE_FP32", 1)),
    "dims": ensemble(FIRST, SECOND, tensors=TENSORS.replace("16", "8", 1)),
    "batch": ensemble(FIRST, SECOND, rest="max_batch_size: 16"),
    "stepless": ensemble(),
    "groups": ensemble(FIRST, SECOND, rest="max_batch_size: 8 instance_group { count: 1 }"),
    "bad-input": ensemble(FIRST.replace("INPUT1", "INPUT9"), SECOND),
    "bad-output": ensemble(FIRST.replace("OUTPUT1", "OUTPUT9"), SECOND),
    "unmapped": ensemble(step("A -", "S D"), SECOND),
    "nameless": ensemble(step("A B", "S D", ""), SECOND),
    "whole-dims": ensemble(step("A B", "SUM D", "one_add_sub")),
    "mapless": ensemble('step { model_name: "add_sub" }'),
    "self": ensemble(step("A B", "SUM D", "self")),
}
LOG_ONLY = 500
"""The status of a load whose reason a real server keeps to its log, and this one tells."""


def a_and_b(rows: int = 1) -> list[dict[str, Any]]:
    shape = {"datatype": "INT32", "shape": [rows, 16]}
    return [{"name": name, **shape, "data": [value] * 16 * rows} for name, value in (("A", 5), ("B", 2))]


CALLS = [
    *(infer(model, *a_and_b()) for model in ("good", "turned", "pin", "batch0", "whole", "whole-dims", "nested")),
    infer("good", *a_and_b(), id="e", outputs=[{"name": "D"}]),
    infer("good", a_and_b()[0]),
    *(infer(model, *a_and_b(rows=2)) for model in ("good", "whole")),
    *(infer("fails", X | {"name": "A", "data": [code]}) for code in (0, 3, 4)),
    ("/v2/models/good", None),
    ("/v2/models/good/config", None),
    ("/v2/models/good/stats", None),
    ("/v2/models/add_sub/stats", None),
]


def loads(address: str, names: Iterable[str] = CONFIGS) -> dict[str, tuple[int, str]]:
    replies = {name: ask(address, f"/v2/repository/models/{name}/load", b"") for name in names}
    return {name: (reply.status, reply.error if reply.body else "") for name, reply in replies.items()}


def answers(address: str) -> list[Any]:
    said = [over_http(address, call) for call in CALLS]
    for each in said:
        if isinstance(each.body, dict):
            each.body.pop("parameters", None)  # a real one adds the correlation of no sequence
            each.body.get("ensemble_scheduling", {}).pop("max_inflight_requests", None)  # of a newer schema
    return [(each.status, each.body) for each in said]


def test_the_same_wirings_are_loaded_refused_and_answered(tmp_path: Path) -> None:
    write_python(tmp_path, "add_sub", ADD_SUB)
    for name, dims in (("whole_add_sub", "[-1, 16]"), ("one_add_sub", "[16]")):
        unbatched = ADD_SUB.replace("[16]", dims).replace("set_max_batch_size(8)", "set_max_batch_size(0)")
        write_python(tmp_path, name, unbatched)
    write_python(tmp_path, "failing", FAILING, X_CONFIG)
    for name, config in CONFIGS.items():
        (tmp_path / name / "1").mkdir(parents=True)
        (tmp_path / name / "config.pbtxt").write_text(config)
    good = ["good", "turned", "pin", "batch0", "fails", "whole", "nested", "whole-dims"]
    with tritonserver(tmp_path, load=[], exit_on_error=False) as real:
        theirs = loads(real.http.removeprefix("http://"))
        log = real.log.read_text()
    with serving(start([tmp_path], explicit=True)) as address:
        ours = loads(address)
    assert [name for name, (status, _) in ours.items() if status == 200] == good
    for name, (status, error) in theirs.items():
        assert (name, ours[name][0]) == (name, status)
        assert ours[name][1].startswith(error.rstrip("\n"))
        if status == LOG_ONLY and name != "cycle":  # of several that are not connected, either may be named
            assert ours[name][1].partition("repository: ")[2] in log
    with tritonserver(tmp_path, load=good) as real:
        expected = answers(real.http.removeprefix("http://"))
    with serving(start([tmp_path], explicit=True, load_model=good)) as address:
        assert answers(address) == expected


def test_an_ensemble_over_onnx_goes_with_its_members(tmp_path: Path) -> None:
    config = SIMPLE_CONFIG.replace('"simple"', '"add_sub"')
    write_model(tmp_path, "add_sub", add_sub(), config)
    (tmp_path / "good/1").mkdir(parents=True)
    (tmp_path / "good/config.pbtxt").write_text(ensemble(FIRST, SECOND))
    server = start([tmp_path], explicit=True, load_model=["good"])
    ones = np.ones((3, 16), np.int32)
    asked = request_of({"A": ones * 5, "B": ones * 2})
    response = server.infer("good", asked).arrays()
    assert (response["SUM"].tolist(), response["D"].tolist()) == ((ones * 9).tolist(), (ones * 3).tolist())
    server.load("add_sub")
    assert server.infer("good", asked).arrays()["SUM"][0, 0] == 9
    server.unload("add_sub")
    with pytest.raises(Refusal, match="unknown model: 'good'"):
        server.infer("good", asked)


def test_a_member_needs_its_server(tmp_path: Path) -> None:
    (tmp_path / "good/1").mkdir(parents=True)
    (tmp_path / "good/config.pbtxt").write_text(ensemble(FIRST, SECOND))
    with pytest.raises(Exception, match="an ensemble needs its members; load it with a server"):
        load_version(tmp_path / "good", "1")
