"""Hangs of real processes: the report names the rank and the collective, and the job ends."""

import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import time

import pytest

from launch.local import rank_environment
from pipeline.config import WatchdogConfig
from pipeline.run_directory import RunDirectory
from pipeline.watchdog import Watchdog, collective_of, place_of, read_recorder
from tests.testing import ROOT


def run_hanging(run: RunDirectory, how: str) -> subprocess.CompletedProcess[str]:
    """The first rank's end; the second one is killed afterwards, as a launcher would."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.launch.hanging", str(run.path), how]
    ranks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=rank_environment(1, {**os.environ, **shared, "RANK": str(rank)}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, errors = ranks[0].communicate(timeout=60)
        if how == "sleep":
            assert ranks[1].wait(timeout=30) == 4
        return subprocess.CompletedProcess(command, ranks[0].returncode, "", errors)
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_rank_that_sleeps(tmp_path):
    run = RunDirectory(tmp_path)
    result = run_hanging(run, "sleep")
    assert result.returncode == 4, result.stderr
    reason = run.read_status()["reason"]
    assert reason.startswith("no progress for 2 s (watchdog.step_seconds) in step 3: rank 1 on n1 at tests/launch/hang")
    assert reason.endswith("stand_still (step 3); the others wait in all_reduce 3 of group default_pg 0")
    assert f"error: {reason}\n" in result.stderr
    assert (run.read_status()["state"], run.read_status()["failure"]) == ("failed", "hang")
    folder = tmp_path / "hang/now"
    report = (folder / "report.txt").read_text()
    assert "waiting: rank 0 in all_reduce 3 of group default_pg 0, tests/launch/hanging.py:" in report
    assert "stand_still" in (folder / "rank-00001.stacks").read_text()
    recorded = pickle.loads((folder / "rank-00000.recorder").read_bytes())
    assert [entry["profiling_name"] for entry in recorded["entries"]] == ["gloo:all_reduce"] * 3


def test_a_process_that_is_stopped(tmp_path):
    run = RunDirectory(tmp_path)
    result = run_hanging(run, "stop")
    assert result.returncode == 4, result.stderr
    assert "rank 1 left no report" in run.read_status()["reason"]
    assert not (tmp_path / "hang/now/rank-00001.json").exists()
    assert json.loads((tmp_path / "hang/now/rank-00000.json").read_text())["step"] == 3


def test_signs_of_life_keep_it_quiet(tmp_path):
    settings = WatchdogConfig(step_seconds=0.4, other_seconds=0.4)
    with Watchdog(RunDirectory(tmp_path), settings, rank=0, world_size=1, host="n", start="now") as watchdog:
        for step in range(10):
            watchdog.beat("step", step)
            time.sleep(0.1)
    time.sleep(0.6)  # closed: nobody watches any more
    assert not (tmp_path / "hang").exists()


def test_zero_switches_it_off(tmp_path):
    settings = WatchdogConfig(step_seconds=0.0)
    with Watchdog(RunDirectory(tmp_path), settings, rank=0, world_size=1, host="n", start="now"):
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_limits_by_phase(tmp_path):
    watchdog = Watchdog(
        RunDirectory(tmp_path), WatchdogConfig(step_seconds=1, other_seconds=5), rank=0, world_size=1, host="n",
        start="now",
    )  # fmt: skip
    assert watchdog.limit == 5
    watchdog.beat("step", 1)
    assert watchdog.limit == 1
    watchdog.beat("checkpoint", 1)
    assert watchdog.limit == 5


class AroundEveryOperation:
    """As the mode of pipeline.cpu_backend, which is on the stack of every operation and never the place."""

    def __torch_function__(self):
        return sys._getframe()


def test_place_and_collective_of_a_stack():
    frame = sys._getframe()
    assert place_of(frame).startswith("tests/launch/test_watchdog.py:")
    assert place_of(frame).endswith(" test_place_and_collective_of_a_stack")
    assert collective_of(frame) is None
    assert place_of(None) == "an unknown place"
    assert place_of(AroundEveryOperation().__torch_function__()).endswith(" test_place_and_collective_of_a_stack")


@pytest.mark.parametrize(("state", "retired", "pending"), [("scheduled", True, None), ("completed", False, None)])
def test_operations_that_have_ended_are_not_pending(state, retired, pending):
    entry = {
        "process_group": ["0", "default_pg"], "collective_seq_id": 4, "profiling_name": "nccl:all_reduce",
        "state": state, "retired": retired, "is_p2p": False,
    }  # fmt: skip
    assert read_recorder([entry]) == (pending, {"default_pg 0": 4})
    started = {**entry, "state": "started", "retired": False, "collective_seq_id": 5}
    assert read_recorder([entry, started]) == ("all_reduce 5 of group default_pg 0", {"default_pg 0": 5})
