"""`qsparse report`: figures and tables of runs, from their directories alone.

Needs neither torch nor MLflow, so it works on a laptop to which the directories were copied.
"""

import argparse
from pathlib import Path
from typing import Any

_EPILOG = """\
One run: draws its figures anew in RUN_DIR/figures and prints a table.  Several: also overlays their losses in FILE
and writes the tables beside it (.md): where each run ended, and the configuration keys that differ.

examples:
  qsparse report runs/quickstart
  qsparse report runs/dense runs/qsparse runs/bitnet --output formats.png
"""


def add_report_parser(commands: Any) -> None:
    """Add `report` to the subparsers of `qsparse`."""
    summary = "figures and tables of one run, or of several compared"
    layout = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": _EPILOG}
    parser = commands.add_parser("report", help=summary, description=summary.capitalize() + ".", **layout)
    parser.add_argument("run_directories", nargs="+", type=Path, metavar="RUN_DIR", help="directories of runs")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="figure of the comparison (default: compare.png beside the runs)"
    )
    parser.set_defaults(run=_report)


def _report(arguments: argparse.Namespace) -> int:
    # Imported here: matplotlib takes a second, which the other commands need not pay.
    from pipeline.figures import compare_runs, plot_run, read_run, results_table
    from pipeline.run_directory import RunDirectory

    runs = [RunDirectory(path) for path in arguments.run_directories]
    if len(runs) == 1 and arguments.output is not None:
        raise ValueError("--output is for comparing several runs; the figures of one go to its own folder")
    records = [read_run(run.path) for run in runs]  # says which is none before anything is drawn
    for run in runs:
        for file in plot_run(run.metrics, run.figures):
            print(file)
    if len(runs) == 1:
        table = results_table({runs[0].path.resolve().name: records[0]})
        print(f"\n{table}", end="")
        return 0
    output = arguments.output or runs[0].path.resolve().parent / "compare.png"
    markdown = compare_runs(arguments.run_directories, output)
    print(f"{output}\n{output.with_suffix('.md')}\n\n{markdown}", end="")
    return 0
