"""`qsparse status`, `logs` and `cancel`: look at a run and end it, by its directory, from any machine that sees it."""

import argparse
import difflib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from launch import slurm
from launch.arguments import add_command
from launch.records import LaunchFolder
from launch.status import RunStatus, as_json, duration, run_status
from pipeline.run_directory import write_atomic

_STATUS_EPILOG = """\
States: queued, running, preempted (saved, waits to go on), stopped, cancelled, completed, and failed with a reason:
config, nan, oom, timeout, hang, preflight, node, killed, error.

examples:
  qsparse status runs/quickstart
  qsparse status                          every run below ./runs
"""
_LOGS_EPILOG = """\
examples:
  qsparse logs runs/quickstart            the last lines of the last start
  qsparse logs runs/quickstart --follow --lines 0
"""
_CANCEL_EPILOG = """\
A running job saves, and is not requeued; a waiting one is taken out of the queue.  --now does not wait for a save.

example:
  qsparse cancel runs/quickstart
"""


def add_status_parsers(commands: Any) -> None:
    """Add `status`, `logs` and `cancel` to the subparsers of `qsparse`."""
    status = _add_command(commands, "status", "state, step, loss and time left of runs", _STATUS_EPILOG)
    status.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="runs or sweeps; absent: all below --root")
    status.add_argument("--json", action="store_true", help="one JSON object per run")
    status.set_defaults(run=_status)
    logs = _add_command(commands, "logs", "output of a run's batch script and ranks", _LOGS_EPILOG)
    logs.add_argument("run_directory", type=Path, metavar="RUN", help="directory or name of a run")
    logs.add_argument("--start", type=int, metavar="N", help="output of start N, counted from 0; absent: the last one")
    logs.add_argument("--lines", type=int, default=40, metavar="N", help="last lines of each file (default: 40)")
    logs.add_argument("--follow", action="store_true", help="go on as the files grow, until the run ends")
    logs.set_defaults(run=_logs)
    cancel = _add_command(commands, "cancel", "save and end the job of a run", _CANCEL_EPILOG)
    cancel.add_argument("run_directory", type=Path, metavar="RUN", help="directory or name of a run or sweep")
    cancel.add_argument("--now", action="store_true", help="do not wait for a checkpoint")
    cancel.set_defaults(run=_cancel)


def _add_command(commands: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    parser = add_command(commands, name, summary, epilog)
    root_help = "where names are looked up (default: runs)"
    parser.add_argument("--root", type=Path, default=Path("runs"), metavar="DIR", help=root_help)
    return parser


def find_run(path: Path, root: Path) -> Path:
    """The directory of a run that was given by its path or by its name below `root`.

    Raises:
        ValueError: there is none; names those that are alike.
    """
    for candidate in (path, root / path):
        if _is_run(candidate):
            return candidate
    names = [found.name for found in _runs_below(root)]
    close = difflib.get_close_matches(path.name, names, n=1)
    hint = f", did you mean {close[0]!r}?" if close else f"; there are {', '.join(names)}" if names else ""
    raise ValueError(f"there is no run {str(path)!r}, neither here nor in {root}{hint}")


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in ("status.json", "launch/job.json", "launch/config.yaml"))


def _runs_below(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("*") if _is_run(path))


def _members(path: Path) -> list[Path]:
    """The runs of a sweep, or the run itself."""
    record = LaunchFolder(path).read_job()
    return [Path(run) for run in record.runs] if record and record.runs else [path]


def _status(arguments: argparse.Namespace) -> int:
    given = [find_run(path, arguments.root) for path in arguments.runs] or _runs_below(arguments.root)
    if not given:
        raise ValueError(f"--root {arguments.root} holds no runs")
    runs = list(dict.fromkeys(run for path in given for run in _members(path)))
    found, problems = _readable(runs)
    for problem in problems:
        print(f"qsparse: {problem}", file=sys.stderr)
    if not found:
        return 2
    if arguments.json:
        print("\n".join(map(as_json, found)))
    elif len(found) == 1:
        print("\n".join(f"{name:<11} {value}" for name, value in found[0].lines))
    else:
        Console(highlight=False).print(_table(found))
    return 0


def _readable(runs: list[Path]) -> tuple[list[RunStatus], list[str]]:
    """One run with damaged files must not hide the others."""
    found, problems = [], []
    for run in runs:
        try:
            found.append(run_status(run))
        except ValueError as error:
            problems.append(str(error))
    return found, problems


def _table(found: list[RunStatus]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("run", "state", "job", "step", "loss", "tokens/s", "left", "checkpoint"):
        table.add_column(name, overflow="fold")
    for status in found:
        table.add_row(
            status.path.name,
            status.state,
            status.job,
            f"{status.step}/{status.total_steps}",
            f"{status.loss:.4f}" if status.loss is not None else "-",
            f"{status.tokens_per_second:,.0f}" if status.tokens_per_second else "-",
            duration(status.eta_seconds) if status.eta_seconds is not None else "-",
            status.checkpoint or "-",
        )
    return table


def _logs(arguments: argparse.Namespace) -> int:
    run = find_run(arguments.run_directory, arguments.root)
    files = log_files(run, arguments.start)
    if not files:
        state = run_status(run)
        raise ValueError(f"{run} has no output yet: it is {state.state} ({state.reason})")
    for file in files:
        print(f"== {file} ==")
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(lines[-arguments.lines :] if arguments.lines else []))
    if arguments.follow:
        for text in _follow(run, files):
            print(text, end="", flush=True)
    return 0


def log_files(run: Path, start: int | None = None) -> list[Path]:
    """Output of the batch script, and of the nodes in one start; of runs without SLURM the log of rank 0.

    Raises:
        ValueError: there was no such start.
    """
    launch = LaunchFolder(run)
    attempts = launch.attempts
    if start is not None and not 0 <= start < len(attempts):
        raise ValueError(f"--start {start}: {run} has {len(attempts)} starts, counted from 0")
    record = launch.read_job()
    outputs = launch.outputs
    if record and not outputs and "_" in record.job_id:  # of a sweep: the batch output is in the sweep's own folder
        outputs = sorted(run.parent.glob(f"*/launch/slurm-{record.job_id}.out"))
    nodes = sorted(attempts[-1 if start is None else start].glob("*.log")) if attempts else []
    return [*outputs[-1:], *nodes] or sorted(run.glob("logs/rank-*.log"))


def _follow(run: Path, files: list[Path]) -> Iterator[str]:
    """What is added to the files until the run is neither queued nor running; new starts are followed too."""
    seen = {file: file.stat().st_size for file in files}
    while True:
        over = run_status(run).state not in ("queued", "running", "preempted")
        for file in log_files(run):
            with file.open(encoding="utf-8", errors="replace") as stream:
                stream.seek(seen.get(file, 0))
                yield stream.read()
                seen[file] = stream.tell()
        if over:
            return
        time.sleep(1.0)


def _cancel(arguments: argparse.Namespace) -> int:
    path = find_run(arguments.run_directory, arguments.root)
    jobs = [(run, LaunchFolder(run).read_job()) for run in _members(path)]
    for run, record in jobs:
        if record is None:
            raise ValueError(f"{run} is no job of `qsparse launch slurm`; Ctrl-C or SIGTERM ends `qsparse train`")
        print(f"{run}: {_end_job(run, record.job_id, now=arguments.now)}")
    return 0


def _end_job(run: Path, job_id: str, *, now: bool) -> str:
    job = slurm.job_state(job_id)
    if job is None or job.state not in slurm.ACTIVE:
        return f"job {job_id} is over already ({run_status(run).state})"
    write_atomic(LaunchFolder(run).cancelled, "")  # before the signal: the batch script looks for it
    if job.state == "RUNNING" and not now:
        slurm.signal_batch(job_id, "USR2")
        return f"job {job_id} saves and ends"
    slurm.cancel(job_id)
    return f"job {job_id} is cancelled"
