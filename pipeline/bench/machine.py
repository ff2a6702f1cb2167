"""What a measurement has to say about where it was made: device, driver, versions, commit, date."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from pipeline.environment import git_commit

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "torchao")


def machine_lines(
    commit: str | None = None, packages: Sequence[str] = PACKAGES, device: str | None = None
) -> list[str]:
    """Lines for the head of a table.

    Args:
        commit: of the code, for a copy that git does not know; None asks git.
        packages: distributions whose versions matter.
        device: what was measured; None: the GPU, or the processor if there is none.
    """
    versions = [f"{package} {_version(package)}" for package in packages]
    return [
        f"{datetime.now(UTC):%Y-%m-%d}, {device or _gpu() or processor()}, Python {platform.python_version()}",
        ", ".join(versions),
        f"commit {commit or git_commit()}",
    ]


def processor() -> str:
    """Cores and model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else platform.processor() or platform.machine()}"


def _gpu() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader", "--id=0"]
    try:
        driver, power = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    except (OSError, ValueError, subprocess.CalledProcessError):
        driver, power = "unknown", "unknown"
    gpu = torch.cuda.get_device_properties(0)
    memory = f"{gpu.total_memory / 2**30:.0f} GiB"
    return f"{gpu.name} ({memory}, power limit {power}), driver {driver}, CUDA {torch.version.cuda}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"
