"""The use of GPUs, under the names, in the units and with the label of Triton's metrics.

Triton asks DCGM (`metrics.cc` of triton-inference-server/core), which asks NVML, which is asked here. What a GPU does
not tell has no line.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from threading import Lock
from time import monotonic
from typing import Any

from nemoport.runner.devices import visible_gpus

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GpuMetric:
    name: str
    kind: str
    help: str
    ask: Callable[[Any, Any], float]
    """Of NVML and one of its devices, in the unit of the metric; a counter's is since the driver was loaded."""


GPU_METRICS = (
    GpuMetric(
        "nv_gpu_utilization",
        "gauge",
        "GPU utilization rate [0.0 - 1.0)",
        lambda nvml, device: nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100,
    ),
    GpuMetric(
        "nv_gpu_memory_total_bytes",
        "gauge",
        "GPU total memory, in bytes",
        lambda nvml, device: nvml.nvmlDeviceGetMemoryInfo(device, version=nvml.nvmlMemory_v2).total,
    ),
    GpuMetric(
        "nv_gpu_memory_used_bytes",
        "gauge",
        "GPU used memory, in bytes",
        # as nvidia-smi has it; the first version of this call counts what the driver keeps for itself
        lambda nvml, device: nvml.nvmlDeviceGetMemoryInfo(device, version=nvml.nvmlMemory_v2).used,
    ),
    GpuMetric(
        "nv_gpu_power_usage",
        "gauge",
        "GPU power usage in watts",
        lambda nvml, device: nvml.nvmlDeviceGetPowerUsage(device) / 1000,
    ),
    GpuMetric(
        "nv_gpu_power_limit",
        "gauge",
        "GPU power management limit in watts",
        lambda nvml, device: nvml.nvmlDeviceGetPowerManagementLimit(device) / 1000,
    ),
    GpuMetric(
        "nv_energy_consumption",
        "counter",
        "GPU energy consumption in joules since the Triton Server started",
        lambda nvml, device: nvml.nvmlDeviceGetTotalEnergyConsumption(device) / 1000,
    ),
)
_COUNTERS = {metric.name for metric in GPU_METRICS if metric.kind == "counter"}


@dataclass(frozen=True)
class Reading:
    """What a GPU told, by the name of the metric."""

    uuid: str
    values: Mapping[str, float]

    def lines(self, metric: GpuMetric) -> Iterator[str]:
        if metric.name in self.values:
            yield f'{metric.name}{{gpu_uuid="{self.uuid}"}} {self.values[metric.name]:.15g}'

    def since(self, start: Reading) -> Reading:
        """With counters from there on, of which one that was not told then is left out."""
        gauges = {name: value for name, value in self.values.items() if name not in _COUNTERS}
        told = _COUNTERS & self.values.keys() & start.values.keys()
        return Reading(self.uuid, gauges | {name: self.values[name] - start.values[name] for name in told})


class Gpus:
    """Asked when somebody wants to know, and not again within `interval_ms`."""

    def __init__(self, ask: Callable[[], Sequence[Reading]], interval_ms: float) -> None:
        self._ask, self._interval, self._lock = ask, interval_ms / 1000, Lock()
        self._start, self._at = ask(), monotonic()
        self._last = self._since_start(self._start)

    def read(self) -> Sequence[Reading]:
        with self._lock:
            if monotonic() - self._at >= self._interval:
                self._last, self._at = self._since_start(self._ask()), monotonic()
            return self._last

    def _since_start(self, readings: Sequence[Reading]) -> Sequence[Reading]:
        return [reading.since(start) for reading, start in zip(readings, self._start, strict=True)]


@contextmanager
def gpus(interval_ms: float) -> Iterator[Gpus | None]:
    """Those that this process may use. None where there are none; where they cannot be asked, the log says so once."""
    if not visible_gpus():
        yield None
        return
    if find_spec("pynvml") is None:
        log.warning("no metrics of GPUs: nvidia-ml-py is not installed; pip install 'nemoport[gpu]'")
        yield None
        return
    import pynvml as nvml

    try:
        nvml.nvmlInit()
        devices = _devices(nvml)
    except nvml.NVMLError as error:
        log.warning("no metrics of GPUs: NVML cannot be asked: %s", error)
        yield None
        return
    try:
        yield Gpus(lambda: [_reading(nvml, uuid, device) for uuid, device in devices.items()], interval_ms)
    finally:
        nvml.nvmlShutdown()


def _devices(nvml: Any) -> dict[str, Any]:
    """NVML's, by their UUIDs."""
    all_of_them = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    found = {nvml.nvmlDeviceGetUUID(device): device for device in all_of_them}
    return {uuid: found[uuid] for uuid in visible_uuids(list(found), os.environ.get("CUDA_VISIBLE_DEVICES"))}


def visible_uuids(uuids: Sequence[str], visible: str | None) -> list[str]:
    """Those of the machine's, in PCI order, that CUDA_VISIBLE_DEVICES names: by number, UUID or its beginning.

    As CUDA does, up to the first that is none. A slice of a GPU (`MIG-...`) is none here: NVML speaks of the whole.
    """
    if visible is None:
        return list(uuids)

    def named(name: str) -> str | None:
        if name.isdecimal():
            return uuids[int(name)] if int(name) < len(uuids) else None
        return next((uuid for uuid in uuids if name.startswith("GPU-") and uuid.startswith(name)), None)

    found = (named(name.strip()) for name in visible.split(","))
    return list(dict.fromkeys(uuid for uuid in takewhile(bool, found) if uuid))


def _reading(nvml: Any, uuid: str, device: Any) -> Reading:
    values = {}
    for metric in GPU_METRICS:
        try:
            values[metric.name] = metric.ask(nvml, device)
        except nvml.NVMLError:  # of another kind of GPU, or one that is gone
            continue
    return Reading(uuid, values)
