"""`qsparse track sync`: complete MLflow's copy of runs from their directories, started as a process of its own.

Delivering needs MLflow, which nothing in this package may import; `pipeline.track_sync` takes this process's place.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.arguments import add_command
from pipeline.run_directory import RunDirectory

_EPILOG = """\
Sends what metrics.jsonl has and MLflow lacks, the files and the end status; safe to repeat, and beside a live run.

examples:
  qsparse track sync runs/quickstart
  qsparse track sync runs/*/
"""

END_TIMEOUT_S = 60.0


def add_track_parser(commands: Any) -> None:
    """Add `track` to the subparsers of `qsparse`."""
    track = add_command(commands, "track", "complete MLflow's copy of runs", _EPILOG)
    verbs = track.add_subparsers(title="commands", metavar="COMMAND", required=True)
    sync = add_command(verbs, "sync", "send to MLflow what it lacks", _EPILOG)
    sync.add_argument("run_directories", nargs="+", type=Path, metavar="RUN_DIR", help="directories of runs")
    sync.set_defaults(run=_sync)


def _sync(arguments: argparse.Namespace) -> int:
    os.execv(sys.executable, sync_command(arguments.run_directories))


def sync_command(run_directories: Sequence[Path]) -> list[str]:
    """Command line of the process that delivers."""
    return [sys.executable, "-m", "pipeline.track_sync", *map(str, run_directories)]


def tell_end(run: RunDirectory, *, timeout_s: float = END_TIMEOUT_S) -> None:
    """After ranks that ended without a word (kill -9, out of memory, a hang): MLflow must not show RUNNING for ever.

    Does nothing for a run that MLflow does not know.  An unreachable store costs `timeout_s` at most, and one line.
    """
    if not run.mlflow_run_id.is_file():
        return
    try:
        subprocess.run(sync_command([run.path]), stdout=subprocess.DEVNULL, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        print(f"qsparse: MLflow does not answer; `qsparse track sync {run.path}` delivers the rest", file=sys.stderr)
