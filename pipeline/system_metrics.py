"""What the machine of rank 0 is doing, under the names that MLflow shows on its page of system metrics.

MLflow's own monitor is a thread that sends its samples itself and loses them while the server is away.  Here a sample
is taken when a record is written and travels with it: on the same step axis, through metrics.jsonl, and delivered
exactly once.  Means and sums are since the last sample.  The price is that what happens between two records of a long
interval is averaged out, and that other nodes are not seen.
"""

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

MEGABYTE = 1e6


class SystemMetrics:
    """Samples of this machine.

    Args:
        folder: Its file system is the one whose usage counts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._gpus = _Gpus()
        self._received, self._sent = _network()
        psutil.cpu_percent()  # the first call only sets the mark from which the next one counts

    def sample(self) -> dict[str, float]:
        """Metric name to value; what this machine does not tell is left out."""
        memory = psutil.virtual_memory()
        received, sent = _network()
        sample = {
            "system/cpu_utilization_percentage": psutil.cpu_percent(),
            "system/system_memory_usage_megabytes": memory.used / MEGABYTE,
            "system/system_memory_usage_percentage": memory.percent,
            "system/network_receive_megabytes": (received - self._received) / MEGABYTE,
            "system/network_transmit_megabytes": (sent - self._sent) / MEGABYTE,
            **self._gpus.sample(),
        }
        self._received, self._sent = received, sent
        with suppress(OSError):  # a network file system that is away: the run has other ways to find out
            sample["system/disk_usage_percentage"] = psutil.disk_usage(str(self._folder)).percent
        return sample


def _network() -> tuple[int, int]:
    try:
        counters = psutil.net_io_counters()
    except OSError:  # containers without /proc/net
        counters = None
    return (counters.bytes_recv, counters.bytes_sent) if counters else (0, 0)


class _Gpus:
    """All GPUs that NVIDIA's driver shows; none where its Python bindings (nvidia-ml-py) are missing."""

    def __init__(self) -> None:
        self._nvml: Any = importlib.import_module("pynvml") if importlib.util.find_spec("pynvml") else None
        self._handles: list[Any] = []
        if self._nvml is not None:
            with self._tolerant():
                self._nvml.nvmlInit()
                self._handles = list(map(self._nvml.nvmlDeviceGetHandleByIndex, range(self._nvml.nvmlDeviceGetCount())))

    def sample(self) -> dict[str, float]:
        """Each quantity by itself: a partitioned (MIG) GPU tells its memory and not its utilization."""
        sample = {}
        for index, handle in enumerate(self._handles):
            with self._tolerant():
                utilization = self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu
                sample[f"system/gpu_{index}_utilization_percentage"] = float(utilization)
            with self._tolerant():
                used = self._nvml.nvmlDeviceGetMemoryInfo(handle).used
                sample[f"system/gpu_{index}_memory_usage_megabytes"] = used / MEGABYTE
            with self._tolerant():
                sample[f"system/gpu_{index}_power_usage_watts"] = self._nvml.nvmlDeviceGetPowerUsage(handle) / 1000
        return sample

    @contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except self._nvml.NVMLError:
            return
