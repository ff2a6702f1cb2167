"""kill -9 at random moments, again and again, of a run on damaged data with threads reading ahead: nothing is lost.

Two moments here; QSPARSE_KILLS=50 makes it fifty, which takes a quarter of an hour.
"""

import os
import random
import time
from pathlib import Path

import pytest

from tests.resume.conftest import _corrupt_two_chunks, _damaged
from tests.resume.recipe import assert_same_bits
from tests.resume.test_kills import STEPS, Runs

KILLS = int(os.environ.get("QSPARSE_KILLS", "2"))
SECONDS_PER_STEP = 5.0
"""Far above what a step and its checkpoint take: a limit for hangs."""


def completed(runs: Runs) -> bool:
    return (runs.run.path / "status.json").exists() and runs.run.status["state"] == "completed"


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path, dataset: Path) -> None:
    steps = max(STEPS, 5 * KILLS)  # a life between two kills is two or three steps long
    data = _damaged(dataset, tmp_path / "data", _corrupt_two_chunks)
    runs = Runs(
        *(tmp_path, data, "data.bad_shard=skip", "data.shuffle=chunks", "data.prefetch_threads=3"),
        *(f"training.steps={steps}", "checkpoint.interval=1", "checkpoint.keep_last=2"),
    )
    reference, begun = runs.start("reference"), time.monotonic()
    reference.wait_until(lambda: runs.reference.newest > 0)
    until_first_checkpoint = time.monotonic() - begun
    assert reference.wait(SECONDS_PER_STEP * steps) == 0, reference.output
    kills = 0
    while kills < KILLS:
        assert not completed(runs), f"complete after {kills} kills: the run is too short for {KILLS}"
        training = runs.start()
        before = runs.run.newest
        trains = lambda before=before, steps=0: runs.run.newest > before + steps or completed(runs)  # noqa: E731
        if random.random() < 0.3:  # while it starts, or soon after, but not after much of the run on a machine now idle
            end = time.monotonic() + random.uniform(0.0, 1.5 * until_first_checkpoint)
            training.wait_until(lambda end=end, trains=trains: time.monotonic() > end or trains(steps=2))
        else:  # somewhere between two checkpoints, or while one is written
            training.wait_until(trains)
            time.sleep(random.uniform(0.0, 0.3))
        kills += training.is_running
        training.kill_all()
    last = runs.start()
    assert last.wait(SECONDS_PER_STEP * steps) == 0, last.output
    assert runs.run.status["state"] == "completed"
    assert len(runs.run.losses) == steps
    assert runs.run.losses == runs.reference.losses
    assert runs.run.val_losses == runs.reference.val_losses
    assert_same_bits(runs.run.checkpoint(runs.run.newest), runs.reference.checkpoint(runs.run.newest))
    assert runs.run.incomplete == []
    print(f"{kills} kills, {steps} steps, {until_first_checkpoint:.1f} s to the first checkpoint")
