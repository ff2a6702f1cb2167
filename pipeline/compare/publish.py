"""`python -m pipeline.compare.publish FOLDER RUN_DIR...`: put a comparison into MLflow, where its page shows it.

The comparison is a run of its own, called after the compared runs, with the report and its figures as artifacts and
one metric per run and number.  Its id lies in the folder, so comparing the same runs again replaces it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.compare.search import COMPARISON_TAG
from pipeline.compare.store import work_on_store
from pipeline.mlflow_points import clean_name
from pipeline.run_directory import RunDirectory, write_atomic

if TYPE_CHECKING:
    from mlflow import MlflowClient

_NUMBERS = ("val_loss", "train_loss", "activated_parameters", "sparsity", "tokens_per_second", "peak_bytes")
MAX_TITLE = 120


def publish(client: "MlflowClient", experiment: str, folder: Path, runs: Sequence[Path]) -> str:
    """Log the files of `folder`; returns MLflow's id of the comparison."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(f"experiment {experiment} is not in this store, so none of the runs is")
    run_id = _run(client, found.experiment_id, folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    names = ", ".join(run["name"] for run in summary["runs"])
    client.update_run(run_id, name=f"compare: {names}"[:MAX_TITLE])
    ids = [_id(path) for path in runs]
    client.set_tag(run_id, COMPARISON_TAG, ",".join(filter(None, ids)) or names[:MAX_TITLE])
    for file in sorted(folder.glob("*.*")):
        client.log_artifact(run_id, str(file), "figures" if file.suffix == ".png" else None)
    for run in summary["runs"]:
        for number in _NUMBERS:
            if run[number] is not None:
                client.log_metric(run_id, clean_name(f"{number}/{run['name']}"), run[number])
    client.set_terminated(run_id, "FINISHED")
    return run_id


def _run(client: "MlflowClient", experiment_id: str, folder: Path) -> str:
    from mlflow.exceptions import MlflowException

    file = folder / "mlflow_run_id"
    if file.is_file():
        try:
            run = client.get_run(file.read_text(encoding="utf-8").strip())
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        else:
            if run.info.lifecycle_stage == "active":
                return str(run.info.run_id)
    created = client.create_run(experiment_id, run_name="compare", tags={COMPARISON_TAG: ""})
    write_atomic(file, created.info.run_id + "\n")
    return str(created.info.run_id)


def _id(path: Path) -> str:
    file = RunDirectory(path).mlflow_run_id
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def main() -> int:
    """Publish; returns the exit code."""
    parser = argparse.ArgumentParser(prog="qsparse compare")
    parser.add_argument("folder", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--root", type=Path, required=True)
    arguments = parser.parse_args()

    def work(client: "MlflowClient") -> str:
        return f"MLflow run {publish(client, arguments.experiment, arguments.folder, arguments.runs)}"

    return work_on_store(arguments.root, work, complaint="the comparison is not in MLflow: ")


if __name__ == "__main__":
    sys.exit(main())
