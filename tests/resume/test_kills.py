"""kill -9, SIGTERM and the death of one rank: `qsparse train` in real processes, and every bit as without them."""

import random
import signal
import time
from pathlib import Path

import pytest

from tests.resume.processes import Training
from tests.resume.recipe import RunFiles, assert_same_bits, optimizer_steps, write_config

STEPS = 30


class Runs:
    """Starts of one configuration under two names: `reference` is left alone, `run` is not."""

    def __init__(self, folder: Path, dataset: Path, *overrides: str) -> None:
        self._folder, self._overrides = folder, (f"training.steps={STEPS}", "checkpoint.interval=3", *overrides)
        self._config = write_config(folder / "config.yaml", folder / "runs", dataset)
        self.run, self.reference = RunFiles(folder / "runs" / "run"), RunFiles(folder / "runs" / "reference")
        self._count = 0

    def start(self, name: str = "run", *overrides: str) -> Training:
        self._count += 1
        log = self._folder / f"{name}-{self._count}.log"
        return Training(self._config, f"run.name={name}", *self._overrides, *overrides, log=log)

    def assert_equal(self) -> None:
        """Losses of all steps and the last checkpoint are those of the uninterrupted run, bit for bit."""
        assert self.run.losses == self.reference.losses
        assert len(self.run.losses) == STEPS
        assert self.run.val_losses == self.reference.val_losses
        assert_same_bits(self.run.checkpoint(STEPS), self.reference.checkpoint(STEPS))
        assert optimizer_steps(self.run.checkpoint(STEPS)) == {STEPS}
        assert self.run.status["state"] == "completed"
        assert self.run.incomplete == []


def assert_resumed_at(step: int, before: list[dict], after: list[dict]) -> None:
    """Records up to `step` are the old ones, all later ones are new."""
    assert after[:step] == before[:step]
    assert not {record["time_ms"] for record in before} & {record["time_ms"] for record in after[step:]}


def test_kill_and_stop_of_one_process(tmp_path: Path, dataset: Path) -> None:
    runs = Runs(tmp_path, dataset, "model.dropout=0.1")
    reference, first = runs.start("reference"), runs.start()

    first.wait_until(lambda: runs.run.newest >= 3)
    time.sleep(random.uniform(0.0, 0.7))
    assert first.kill_all()
    assert first.processes() == []
    assert runs.run.status["state"] == "running"  # nobody was left to say anything else
    killed_at, before = runs.run.newest, runs.run.records
    assert 3 <= killed_at < STEPS
    assert reference.wait() == 0, reference.output

    second = runs.start()
    second.wait_until(lambda: runs.run.newest > killed_at)
    second.signal(signal.SIGTERM)
    assert second.wait() == 0, second.output
    stopped_at = runs.run.newest
    status = runs.run.status
    assert (status["state"], status["step"]) == ("stopped", stopped_at)
    assert status["reason"] == f"SIGTERM: saved at step {stopped_at}, the same command resumes"
    assert [record["step"] for record in runs.run.records] == list(range(1, stopped_at + 1))
    assert_resumed_at(killed_at, before, runs.run.records)

    before = runs.run.records
    third = runs.start()
    assert third.wait() == 0, third.output
    assert_resumed_at(stopped_at, before, runs.run.records)
    runs.assert_equal()


def test_kills_of_two_processes_with_a_distributed_optimizer(tmp_path: Path, dataset: Path) -> None:
    runs = Runs(
        *(tmp_path, dataset, "training.precision=bf16", "parallel.dp=2", "parallel.distributed_optimizer=true"),
        *("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"),
    )
    reference = runs.start("reference")
    assert reference.wait() == 0, reference.output

    first = runs.start()
    saving = lambda: runs.run.newest >= 6 and bool(runs.run.incomplete)  # noqa: E731
    while True:
        first.wait_until(saving)
        if first.kill_all(while_=saving):
            break
    killed_at, before, remains = runs.run.newest, runs.run.records, runs.run.incomplete
    assert remains

    second = runs.start("run", "checkpoint.interval=0")  # the next checkpoint is far away
    second.wait_until(lambda: runs.run.records[-1]["time_ms"] > before[-1]["time_ms"])
    assert (runs.run.status["state"], runs.run.status["step"]) == ("running", killed_at)
    assert_resumed_at(killed_at, before, runs.run.records)
    second.kill_rank(0)
    assert second.wait() == 128 + signal.SIGKILL
    assert "error: rank 0 was ended by SIGKILL" in second.output
    assert runs.run.status["state"] == "failed"  # written by the other rank
    assert runs.run.status["reason"].endswith("(on rank 1)")
    assert second.processes() == []
    assert runs.run.newest == killed_at

    third = runs.start()
    assert third.wait() == 0, third.output
    runs.assert_equal()


@pytest.mark.parametrize("nproc", [2])
def test_the_command_says_once_what_is_wrong(tmp_path: Path, dataset: Path, nproc: int) -> None:
    runs = Runs(tmp_path, dataset, f"parallel.dp={nproc}")
    missing = runs.start("run", f"data.path={tmp_path / 'nowhere'}")
    assert missing.wait() == 2
    # Said by torch if it is built for CUDA, where there is a compiler and no GPU.
    (line,) = (line for line in missing.output.splitlines() if "] No CUDA runtime is found" not in line)
    assert line.startswith("error: ") and "no dataset.json" in line
