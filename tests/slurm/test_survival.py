"""Kills, hangs and dead nodes under jobs on a real SLURM: their losses are those of an undisturbed run."""

import random
import re
import signal
import statistics
import sys
import time

import pytest

from tests.resume.recipe import RunFiles
from tests.slurm.cluster import wait_until
from tests.slurm.conftest import KILLS, LONG, PROFILE, STEPS, User, assert_as_undisturbed

pytestmark = pytest.mark.slow


def test_nodes_die_and_fewer_replicas_go_on(user: User, undisturbed: RunFiles) -> None:
    """The first death moves the job to the node that is left, the second leaves it with half of its replicas."""
    cluster = user.cluster
    job = user.launch("dead", *(option for option in LONG if "parallel.dp" not in option), "--min-nodes", "1")
    user.wait_for_step("dead", 8)
    assert cluster.job(job)["NodeList"] == "n[1-2]"
    try:
        cluster.kill_node("n2")
        user.wait_for_start("dead", job, 1)
        user.wait_for_step("dead", user.run("dead").newest + 4)
        assert cluster.job(job)["NodeList"] == "n[1,3]", user.log("dead")
        cluster.kill_node("n3")
        user.wait_for_start("dead", job, 2)
        alone_from = user.run("dead").newest
        assert 8 < alone_from < STEPS
        user.wait("dead", job)
        assert cluster.job(job)["NodeList"] == "n1", user.log("dead")
    finally:
        for node in ("n2", "n3"):
            cluster.start_node(node)
        wait_until(lambda: cluster.idle_nodes() == cluster.nodes, 60)
    losses = user.run("dead").losses
    assert losses[:alone_from] == undisturbed.losses[:alone_from]
    # The same samples, summed in another order: a last bit flips single codes, and runs part slowly.
    alone, expected = losses[alone_from:], undisturbed.losses[alone_from:]
    assert alone[:20] == pytest.approx(expected[:20], rel=2e-3)
    assert alone == pytest.approx(expected, rel=1e-2)
    # Neighbouring batches differ by 1e-2 and more: other samples would not stay this near in most of the steps.
    assert statistics.median(abs(a / b - 1) for a, b in zip(alone, expected, strict=True)) < 1e-3
    assert user.run("dead").status["state"] == "completed"


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
    (user.folder / "pairs.yaml").write_text(f"{PROFILE}processes_per_node: 2\n")
    limits = ("watchdog.step_seconds=12", "watchdog.other_seconds=45")  # it may stop in a checkpoint
    job = user.launch("hung", *LONG, *limits, "--cluster", "pairs.yaml", nodes=1)
    user.wait_until_training("hung", 0)
    assert user.kill_rank("hung", signal.SIGSTOP)
    user.wait("hung", job, timeout=400)
    assert user.decisions("hung")[0].startswith("again exit code 4, failure 1 of 3"), user.log("hung")
    (report,) = (user.run("hung").path / "hang").glob("*/report.txt")
    text = report.read_text()
    assert re.search(r"rank [01] left no report: stopped, gone, or its machine is unreachable; the other", text)
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
    user.wait("checked", job)
    assert user.decisions("checked") == ["requeue the preflight failed on n2", "ended all steps are done"]
    assert user.cluster.job(job)["NodeList"] == "n[1,3]"
    assert re.search(r"BAD n2: mlflow is 0.0.1, elsewhere \d", user.qsparse("logs", "checked", "--start", "0").stdout)


def test_kills_at_random_moments(user: User, undisturbed: RunFiles) -> None:
    """Ranks are killed (the job starts again where it is) and the job is requeued, in turn."""
    job = user.launch("killed", *LONG, "--max-restarts", "1000")
    moments = []
    for number in range(KILLS):
        starts = max(1, len(user.starts("killed")))
        user.wait_for_start("killed", job, starts - 1)
        # Between the last kill's share of the run and the next one's; every fourth may come while the ranks start.
        share = STEPS // (KILLS + 1)
        deadline = time.monotonic() + (random.uniform(0.0, 8.0) if number % 4 == 3 else 120.0)
        user.wait_for_record("killed", random.randint(number * share + 1, (number + 1) * share), deadline)
        time.sleep(random.uniform(0.0, 0.1))
        if number % 2:
            user.cluster.call("scontrol", "requeue", job)
        else:
            wait_until(lambda: user.kill_rank("killed"), 60, lambda: user.log("killed"))
        moments.append(user.last_step("killed"))
        user.wait_for_start("killed", job, starts)
    user.wait("killed", job)
    assert_as_undisturbed(user, "killed", undisturbed)
    assert len(user.starts("killed")) == KILLS + 1
    print(f"{KILLS} kills after steps {moments} of {STEPS}; {KILLS + 1} starts; {len(undisturbed.losses)} equal losses")
