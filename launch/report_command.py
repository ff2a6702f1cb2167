"""`qsparse report`: figures and a table of each run, from its directory alone; `qsparse compare` is for several.

Needs neither torch nor MLflow, so it works on a laptop to which the directories were copied.
"""

import argparse
from pathlib import Path
from typing import Any

from launch.arguments import add_command

_EPILOG = """\
Draws the figures anew in RUN_DIR/figures and prints where the run got.

example:
  qsparse report runs/quickstart
"""


def add_report_parser(commands: Any) -> None:
    """Add `report` to the subparsers of `qsparse`."""
    parser = add_command(commands, "report", "figures and table of a run", _EPILOG)
    parser.add_argument("run_directories", nargs="+", type=Path, metavar="RUN_DIR", help="directories of runs")
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    # Imported here: matplotlib takes a second, which the other commands need not pay.
    from pipeline.figures import plot_run, read_run, results_table
    from pipeline.run_directory import RunDirectory

    runs = [RunDirectory(path) for path in arguments.run_directories]
    records = [read_run(run.path) for run in runs]  # says which is none before anything is drawn
    for run, of_run in zip(runs, records, strict=True):
        for file in plot_run(run.metrics, run.figures):
            print(file)
        print(f"\n{results_table(run.path.resolve().name, of_run)}", end="")
    return 0
