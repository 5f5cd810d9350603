"""The metrics under Triton's names, on a port of their own."""

from __future__ import annotations

import re
from pathlib import Path

from nemoport.runner.serve import serving_all
from nemoport.runner.server import start

from .models import SIMPLE_CONFIG, add_sub, linear, write_model
from .python_models import FAILING, X_CONFIG, write_python
from .test_http import ask, infer, two

LINE = re.compile(r'(?P<name>nv_\w+)\{(?P<labels>\w+="[^"]*"(?:,\w+="[^"]*")*)\} (?P<value>\d+)')


def scraped(address: str) -> dict[str, int]:
    reply = ask(address, "/metrics")
    assert reply.headers["content-type"] == "text/plain; charset=utf-8"
    found, typed = {}, set[str]()
    for line in reply.body.decode().splitlines():
        if line.startswith("# TYPE "):
            typed.add(line.split()[2])
        elif not line.startswith("#"):
            match = LINE.fullmatch(line)
            assert match, line
            assert match["name"] in typed
            found[f"{match['name']} {match['labels']}"] = int(match["value"])
    return found


def test_metrics_count_what_was_asked(tmp_path: Path) -> None:
    write_model(tmp_path, "simple", add_sub(), SIMPLE_CONFIG)
    write_model(tmp_path, "linear", linear(), "version_policy { all {} }", versions=["1", "3"])
    write_python(tmp_path, "failing", FAILING, X_CONFIG)
    of = 'model="simple",version="1"'
    with serving_all(start([tmp_path])) as addresses:
        for rows in (1, 3):
            tensors = [t | {"shape": [rows, 16], "data": [1] * 16 * rows} for t in two()]
            assert infer(addresses.http, {"inputs": tensors}).status == 200
        bad = {"name": "X", "datatype": "INT32", "shape": [1], "data": [-1]}
        assert infer(addresses.http, {"inputs": [bad]}, "failing").status == 500
        found = scraped(addresses.metrics)
        assert ask(addresses.http, "/metrics").status == 404
        assert ask(addresses.metrics, "/v2").status == 404
        assert ask(addresses.metrics, "/metrics", b"").status == 405
    assert found[f"nv_inference_request_success {of}"] == 2
    assert found[f"nv_inference_count {of}"] == 4
    assert found[f"nv_inference_exec_count {of}"] == 2
    assert found[f"nv_inference_pending_request_count {of}"] == 0
    assert found[f"nv_inference_compute_infer_duration_us {of}"] > 0
    assert found[f"nv_inference_request_duration_us {of}"] >= found[f"nv_inference_compute_infer_duration_us {of}"]
    assert found['nv_inference_request_failure model="failing",reason="BACKEND",version="1"'] == 1
    assert found['nv_inference_request_success model="linear",version="3"'] == 0
