"""Jobs on a real SLURM: they run, stop, move and go on, and their losses are those of an undisturbed run."""

import random
import re
import signal
import sys
import time

import pytest

from tests.resume.recipe import RunFiles
from tests.slurm.cluster import wait_until
from tests.slurm.conftest import KILLS, LONG, PROFILE, STEPS, User

pytestmark = pytest.mark.slow


def assert_as_undisturbed(user: User, name: str, undisturbed: RunFiles) -> None:
    assert user.run(name).losses == undisturbed.losses, user.log(name)
    assert user.run(name).val_losses == undisturbed.val_losses
    assert user.run(name).status["state"] == "completed"


def test_two_nodes_from_queue_to_end(user: User, long_job: str) -> None:
    user.cluster.wait_for_state(long_job, "RUNNING", timeout=20)
    user.cluster.call("scontrol", "update", "PartitionName=main", "State=DOWN")
    job = user.launch("first", "parallel.dp=2", "training.steps=40")
    assert user.status("first")["state"].startswith("queued (Part")
    waiting = user.qsparse("logs", "first")
    assert (waiting.returncode, "has no output yet: it is queued" in waiting.stderr) == (2, True)
    again = user.qsparse("launch", "slurm", "config.yaml", "run.name=first", "--cluster", "profile.yaml")
    assert (again.returncode, f"already has job {job} (PENDING)" in again.stderr) == (2, True), again.stderr
    user.cluster.call("scontrol", "update", "PartitionName=main", "State=UP")
    wait_until(lambda: user.status("first")["state"].startswith("running"), 30)
    user.wait_for_step("first", 4)
    running = user.status("first")
    assert running["state"].startswith("running (checkpoint written"), running
    assert running["job"].startswith(f"{job} on n[")
    assert re.fullmatch(r"\d+ of 40, \d+ s left", running["step"])
    assert {"loss", "tokens/s", "checkpoint"} <= running.keys()
    user.wait("first", job)
    ended = user.status("first")
    assert (ended["state"], ended["step"]) == ("completed (all 40 steps done)", "40 of 40")
    assert ended["checkpoint"].startswith("step-00000040")
    logs = user.qsparse("logs", "first").stdout
    assert "ended: all steps are done" in logs
    assert "step 40/40" in logs
    assert user.decisions("first") == ["ended all steps are done"]


def test_requeue_and_cancel_then_the_same_losses(user: User, undisturbed: RunFiles) -> None:
    job = user.launch("moved", *LONG)
    user.wait_for_step("moved", 8)
    user.cluster.call("scontrol", "requeue", job)
    user.cluster.wait_for_state(job, "PENDING", timeout=30)
    wait_until(lambda: user.status("moved")["state"].startswith("preempted (waits to go on"), 20)
    stopped_at = user.run("moved").newest
    user.cluster.wait_for_state(job, "RUNNING", timeout=60)
    user.wait_for_step("moved", stopped_at + 4)
    cancel = user.qsparse("cancel", "moved")
    assert (cancel.returncode, f"job {job} saves and ends" in cancel.stdout) == (0, True), cancel.stderr
    user.wait("moved", job)
    assert user.status("moved")["state"].startswith("cancelled")
    assert 4 < user.run("moved").newest < STEPS
    assert user.decisions("moved")[-1] == f"ended cancelled; saved at step {user.run('moved').newest}"
    job = user.launch("moved", *LONG)
    user.wait("moved", job)
    assert_as_undisturbed(user, "moved", undisturbed)
    assert "3" in user.status("moved")["starts"]


@pytest.fixture(scope="module")
def long_job(user: User) -> str:
    """A job on one node that runs into its time limit while other tests use the others.

    SLURM may send the signal a minute early, so with a limit of two minutes it comes after 30 to 90 seconds.
    """
    return user.launch("long", "training.steps=100000", "checkpoint.interval=0", "--time", "2", nodes=1)


def test_the_time_limit_saves_and_requeues(user: User, long_job: str) -> None:
    wait_until(lambda: bool(user.decisions("long")), 120, lambda: user.log("long"))
    decision = user.decisions("long")[0]
    assert decision.startswith("requeue stopped (the time limit is near) at step "), user.log("long")
    stopped_at = int(decision.split()[-1])
    wait_until(lambda: int(user.cluster.job(long_job)["Restarts"]) >= 1, 20)
    user.wait_for_step("long", stopped_at)
    start = user.run("long").path / "launch/attempts/001/begin"
    wait_until(lambda: start.exists() and user.run("long").records[-1]["step"] > stopped_at, 60)
    assert f"from step {stopped_at}" in user.qsparse("logs", "long", "--lines", "1000").stdout
    cancelled = user.qsparse("cancel", "long", "--now")
    assert (cancelled.returncode, "is cancelled" in cancelled.stdout) == (0, True), cancelled.stderr
    user.wait("long", long_job, "CANCELLED")
    assert user.status("long")["state"].startswith("cancelled")


def test_the_job_leaves_a_dead_node(user: User, undisturbed: RunFiles) -> None:
    job = user.launch("dead", *LONG)
    user.wait_for_step("dead", 8)
    assert user.cluster.job(job)["NodeList"] == "n[1-2]"
    user.cluster.kill_node("n2")
    try:
        user.wait("dead", job, timeout=150)
        assert user.cluster.job(job)["NodeList"] in ("n[1,3]", "n[1-3]"), user.log("dead")
        assert_as_undisturbed(user, "dead", undisturbed)
    finally:
        user.cluster.start_node("n2")
        wait_until(lambda: user.cluster.idle_nodes() == user.cluster.nodes, 60)


def test_a_sweep_is_an_array(user: User) -> None:
    job = user.launch("sweep", "--sweep", "model.qsparse.sparsity=0.0,0.4,0.6", nodes=1)
    names = [f"sweep-sparsity-{value}" for value in ("0.0", "0.4", "0.6")]
    for index, name in enumerate(names):
        user.wait(name, f"{job}_{index}")
        assert f"sparsity: {name[-3:]}" in (user.run(name).path / "config.yaml").read_text()
    table = user.qsparse("status", "sweep").stdout
    for index, name in enumerate(names):
        assert re.search(rf"{name} +completed .* {job}_{index} +8/8", table), table
    assert len({tuple(user.run(name).losses) for name in names}) == 3
    assert f"[{job}_1] ended: all steps are done" in user.qsparse("logs", names[1]).stdout


def test_mistakes_and_non_finite_losses_are_not_tried_again(user: User) -> None:
    wrong = user.launch("wrong", "data.path=nowhere", nodes=1)
    infinite = user.launch("infinite", "optimizer.lr=1e30", "optimizer.clip_grad=0", nodes=1)
    found = user.wait("wrong", wrong, "FAILED")
    assert found["ExitCode"] == "2:0"
    assert user.status("wrong")["state"] == "failed: config (see `qsparse logs`)"
    assert "no dataset.json" in user.qsparse("logs", "wrong").stdout
    found = user.wait("infinite", infinite, "FAILED")
    assert found["ExitCode"] == "3:0"
    assert user.status("infinite")["state"].startswith("failed: nan (")
    assert [len(user.decisions(name)) for name in ("wrong", "infinite")] == [1, 1]


def test_failures_without_progress_are_bounded(user: User) -> None:
    job = user.launch("doomed", "checkpoint.interval=0", "training.steps=100000", "--max-restarts", "1", nodes=1)
    for number in range(2):
        user.wait_until_training("doomed", number)
        assert user.kill_rank("doomed")
    found = user.wait("doomed", job, "FAILED")
    assert found["Restarts"] == "0"
    again, failed = user.decisions("doomed")
    assert again == "again exit code 137, failure 1 of 1 that are borne"
    assert failed == "failed exit code 137, and 2 failures at step 0 without a new checkpoint"
    assert user.status("doomed")["state"].startswith("failed: killed")


def test_a_hang_is_reported_and_the_job_goes_on(user: User, undisturbed: RunFiles) -> None:
    job = user.launch("hung", *LONG, "watchdog.step_seconds=4")
    user.wait_until_training("hung", 0)
    assert user.kill_rank("hung", signal.SIGSTOP)
    user.wait("hung", job, timeout=120)
    assert user.decisions("hung")[0].startswith("again exit code 4, failure 1 of 3"), user.log("hung")
    (report,) = (user.run("hung").path / "hang").glob("*/report.txt")
    text = report.read_text()
    assert "left no report: stopped, gone, or its machine is unreachable; the other" in text
    assert "waiting: rank" in text
    assert_as_undisturbed(user, "hung", undisturbed)


def test_the_preflight_leaves_a_bad_node_out(user: User) -> None:
    """On n2 another version of a package is installed."""
    (user.folder / "odd/mlflow-0.0.1.dist-info").mkdir(parents=True)
    (user.folder / "odd/mlflow-0.0.1.dist-info/METADATA").write_text("Name: mlflow\nVersion: 0.0.1\n")
    odd = f'[ "$SLURMD_NODENAME" != n2 ] || export PYTHONPATH={user.folder}/odd:$PYTHONPATH'
    python = user.folder / "python"
    python.write_text(f'#!/bin/bash\n{odd}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (user.folder / "checked.yaml").write_text(f"{PROFILE}preflight: true\npython: {python}\n")
    job = user.launch("checked", "parallel.dp=2", "--cluster", "checked.yaml")
    user.wait("checked", job, timeout=120)
    assert user.decisions("checked") == ["requeue the preflight failed on n2", "ended all steps are done"]
    assert user.cluster.job(job)["NodeList"] == "n[1,3]"
    assert re.search(r"BAD n2: mlflow is 0.0.1, elsewhere \d", user.qsparse("logs", "checked", "--start", "0").stdout)


def test_kills_at_random_moments(user: User, undisturbed: RunFiles) -> None:
    """Ranks are killed (the job starts again where it is) and the job is requeued, in turn."""
    job = user.launch("killed", *LONG, "--max-restarts", "1000")
    killed = 0
    while killed < KILLS and user.wait("killed", job, "RUNNING", "COMPLETED")["JobState"] == "RUNNING":
        starts = len(user.starts("killed"))
        if killed % 4:  # every fourth kill may come while the ranks start
            user.wait_until_training("killed", starts - 1)
        time.sleep(random.uniform(0.0, 3.0))
        if killed % 2:
            user.cluster.try_call("scontrol", "requeue", job)
        elif not user.kill_rank("killed"):
            continue
        killed += 1
        user.wait_for_start("killed", job, starts)
    user.wait("killed", job, timeout=120)
    assert_as_undisturbed(user, "killed", undisturbed)
    print(f"{killed} kills; decisions: {user.decisions('killed')}")
