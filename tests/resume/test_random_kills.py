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


def completed(runs: Runs) -> bool:
    return (runs.run.path / "status.json").exists() and runs.run.status["state"] == "completed"


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path, dataset: Path) -> None:
    data = _damaged(dataset, tmp_path / "data", _corrupt_two_chunks)
    runs = Runs(
        *(tmp_path, data, "data.bad_shard=skip", "data.shuffle=chunks", "data.prefetch_threads=3"),
        *(f"training.steps={STEPS * max(1, KILLS // 4)}", "checkpoint.interval=1", "checkpoint.keep_last=2"),
    )
    reference = runs.start("reference")
    begun = time.monotonic()
    assert reference.wait() == 0, reference.output
    longest = time.monotonic() - begun
    for _ in range(KILLS):
        training = runs.start()
        before = runs.run.newest
        # At any moment of the start, or somewhere between the checkpoints that follow it.
        if random.random() < 0.3:
            time.sleep(random.uniform(0.0, longest))
        else:
            training.wait_until(lambda before=before: runs.run.newest > before or completed(runs))
            time.sleep(random.uniform(0.0, 0.3))
        if training._process.poll() is None:
            training.kill_all()
    last = runs.start()
    assert last.wait() == 0, last.output
    assert runs.run.status["state"] == "completed"
    assert runs.run.losses == runs.reference.losses
    assert runs.run.val_losses == runs.reference.val_losses
    assert_same_bits(runs.run.checkpoint(runs.run.newest), runs.reference.checkpoint(runs.run.newest))
    assert runs.run.incomplete == []
