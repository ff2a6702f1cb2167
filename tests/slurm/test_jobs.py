"""The life of jobs on a real SLURM, as their owner sees it."""

import re
from contextlib import ExitStack

import pytest

from tests.resume.recipe import RunFiles
from tests.slurm.cluster import wait_until
from tests.slurm.conftest import LONG, STEPS, User, assert_as_undisturbed

pytestmark = pytest.mark.slow


def test_two_nodes_from_queue_to_end(user: User, undisturbed: RunFiles) -> None:
    """On the way an urgent job takes a node, the owner cancels, and the same command goes on."""
    user.cluster.call("scontrol", "update", "PartitionName=main", "State=DOWN")
    job = user.launch("story", *LONG)
    assert_waits(user, job)
    user.cluster.call("scontrol", "update", "PartitionName=main", "State=UP")
    user.wait_for_step("story", 4)
    stopped_at = preempt(user, job)
    user.wait("story", job, "RUNNING")
    user.wait_for_step("story", stopped_at + 4)
    with user.paused("story"):
        cancel = user.qsparse("cancel", "story")
        wait_until(lambda: "cancelled: asking the ranks" in user.log("story"), 120, lambda: user.log("story"))
    assert (cancel.returncode, f"job {job} saves and ends" in cancel.stdout) == (0, True), cancel.stderr
    user.wait("story", job)
    cancelled_at = user.run("story").newest
    assert user.status("story")["state"].startswith("cancelled")
    assert stopped_at < cancelled_at < STEPS
    assert user.decisions("story")[-1] == f"ended cancelled; saved at step {cancelled_at}"
    job = user.launch("story", *LONG)
    user.wait("story", job)
    assert_completed(user)
    assert_as_undisturbed(user, "story", undisturbed)


def assert_waits(user: User, job: str) -> None:
    assert user.status("story")["state"].startswith("queued (Part")
    waiting = user.qsparse("logs", "story")
    assert (waiting.returncode, "has no output yet: it is queued" in waiting.stderr) == (2, True)
    again = user.qsparse("launch", "slurm", "config.yaml", "run.name=story", "--cluster", "profile.yaml")
    assert (again.returncode, f"already has job {job} (PENDING)" in again.stderr) == (2, True), again.stderr


def assert_runs(user: User, job: str) -> None:
    running = user.status("story")
    assert running["state"].startswith("running ("), running
    assert running["job"].startswith(f"{job} on n[")
    assert re.fullmatch(rf"\d+ of {STEPS}, \d+ s left", running["step"])
    assert {"loss", "tokens/s", "checkpoint"} <= running.keys()


def preempt(user: User, job: str) -> int:
    """An urgent job takes a node of a job that runs, which saves and waits; returns the step of its checkpoint."""
    node = user.cluster.hostnames(user.cluster.job(job)["NodeList"])[0]
    options = ("--partition=urgent", f"--nodelist={node}", "--exclusive", "--output=/dev/null", "--parsable")
    with user.paused("story") as ranks:
        assert_runs(user, job)
        urgent = user.cluster.call("sbatch", *options, "--wrap=sleep 8").strip()
        wait_until(lambda: all(map(user.is_asked_to_end, ranks)), 120, lambda: user.log("story"))
    user.cluster.wait_for_state(urgent, "RUNNING", timeout=120)
    user.cluster.wait_for_state(job, "PENDING", timeout=120)
    assert user.status("story")["state"].startswith("preempted (waits to go on")
    stopped_at = user.run("story").newest
    assert user.decisions("story") == [f"requeue stopped (preempted) at step {stopped_at}"], user.log("story")
    assert user.run("story").records[-1]["step"] == stopped_at
    return stopped_at


def assert_completed(user: User) -> None:
    ended = user.status("story")
    assert (ended["state"], ended["step"]) == (f"completed (all {STEPS} steps done)", f"{STEPS} of {STEPS}")
    assert ended["checkpoint"].startswith(f"step-{STEPS:08d}")
    assert ended["starts"] == "3"
    logs = user.qsparse("logs", "story").stdout
    assert "ended: all steps are done" in logs
    assert f"step {STEPS}/{STEPS}" in logs
    first = user.qsparse("logs", "story", "--start", "0").stdout
    assert "stop" in first and f"step {STEPS}/{STEPS}" not in first


def test_a_sweep_is_an_array(user: User) -> None:
    job = user.launch("sweep", "--sweep", "model.qsparse.sparsity=0.0,0.6", nodes=1)
    names = [f"sweep-sparsity-{value}" for value in ("0.0", "0.6")]
    for index, name in enumerate(names):
        user.wait(name, f"{job}_{index}")
        assert f"sparsity: {name[-3:]}" in (user.run(name).path / "config.yaml").read_text()
    table = user.qsparse("status", "sweep").stdout
    for index, name in enumerate(names):
        assert re.search(rf"{name} +completed .* {job}_{index} +8/8", table), table
    assert len({tuple(user.run(name).losses) for name in names}) == 2
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nodes", "9"], "SLURM refuses .*job.sbatch: .*More processors requested than permitted"),
        (["--partition", "gpu"], "SLURM refuses .*job.sbatch: .*invalid partition specified: gpu"),
    ],
)
def test_what_slurm_would_never_start_is_not_queued(user: User, options: list[str], message: str) -> None:
    result = user.qsparse(
        *("launch", "slurm", "config.yaml", "run.name=never", "--cluster", "profile.yaml"),
        *("training.global_batch_size=36", *options),
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.stderr
    assert not (user.folder / "runs/never/launch/job.json").exists()


def test_the_time_limit_saves_and_requeues(user: User) -> None:
    """Also when SLURM's controller does not answer at the moment when the job wants to be requeued."""
    job = user.launch("limited", "training.steps=100000", "checkpoint.interval=0", "--time", "20", nodes=1)
    user.wait_until_training("limited", 0)
    minutes = int(user.cluster.job(job)["RunTime"].split(":")[1])
    with ExitStack() as silence:
        with user.paused("limited") as ranks:  # SLURM looks at the limits every 30 s
            user.cluster.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes + 2}")  # within signal_seconds
            wait_until(lambda: all(map(user.is_asked_to_end, ranks)), 180, lambda: user.log("limited"))
            silence.enter_context(user.cluster.silent_controller())
        asks_again = "SLURM does not take the job back; asking again"
        wait_until(lambda: asks_again in user.log("limited"), 120, lambda: user.log("limited"))
    decision = user.decisions("limited")[0]
    assert decision.startswith("requeue stopped (the time limit is near) at step "), user.log("limited")
    stopped_at = int(decision.split()[-1])
    user.cluster.wait_for_state(job, "PENDING", timeout=120)
    user.cluster.call("scontrol", "update", f"JobId={job}", "TimeLimit=20")
    user.wait_until_training("limited", 1)
    steps = [record["step"] for record in user.run("limited").records]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > stopped_at
    assert f"from step {stopped_at}" in user.qsparse("logs", "limited", "--lines", "1000").stdout
    cancelled = user.qsparse("cancel", "limited", "--now")
    assert (cancelled.returncode, "is cancelled" in cancelled.stdout) == (0, True), cancelled.stderr
    user.wait("limited", job, "CANCELLED")
    assert user.status("limited")["state"].startswith("cancelled")
