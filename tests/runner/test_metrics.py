"""The metrics under Triton's names, on a port of their own."""

from __future__ import annotations

import re
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from nemoport.runner.metrics import exposition, metrics_config
from nemoport.runner.request import Response, request_of
from nemoport.runner.serve import serving_all
from nemoport.runner.server import start

from .models import SIMPLE_CONFIG, add_sub, linear, write_model
from .python_models import FAILING, REPEAT, REPEAT_CONFIG, X_CONFIG, write_python
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
            assert re.sub(r"(_summary(_us)?)_(count|sum)$", r"\1", match["name"]) in typed
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


def test_summaries_and_first_responses_are_told_when_they_are_asked_for(tmp_path: Path) -> None:
    write_model(tmp_path, "linear", linear(), "")
    write_python(tmp_path, "repeat", REPEAT, REPEAT_CONFIG)
    server = start([tmp_path])
    x = request_of({"X": np.zeros((1, 4), np.float32)})
    for _ in range(20):
        server.infer("linear", x)
    ends: SimpleQueue[Response] = SimpleQueue()
    server.find("repeat").submit(request_of({"X": np.array([2], np.int32)}), ends.put)
    while not ends.get(timeout=10).last:
        continue
    assert "summary" not in exposition(server)
    settings = ["summary_latencies=true", "histogram_latencies=true", "counter_latencies=false"]
    told = exposition(server, metrics_config([*settings, "summary_quantiles=0.5:0.05,0.99:0.001"]))
    server.close()
    of = 'model="linear",version="1"'
    (total,) = re.findall(f"nv_inference_request_summary_us_sum{{{of}}} (.*)", told)
    middle, high = (
        int(re.findall(f'nv_inference_request_summary_us{{{of},quantile="{each}"}} (.*)', told)[0])
        for each in (0.5, 0.99)
    )
    assert f"nv_inference_request_summary_us_count{{{of}}} 20" in told
    assert 0 < int(middle) <= int(high) <= int(total)
    assert "_duration_us" not in told
    assert 'nv_inference_first_response_histogram_ms_bucket{model="repeat",version="1",le="+Inf"} 1' in told
    assert 'nv_inference_first_response_histogram_ms_count{model="linear",version="1"} 0' in told
