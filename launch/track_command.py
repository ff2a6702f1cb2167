"""`qsparse track sync`: complete MLflow's copy of a run from its directory, started as a process of its own.

Delivering needs MLflow, which nothing in this package may import; `pipeline.track_sync` takes this process's place.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

_EPILOG = """\
Sends what metrics.jsonl has and MLflow lacks, the files and the end status; safe to repeat, and beside a live run.

example:
  qsparse track sync runs/quickstart
"""


def add_track_parser(commands: Any) -> None:
    """Add `track` to the subparsers of `qsparse`."""
    summary = "complete MLflow's copy of a run"
    track = commands.add_parser("track", help=summary, description=summary[0].upper() + summary[1:] + ".")
    verbs = track.add_subparsers(title="commands", metavar="COMMAND", required=True)
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": _EPILOG}
    sync = verbs.add_parser("sync", help="send to MLflow what it lacks", **layout)
    sync.add_argument("run_directory", type=Path, metavar="RUN_DIR", help="directory of the run, e.g. runs/quickstart")
    sync.set_defaults(run=_sync)


def _sync(arguments: argparse.Namespace) -> int:
    os.execv(sys.executable, [sys.executable, "-m", "pipeline.track_sync", str(arguments.run_directory)])
