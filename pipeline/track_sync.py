"""`python -m pipeline.track_sync RUN_DIR...`: what `qsparse track sync` starts; one process, no ranks.

Completes MLflow's copy of runs from their directories: points, files and end status.  metrics.jsonl holds every value
that was ever logged, so nothing else has to be kept for it.
"""

import argparse
import fcntl
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from pipeline.config_loader import load_config
from pipeline.metrics import read_metrics
from pipeline.mlflow_points import points_of
from pipeline.mlflow_run import EndStatus, MLflowRun, first_line
from pipeline.run_directory import RunDirectory
from pipeline.tracking import STATUS_OF_STATE, describe_run
from pipeline.tracking_uri import without_password


def replay(directory: RunDirectory, *, environment: Mapping[str, str] | None = None) -> int:
    """Complete the MLflow copy of a run from its directory: missing points, files and the end status.

    Safe to repeat, and safe beside a live run.  A run that MLflow has never seen is created.

    Args:
        directory: The run's folder; its config.yaml decides the store.
        environment: Environment variables; absent: the process's.

    Returns:
        The number of values delivered.

    Raises:
        ConnectionError: The store does not answer or refuses.
        ValueError: The folder is not that of a run.
    """
    for path in (directory.config, directory.metrics):
        if not path.is_file():
            raise ValueError(f"{directory.path} is not a run directory: it has no {path.name}")
    config = load_config(directory.config)
    records = read_metrics(directory.metrics)
    description = describe_run(config, _facts(directory), os.environ if environment is None else environment)
    run = MLflowRun(description, directory)
    try:
        run.connect(mark_running=False)
        sent = run.send_missing([point for record in records for point in points_of(record)[0]])
        run.upload()
        if (status := end_status(directory)) is not None:
            run.finish(status)
    except Exception as error:
        raise ConnectionError(f"MLflow at {without_password(description.uri)}: {first_line(error)}") from error
    return sent


def end_status(directory: RunDirectory) -> EndStatus | None:
    """How a run ended; None while it goes on.

    After kill -9 or a power cut status.json says `running` for ever; then nobody holds the run's lock.
    """
    status = directory.read_status()
    if status is None:
        return None
    if status["state"] in STATUS_OF_STATE:
        return STATUS_OF_STATE[status["state"]]
    return None if _is_locked(directory) else "FAILED"


def _is_locked(directory: RunDirectory) -> bool:
    """Whether a process owns the run; on a file system without locks nobody can tell, and it counts as owned."""
    lock = directory.path.parent / ".locks" / directory.path.name
    if not lock.is_file():
        return False
    with lock.open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _facts(directory: RunDirectory) -> dict[str, str]:
    if not directory.environment.is_file():
        return {}
    facts = json.loads(directory.environment.read_text(encoding="utf-8"))
    return {str(name): str(value) for name, value in facts.items()}


def main() -> int:
    """Deliver and say how much; exit code 1 if a store does not answer, 2 if a folder is no run directory."""
    parser = argparse.ArgumentParser(prog="qsparse track sync", description="Complete MLflow's copy of runs.")
    parser.add_argument("run_dirs", type=Path, nargs="+", help="run directories")
    code = 0
    for directory in map(RunDirectory, parser.parse_args().run_dirs):
        try:
            sent = replay(directory)
        except ConnectionError as error:
            print(f"qsparse: {error}", file=sys.stderr)
            code = code or 1
        except ValueError as error:
            print(f"qsparse: {error}", file=sys.stderr)
            code = 2
        else:
            news = f"{sent:,} values sent to MLflow" if sent else "MLflow has everything"
            print(f"{directory.path}: {news}")
    return code


if __name__ == "__main__":
    sys.exit(main())
