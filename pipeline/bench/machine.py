"""What a measurement has to say about where it was made: GPU, driver, versions, commit, date."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "megatron-core", "transformer-engine", "torchao")


def machine_lines(commit: str | None = None, packages: Sequence[str] = PACKAGES) -> list[str]:
    """Lines for the head of a table.

    Args:
        commit: of the code, for a copy that git does not know; None asks git.
        packages: distributions whose versions matter.
    """
    versions = [f"{package} {_version(package)}" for package in packages]
    return [
        f"{datetime.now(UTC):%Y-%m-%d}, {_device()}, Python {platform.python_version()}",
        ", ".join(versions),
        f"commit {commit or _commit()}",
    ]


def _device() -> str:
    if not torch.cuda.is_available():
        return f"{os.cpu_count()} CPU cores ({platform.machine()})"
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


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
