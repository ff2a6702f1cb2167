"""Versions, commit and host of a process: what one has to know to repeat a run."""

import platform
import shlex
import socket
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("qsparse", "torch", "megatron-core", "triton", "transformer-engine", "mlflow", "numpy", "tokenizers")


def describe_environment() -> dict[str, str]:
    """Facts about this process as strings, packages that are not installed left out."""
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "commit": git_commit(),
    }
    return facts | {name: found for name in PACKAGES if (found := _version(name))}


def git_commit() -> str:
    """Commit of the source tree, with `+` if it has changes; "unknown" outside a repository."""
    root = Path(__file__).parent
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return result.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
