"""The process that writes to MLflow: what it survives, and that it leaves nothing behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pipeline.mlflow_process import RemoteRun
from pipeline.mlflow_run import RunDescription, StoreError
from pipeline.run_directory import RunDirectory
from tests.runs.mlflow_tools import Incarnation, fetch_run, history, make_config, wait_until
from tests.testing import ROOT

pytest.importorskip("mlflow")

ENDLESS = """
import sys, time; from pathlib import Path
from tests.runs.mlflow_tools import Incarnation, make_config
run = Incarnation(make_config(Path(sys.argv[1])), in_process=False)
run.record(1, {"train/loss": 1.0})
while run.tracker.undelivered:
    time.sleep(0.01)
print("delivered", flush=True)
time.sleep(1000)
"""


def writer_of(process: psutil.Process) -> psutil.Process:
    (writer,) = (child for child in process.children() if "pipeline.mlflow_process" in child.cmdline())
    return writer


def test_signals_and_kills_of_the_writer_lose_and_double_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Incarnation(make_config(tmp_path), in_process=False)
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"

    def record(first: int, last: int) -> None:
        for step in range(first, last + 1):
            run.record(step, {"train/loss": 1.0 / step})
        wait_until(lambda: run.tracker.undelivered == 0, 60, f"delivery of step {last}")

    record(1, 50)
    writer = writer_of(psutil.Process())
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):  # meant for the trainer
        writer.send_signal(number)
    record(51, 100)
    assert writer_of(psutil.Process()) == writer
    writer.kill()
    record(101, 150)
    assert writer_of(psutil.Process()) != writer
    assert "the process that writes to MLflow is gone (exit code -9); training goes on" in caplog.text
    assert run.tracker.close() == 0
    assert psutil.Process().children() == []
    assert history(uri, run.directory, "train/loss") == [(step, 1.0 / step) for step in range(1, 151)]
    assert fetch_run(uri, run.directory).info.status == "FINISHED"


def test_the_writer_ends_with_a_trainer_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDLESS, str(tmp_path)]
    trainer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert trainer.stdout is not None and trainer.stdout.readline() == "delivered\n"
    writer = writer_of(psutil.Process(trainer.pid))
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.communicate()
    writer.wait(30)


def test_an_error_of_the_store_comes_back_in_one_line(tmp_path: Path) -> None:
    description = RunDescription("http://user:secret@127.0.0.1:9", "e", "r", {}, {})
    run = RemoteRun(description, RunDirectory(tmp_path))
    with pytest.raises(StoreError, match=r"^MlflowException: .*127\.0\.0\.1.*$") as caught:
        run.connect()
    assert "secret" not in str(caught.value)
    run.close()
    run.close()
