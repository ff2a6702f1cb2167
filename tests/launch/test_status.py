"""`qsparse status`, `logs` and `cancel` from folders, with SLURM's answers given."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm
from launch.cli import main
from launch.records import JobRecord, LaunchFolder, decisive_code, exit_codes, record_end
from launch.slurm import JobState
from launch.status import duration, run_status
from launch.status_command import find_run, log_files
from pipeline.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    """A run of 100 steps in the folder `runs`."""
    directory = RunDirectory(tmp_path / "runs/a")
    directory.create("training: {steps: 100}\n")
    return directory


def submitted(run: RunDirectory, job_id: str = "7") -> LaunchFolder:
    launch = LaunchFolder(run.path)
    launch.write_job(JobRecord(job_id, nodes=2, ranks_per_node=1, submitted="now"))
    return launch


def start(launch: LaunchFolder, number: int, **codes: int) -> Path:
    attempt = launch.path / f"attempts/{number:03d}"
    attempt.mkdir(parents=True)
    (attempt / "begin").touch()
    os.utime(attempt / "begin", (1, 1))
    for node, code in codes.items():
        (attempt / f"exit.{node[1:]}").write_text(f"{code}\n")
    return attempt


def log_steps(run: RunDirectory, *steps: int) -> None:
    records = [
        {"step": step, "time_ms": 0, "train/loss": 5 / step, "perf/tokens_per_second": 1000.0, "perf/step_seconds": 2.0}
        for step in steps
    ]
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def say(monkeypatch):
    """Make SLURM answer something."""

    def answer(state: JobState | None) -> None:
        monkeypatch.setattr(slurm, "job_state", lambda job_id: state)

    answer(None)
    return answer


def test_a_waiting_job(run, say):
    submitted(run)
    say(JobState("PENDING", "Resources"))
    status = run_status(run.path)
    assert (status.state, status.reason, status.job) == ("queued", "Resources", "7")


def test_a_running_job(run, say):
    start(submitted(run), 0)
    run.write_status("running", 10, "checkpoint written")
    log_steps(run, 10, 20)
    folder = run.checkpoints / "step-00000010"
    folder.mkdir()
    (folder / "meta.json").write_text("{}")
    say(JobState("RUNNING", nodes="n[1-2]"))
    status = run_status(run.path)
    assert (status.state, status.step, status.total_steps, status.loss) == ("running", 20, 100, 0.25)
    assert (status.tokens_per_second, status.eta_seconds, status.checkpoint) == (1000.0, 160.0, "step-00000010")
    lines = dict(status.lines)
    assert lines["step"] == "20 of 100, 3 min left"
    assert re.fullmatch(r"step-00000010, \d s ago", lines["checkpoint"])
    assert lines["job"] == "7 on n[1-2]"


def test_a_job_between_two_starts(run, say):
    start(submitted(run), 0, n0=0)
    run.write_status("stopped", 12, "SIGTERM: saved at step 12")
    say(JobState("PENDING", "BeginTime", restarts=1))
    assert run_status(run.path).state == "preempted"


@pytest.mark.parametrize(
    ("codes", "state"),
    [
        ({"n0": 143, "n1": 2}, "failed: config"),
        ({"n0": 3, "n1": 143}, "failed: nan"),
        ({"n0": 4, "n1": 143}, "failed: hang"),
        ({"n0": 6}, "failed: oom"),
        ({"n0": 1, "n1": 143}, "failed: error"),
        ({"n0": 137}, "failed: killed"),
    ],
)
def test_failures_by_the_exit_codes_of_the_nodes(run, say, codes, state):
    start(submitted(run), 0, **codes)
    run.write_status("failed", 5, "why")
    say(JobState("FAILED"))
    assert (run_status(run.path).state, run_status(run.path).reason) == (state, "why")
    say(None)  # SLURM has forgotten the job
    assert run_status(run.path).state == state


@pytest.mark.parametrize(
    ("slurm_state", "state"),
    [
        ("TIMEOUT", "failed: timeout"),
        ("OUT_OF_MEMORY", "failed: oom"),
        ("NODE_FAIL", "failed: node"),
        ("CANCELLED", "cancelled"),
    ],
)
def test_ends_that_only_slurm_knows(run, say, slurm_state, state):
    start(submitted(run), 0)
    run.write_status("running", 5, "checkpoint written")
    say(JobState(slurm_state))
    assert run_status(run.path).state == state


def test_a_completed_run_stays_completed_whatever_slurm_says(run, say):
    start(submitted(run), 0, n0=0)
    run.write_status("completed", 100, "all 100 steps done")
    for answer in (JobState("COMPLETED"), None):
        say(answer)
        assert run_status(run.path).state == "completed"


def test_a_run_without_slurm(run):
    run.write_status("running", 5, "checkpoint written")
    lock = run.path.parent / ".locks/a"
    lock.parent.mkdir()
    lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert run_status(run.path).state == "running"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    lock.write_text(f"process {gone.pid} on {socket.gethostname()}\n")
    assert run_status(run.path).state == "failed: error"
    assert run_status(run.path).reason == "its processes are gone; last sign at step 5"
    run.write_status("failed", 5, "why", failure="hang")
    assert run_status(run.path).state == "failed: hang"


def test_run_names_are_looked_up(run, tmp_path, monkeypatch):
    run.write_status("completed", 100, "all 100 steps done")
    monkeypatch.chdir(tmp_path)
    assert find_run(Path("a"), Path("runs")) == Path("runs/a")
    assert find_run(Path("runs/a"), Path("runs")) == Path("runs/a")
    with pytest.raises(ValueError, match=re.escape("there is no run 'b', neither here nor in runs; there are a")):
        find_run(Path("b"), Path("runs"))
    (tmp_path / "runs/a").rename(tmp_path / "runs/quickstart")
    with pytest.raises(ValueError, match="did you mean 'quickstart'"):
        find_run(Path("quikstart"), Path("runs"))


def test_json(run, say, capsys):
    run.write_status("completed", 100, "all 100 steps done")
    assert main(["status", str(run.path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["step"], found["total_steps"]) == ("completed", 100, 100)


def test_logs_of_one_start(run, say, capsys):
    launch = submitted(run)
    for number, text in enumerate(("first", "second")):
        (start(launch, number) / "node-0.log").write_text(f"{text}\n" * 3)
    (launch.path / "slurm-7.out").write_text("batch\n")
    names = [file.name for file in log_files(run.path)]
    assert names == ["slurm-7.out", "node-0.log"]
    assert main(["logs", str(run.path), "--start", "0", "--lines", "2"]) == 0
    output = capsys.readouterr().out
    assert output.endswith("attempts/000/node-0.log ==\nfirst\nfirst\n")
    with pytest.raises(ValueError, match=re.escape("--start 2: ") + ".* has 2 starts, counted from 0"):
        log_files(run.path, 2)


def test_cancel_of_something_else(run, say, capsys):
    run.write_status("completed", 100, "all 100 steps done")
    assert main(["cancel", str(run.path)]) == 2
    assert "is no job of `qsparse launch slurm`" in capsys.readouterr().err
    submitted(run)
    assert main(["cancel", str(run.path)]) == 0
    assert "job 7 is over already (completed)" in capsys.readouterr().out
    assert not LaunchFolder(run.path).cancelled.exists()


def test_a_damaged_record(run):
    launch = submitted(run)
    (launch.path / "job.json").write_text("{}")
    with pytest.raises(ValueError, match=r"job\.json is damaged .*; delete it and submit again"):
        run_status(run.path)


def test_the_first_node_corrects_the_status(run, tmp_path):
    attempt = tmp_path / "attempt"
    attempt.mkdir()
    run.write_status("running", 5, "checkpoint written")
    record_end(run, 137, {"SLURM_NODEID": "1", "QSPARSE_ATTEMPT": str(attempt)})
    assert run.read_status()["state"] == "running"
    record_end(run, 137, {"SLURM_NODEID": "0", "QSPARSE_ATTEMPT": str(attempt)})
    status = run.read_status()
    assert (status["state"], status["failure"]) == ("failed", "killed")
    assert status["reason"] == "the processes ended with exit code 137 without saying why"
    assert exit_codes(attempt) == [137, 137]
    run.write_status("stopped", 5, "SIGTERM")
    record_end(run, 143, {})
    assert run.read_status()["state"] == "stopped"


@pytest.mark.parametrize(
    ("codes", "decisive"), [([], None), ([143, 2, 4], 2), ([143, 1], 1), ([137, 143], 143), ([0, 0], 0), ([4, 137], 4)]
)
def test_decisive_code(codes, decisive):
    assert decisive_code(codes) == decisive


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "5 s"), (600, "10 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_run_with_damaged_files_does_not_hide_the_others(run, say, capsys):
    run.write_status("completed", 100, "all 100 steps done")
    damaged = RunDirectory(run.path.with_name("b"))
    damaged.create("training: {steps: 100}\n")
    (damaged.path / "status.json").write_text("")
    assert main(["status", "--root", str(run.path.parent)]) == 0
    found = capsys.readouterr()
    assert "completed" in found.out and "b/status.json" in found.err
    assert main(["status", str(damaged.path)]) == 2
