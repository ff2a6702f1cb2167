"""`python -m pipeline.compare.search`: ask MLflow for runs; prints their directories, one per line.

A run that was trained elsewhere has no directory here.  What a comparison needs of it is then fetched from the store
into `--folder`: configuration, environment, and the histories of its metrics as metrics.jsonl.
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.compare.store import work_on_store
from pipeline.mlflow_points import TOKEN_AXIS
from pipeline.mlflow_sweep import SWEEP_TAG
from pipeline.run_directory import RunDirectory, RunState, write_atomic

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

COMPARISON_TAG = "qsparse.comparison"
_COPIED = ("config.yaml", "environment.json")
_STATES: dict[str, RunState] = {"FINISHED": "completed", "KILLED": "stopped", "FAILED": "failed"}


def search(client: "MlflowClient", experiment: str, query: str, folder: Path) -> list[Path]:
    """Directories of the runs that match; those that are not on this machine are made below `folder`.

    Args:
        client: the store.
        experiment: name of the experiment.
        query: MLflow's search string, or an id of a run.
        folder: for runs from elsewhere.

    Raises:
        ValueError: there is no such experiment, or no run matches.
    """
    found = client.get_experiment_by_name(experiment)
    if found is None:
        names = ", ".join(other.name for other in client.search_experiments())
        raise ValueError(f"--experiment {experiment}: MLflow has {names}")
    runs = client.search_runs([found.experiment_id], query, order_by=["attributes.start_time ASC"])
    matches = [run for run in runs if SWEEP_TAG not in run.data.tags and COMPARISON_TAG not in run.data.tags]
    if not matches:
        raise ValueError(f"--search {query!r}: no run of experiment {experiment} matches")
    return [_directory_here(run) or _fetch(client, run, folder) for run in matches]


def _directory_here(run: "Run") -> Path | None:
    directory = RunDirectory(Path(run.data.tags.get("qsparse.run_directory", "")))
    known = directory.mlflow_run_id
    is_same = known.is_file() and known.read_text(encoding="utf-8").strip() == run.info.run_id
    return directory.path if is_same and directory.metrics.is_file() else None


def _fetch(client: "MlflowClient", run: "Run", folder: Path) -> Path:
    run_id = run.info.run_id
    directory = RunDirectory(folder / f"{run.info.run_name}-{run_id[:8]}")
    directory.path.mkdir(parents=True, exist_ok=True)
    present = {file.path for file in client.list_artifacts(run_id)}
    for name in _COPIED:
        if name in present:
            client.download_artifacts(run_id, name, str(directory.path))
    records: dict[int, dict[str, float]] = defaultdict(dict)
    for metric in sorted(set(run.data.metrics) - set(TOKEN_AXIS.values())):
        for point in client.get_metric_history(run_id, metric):
            records[point.step] |= {"step": point.step, "time_ms": point.timestamp, metric: point.value}
    lines = (json.dumps(records[step]) + "\n" for step in sorted(records))
    write_atomic(directory.metrics, "".join(lines))
    last = max(records, default=0)
    directory.write_status(_STATES.get(run.info.status, "running"), last, f"{run.info.status} in MLflow")
    write_atomic(directory.mlflow_run_id, run_id + "\n")
    return directory.path


def main() -> int:
    """Print directories; returns the exit code."""
    parser = argparse.ArgumentParser(prog="qsparse compare --search")
    parser.add_argument("query")
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    arguments = parser.parse_args()

    def work(client: "MlflowClient") -> str:
        return "\n".join(map(str, search(client, arguments.experiment, arguments.query, arguments.folder)))

    return work_on_store(arguments.root, work)


if __name__ == "__main__":
    sys.exit(main())
