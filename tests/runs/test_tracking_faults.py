"""Stores that are read-only, full, or written by many at once; disks without space."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.metrics import MetricsLog, read_metrics, series
from pipeline.mlflow_sweep import SweepParent
from pipeline.run_directory import RunDirectory
from tests.runs.mlflow_tools import Incarnation, fetch_run, history, make_config, wait_until
from tests.testing import ROOT

pytest.importorskip("mlflow")

INITIALIZE = """
import sys; from pathlib import Path
from tests.runs.mlflow_tools import Incarnation, make_config
run = Incarnation(make_config(Path(sys.argv[1]), "first", uri=sys.argv[2]))
run.record(1, {"train/loss": 1.0})
sys.exit(run.tracker.close(timeout_s=60))
"""
TWO_RUNS = """
import sys; from pathlib import Path
from tests.runs.mlflow_tools import Incarnation, make_config
runs = [Incarnation(make_config(Path(sys.argv[1]), name, parent="sweep")) for name in sys.argv[2:]]
for step in range(1, 51):
    for number, run in enumerate(runs):
        run.record(step, {"train/loss": step + number / 10, "train/tokens": 100.0 * step})
sys.exit(sum(run.tracker.close(timeout_s=100) for run in runs))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root and CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def initialize(root: Path, uri: str) -> None:
    subprocess.run([sys.executable, "-c", INITIALIZE, str(root), uri], cwd=ROOT, check=True, timeout=120)


def fill(disk: Path) -> Path:
    """Leave not a byte."""
    file = disk / "ballast"
    with file.open("wb", buffering=0) as out:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while out.write(bytes(size)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return file


def test_a_store_that_is_read_only_for_a_while(tmp_path: Path, small_disk: Path) -> None:
    uri = f"sqlite:///{small_disk / 'mlflow.db'}"
    initialize(tmp_path, uri)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    run = Incarnation(make_config(tmp_path), uri=uri)
    assert run.tracker.wait_ready()
    for step in range(1, 41):
        run.record(step, {"train/loss": 1.0 / step})
    assert run.tracker.undelivered == 40
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    wait_until(lambda: run.tracker.undelivered == 0, 60, "delivery to the writable store")
    assert run.tracker.close() == 0
    assert history(uri, run.directory, "train/loss") == [(step, 1.0 / step) for step in range(1, 41)]
    assert fetch_run(uri, run.directory).info.status == "FINISHED"


def test_a_store_on_a_full_disk(tmp_path: Path, small_disk: Path) -> None:
    uri = f"sqlite:///{small_disk / 'mlflow.db'}"
    run = Incarnation(make_config(tmp_path), uri=uri)
    run.record(1, {"train/loss": 1.0})
    wait_until(lambda: run.tracker.undelivered == 0, 60, "the first delivery")
    ballast = fill(small_disk)
    for step in range(2, 2001):
        run.record(step, {"train/loss": 1.0 / step})
    assert run.tracker.undelivered > 0
    os.truncate(ballast, 0)
    wait_until(lambda: run.tracker.undelivered == 0, 60, "delivery once there is space")
    assert run.tracker.close() == 0
    assert history(uri, run.directory, "train/loss") == [(step, 1.0 / step) for step in range(1, 2001)]


def test_metrics_wait_in_memory_while_the_disk_is_full(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(small_disk / "metrics.jsonl")
    log.write({"a": 1.0}, 1)
    ballast = fill(small_disk)
    for step in range(2, 1001):
        log.write({"a": 1.0 / step}, step)
    assert len(read_metrics(small_disk / "metrics.jsonl")) < 1000
    os.truncate(ballast, 0)
    log.write({"a": 0.5}, 1001)
    log.close()
    expected = (list(range(1, 1002)), [1.0 / step for step in range(1, 1001)] + [0.5])
    assert series(read_metrics(small_disk / "metrics.jsonl"), "a") == expected
    assert caplog.text.count("no space left; records wait in memory") == 1


def test_what_never_fits_on_the_disk_is_said_to_be_lost(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = MetricsLog(small_disk / "metrics.jsonl")
    fill(small_disk)
    for step in range(1, 101):
        log.write({"a": 1.0}, step)
    log.close()
    assert "no space left; its last" in caplog.text
    assert len(read_metrics(small_disk / "metrics.jsonl")) < 100, "a torn last record is left out"


def test_eight_runs_of_a_sweep_start_together_on_a_fresh_store(tmp_path: Path) -> None:
    import mlflow

    names = [f"run-{i}" for i in range(8)]
    command = [sys.executable, "-c", TWO_RUNS, str(tmp_path)]
    processes = [subprocess.Popen([*command, *names[i : i + 2]], cwd=ROOT) for i in range(0, 8, 2)]
    assert [process.wait(150) for process in processes] == [0, 0, 0, 0]
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    runs = [fetch_run(uri, RunDirectory(tmp_path / name)) for name in names]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len({run.info.run_id for run in runs}) == 8
    for i, name in enumerate(names):
        expected = [(step, step + (i % 2) / 10) for step in range(1, 51)]
        assert history(uri, RunDirectory(tmp_path / name), "train/loss") == expected
    (parent,) = {run.data.tags["mlflow.parentRunId"] for run in runs}
    client = mlflow.MlflowClient(uri)
    found = client.get_run(parent)
    assert (found.info.run_name, found.info.status) == ("sweep", "FINISHED")
    assert len(client.search_runs([found.info.experiment_id])) == 9, "parents that lost the race are deleted"


@pytest.mark.usefixtures("store_exists")
def test_the_parent_has_the_status_of_its_children(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    first = Incarnation(make_config(tmp_path, "a", parent="s"), uri=uri)
    second = Incarnation(make_config(tmp_path, "b", parent="s"), uri=uri)
    for run in (first, second):
        run.record(1, {"train/loss": 1.0})
        wait_until(lambda run=run: run.tracker.undelivered == 0, 60, "delivery")
    parent = RunDirectory(tmp_path / "s")
    parent.mlflow_run_id.write_text((tmp_path / "s" / "mlflow_parent_id").read_text())
    first.tracker.close("FAILED")
    assert fetch_run(uri, parent).info.status == "RUNNING"
    second.tracker.close("FINISHED")
    assert fetch_run(uri, parent).info.status == "FAILED"
    again = Incarnation(make_config(tmp_path, "a", parent="s"), resume_step=1, uri=uri)
    again.record(2, {"train/loss": 0.5})
    again.tracker.close("FINISHED")
    assert fetch_run(uri, parent).info.status == "FINISHED"
    assert fetch_run(uri, again.directory).data.tags["mlflow.parentRunId"] == fetch_run(uri, parent).info.run_id


@pytest.mark.usefixtures("store_exists")
def test_a_sibling_that_ends_while_a_run_starts(tmp_path: Path) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("sweeps")
    runs = [client.create_run(experiment).info.run_id for _ in range(2)]
    parents = [SweepParent("s", tmp_path / "s") for _ in runs]

    class Slow(mlflow.MlflowClient):
        """By the time the status it derived is written, both runs have ended."""

        def update_run(self, *args: Any, **kwargs: Any) -> None:
            for run, parent in zip(runs, parents, strict=True):
                client.set_terminated(run, "FINISHED")
                parent.update_status(client)
            super().update_run(*args, **kwargs)

    parents[0].adopt(client, experiment, runs[0])
    parents[1].adopt(Slow(client.tracking_uri), experiment, runs[1])
    parent = (tmp_path / "s" / "mlflow_parent_id").read_text().strip()
    assert client.get_run(parent).info.status == "FINISHED"
