"""The use of GPUs among the metrics: what is said, of which GPUs, and nothing where there is none."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nemoport.errors import UsageError
from nemoport.runner.devices import visible_gpus
from nemoport.runner.gpu_metrics import Gpus, Reading, visible_uuids
from nemoport.runner.metrics import exposition
from nemoport.runner.serve import ServeOptions, check_options
from nemoport.runner.server import start

from .models import linear, write_model
from .served import served
from .test_http import ask

OLD, NEW = "GPU-0e9fdafb-5adb-91cd-26a8-308d34357efc", "GPU-e35ba3d2-6eef-2bb9-e35c-6ef6eada4f11"
TOLD = f"""\
# HELP nv_gpu_utilization GPU utilization rate [0.0 - 1.0)
# TYPE nv_gpu_utilization gauge
nv_gpu_utilization{{gpu_uuid="{OLD}"}} 0.29
nv_gpu_utilization{{gpu_uuid="{NEW}"}} 0
# HELP nv_gpu_memory_total_bytes GPU total memory, in bytes
# TYPE nv_gpu_memory_total_bytes gauge
nv_gpu_memory_total_bytes{{gpu_uuid="{OLD}"}} 150754820096
# HELP nv_gpu_memory_used_bytes GPU used memory, in bytes
# TYPE nv_gpu_memory_used_bytes gauge
nv_gpu_memory_used_bytes{{gpu_uuid="{OLD}"}} 974913537
# HELP nv_gpu_power_usage GPU power usage in watts
# TYPE nv_gpu_power_usage gauge
nv_gpu_power_usage{{gpu_uuid="{OLD}"}} 55.137
# HELP nv_gpu_power_limit GPU power management limit in watts
# TYPE nv_gpu_power_limit gauge
nv_gpu_power_limit{{gpu_uuid="{OLD}"}} 700
# HELP nv_energy_consumption GPU energy consumption in joules since the Triton Server started
# TYPE nv_energy_consumption counter
nv_energy_consumption{{gpu_uuid="{OLD}"}} 12.5
"""
FULL = {
    "nv_gpu_utilization": 0.29,
    "nv_gpu_memory_total_bytes": 150754820096,
    "nv_gpu_memory_used_bytes": 974913537,
    "nv_gpu_power_usage": 55.137,
    "nv_gpu_power_limit": 700.0,
    "nv_energy_consumption": 12.5,
}


def test_a_gpu_has_a_line_for_what_it_tells_and_none_for_the_rest(tmp_path: Path) -> None:
    server = start([tmp_path])
    told = exposition(server, gpus=[Reading(OLD, FULL), Reading(NEW, {"nv_gpu_utilization": 0.0})])
    server.close()
    assert told.endswith(TOLD)
    assert told.removesuffix(TOLD) == exposition(server)


def readings(*energies: float | None) -> Iterator[list[Reading]]:
    for at, energy in enumerate(energies):
        yield [Reading(OLD, {"nv_gpu_utilization": at} | ({} if energy is None else {"nv_energy_consumption": energy}))]


def test_energy_counts_from_the_start_of_the_server() -> None:
    asked = readings(1000.5, 1000.5, 1024.0, None)
    gpus = Gpus(lambda: next(asked), interval_ms=0)
    seen = [dict(gpus.read()[0].values) for _ in range(3)]
    assert [each.get("nv_energy_consumption") for each in seen] == [0.0, 23.5, None]
    assert [each["nv_gpu_utilization"] for each in seen] == [1, 2, 3]


def test_energy_that_was_not_told_at_the_start_is_not_counted_from_nowhere() -> None:
    asked = readings(None, 1024.0)
    assert "nv_energy_consumption" not in Gpus(lambda: next(asked), interval_ms=0).read()[0].values


def test_gpus_are_not_asked_again_within_the_interval() -> None:
    asked = readings(1.0, 2.0)
    gpus = Gpus(lambda: next(asked), interval_ms=3_600_000)
    assert {gpus.read()[0].values["nv_gpu_utilization"] for _ in range(3)} == {0}


@pytest.mark.parametrize(
    "visible, named",
    [
        (None, [OLD, NEW]),
        ("", []),
        ("1", [NEW]),
        ("1, 0", [NEW, OLD]),
        ("0,-1,1", [OLD]),
        ("0,2,1", [OLD]),
        ("GPU-e35b,0,1", [NEW, OLD]),
        (f"{NEW}", [NEW]),
        ("MIG-e35ba3d2-6eef-2bb9-e35c-6ef6eada4f11", []),
    ],
)
def test_gpus_are_those_that_cuda_would_see(visible: str | None, named: list[str]) -> None:
    assert visible_uuids([OLD, NEW], visible) == named


def test_an_interval_below_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--metrics-interval-ms=-1 must be at least 0"):
        check_options(ServeOptions((Path(),), metrics_interval_ms=-1))


@pytest.mark.skipif(bool(visible_gpus()), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "promised, flags, warnings", [("", (), 0), ("0", (), 1), ("0", ("--allow-gpu-metrics=false",), 0)]
)
def test_where_nobody_can_be_asked_there_are_no_lines_and_at_most_one_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promised: str, flags: tuple[str, ...], warnings: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", promised)  # which may name a GPU that is not there
    write_model(tmp_path / "repository", "m", linear())
    with served(tmp_path / "repository", *flags, "--metrics-interval-ms=500") as (addresses, _):
        told = [ask(addresses.metrics, "/metrics").body.decode() for _ in range(2)]
    assert all("nv_inference_count{" in each for each in told)
    assert not re.search("nv_gpu|nv_energy|gpu_uuid", "".join(told))
    log = (tmp_path / "server.log").read_text()
    assert log.count("no metrics of GPUs: ") == log.count("GPU") == warnings
    assert "accepted and changes nothing" not in log


@pytest.mark.gpu
def test_memory_is_what_nvidia_smi_says(tmp_path: Path) -> None:
    write_model(tmp_path / "repository", "m", linear())
    query = ["nvidia-smi", "--query-gpu=uuid,memory.total,memory.used", "--format=csv,noheader,nounits"]
    with served(tmp_path / "repository", "--metrics-interval-ms=0") as (addresses, _):
        told = ask(addresses.metrics, "/metrics").body.decode()
        rows = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
    smi = {uuid: (int(in_all), int(taken)) for uuid, in_all, taken in (row.split(", ") for row in rows)}
    total, used = (
        dict(re.findall(rf'^nv_gpu_memory_{which}_bytes\{{gpu_uuid="(.*)"\}} (\d+)$', told, re.MULTILINE))
        for which in ("total", "used")
    )
    assert used
    for uuid in used:
        assert int(total[uuid]) // 2**20 == smi[uuid][0]
        assert int(used[uuid]) / 2**20 == pytest.approx(smi[uuid][1], rel=0.02, abs=64)  # others come and go meanwhile
        assert re.search(rf'^nv_energy_consumption\{{gpu_uuid="{uuid}"\}} [\d.]+$', told, re.MULTILINE)
