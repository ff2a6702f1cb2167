"""`qsparse compare`: several runs side by side, from their directories alone.

Needs neither torch nor MLflow.  What does need MLflow, searching in it and showing the report there, are processes of
their own (`pipeline.compare.search`, `pipeline.compare.publish`), because nothing in this package may import it.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.arguments import add_command
from pipeline.run_directory import RunDirectory

_EPILOG = """\
RUN is a run directory, a name below --root, a pattern of names, a sweep (all of its runs), or the beginning of an
MLflow run id; none at all with --where or --search means all runs that fit.  Writes report.html, figures as PNG,
tables.md and summary.json; if the runs are in MLflow, the report becomes an MLflow run of its own.

examples:
  qsparse compare dense qsparse bitnet
  qsparse compare 'qsparse-*' --where model.qsparse.sparsity>=0.4 --where state=completed
  qsparse compare --search "params.`model.qsparse.weights` = 'ternary' and metrics.`val/loss` < 4"
"""
_MAX_NAME = 60


def add_compare_parser(commands: Any) -> None:
    """Add `compare` to the subparsers of `qsparse`."""
    parser = add_command(
        commands, "compare", "compare runs: what differs, losses at equal tokens, speed, memory, figures", _EPILOG
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="directory, name, pattern, sweep or MLflow id")
    parser.add_argument(
        "--root", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs (default: runs)"
    )
    where_help = "keep runs whose configuration, metric or state says so; also != < <= > >=; may be repeated"
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help=where_help)
    search_help = "take the runs that MLflow finds by this search string, those of other machines included"
    parser.add_argument("--search", metavar="STRING", help=search_help)
    parser.add_argument("--experiment", metavar="NAME", help="MLflow experiment (default: that of the runs)")
    output_help = "folder of the report (default: ROOT/comparisons/RUNS)"
    parser.add_argument("--output", type=Path, metavar="DIR", help=output_help)
    parser.add_argument("--no-mlflow", action="store_true", help="do not put the report into MLflow")
    parser.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> int:
    # Imported here: matplotlib takes a second, which the other commands need not pay.
    from pipeline.compare.report import write_report
    from pipeline.compare.runs import load_runs
    from pipeline.compare.select import select_runs

    if not (arguments.runs or arguments.where or arguments.search):
        raise ValueError("name the runs to compare, or give --where or --search")
    words = list(arguments.runs)
    if arguments.search:
        code, directories = _search(arguments)
        if code:
            return code
        words += directories
    runs = load_runs(select_runs(words, arguments.root, arguments.where))
    output = arguments.output or arguments.root / "comparisons" / _folder_name([run.name for run in runs])
    comparison = write_report(runs, output)
    print(f"{comparison.markdown}\n{comparison.files[0]}", flush=True)
    if not arguments.no_mlflow:
        known = [run for run in runs if RunDirectory(run.path).mlflow_run_id.is_file()]
        experiments = {run.settings.get("tracking.experiment", "qsparse") for run in known}
        if known and importlib.util.find_spec("mlflow"):
            _publish(arguments.experiment or min(experiments), arguments.root, output, [run.path for run in known])
    return 0


def _search(arguments: argparse.Namespace) -> tuple[int, list[str]]:
    if importlib.util.find_spec("mlflow") is None:
        raise ValueError("--search needs the mlflow package: pip install mlflow, or name the runs")
    options = ["--experiment", arguments.experiment or "qsparse", "--root", str(arguments.root)]
    options += ["--folder", str(arguments.root / "comparisons" / "from-mlflow")]
    command = [sys.executable, "-m", "pipeline.compare.search", arguments.search, *options]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return result.returncode, result.stdout.splitlines()


def _publish(experiment: str, root: Path, output: Path, runs: Sequence[Path]) -> None:
    """A report that is written is a success; that MLflow does not take it is told and no failure."""
    options = ["--experiment", experiment, "--root", str(root)]
    command = [sys.executable, "-m", "pipeline.compare.publish", str(output), *map(str, runs), *options]
    subprocess.run(command, check=False)


def _folder_name(names: Sequence[str]) -> str:
    """The names of the runs; of many, the first and a hash of all."""
    joined = "-".join(name.replace("/", "-") for name in names)
    if len(joined) <= _MAX_NAME:
        return joined
    return f"{joined[:_MAX_NAME]}-{len(names)}-{hashlib.sha256(joined.encode()).hexdigest()[:8]}"
