"""What is wrong is said once, in one line, by one rank; all ranks end, and a mistaken command changes nothing."""

import pytest

from tests.resume.conftest import Starts
from tests.resume.recipe import RunFiles


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-dataset", ("nowhere: no dataset.json", "qsparse data prepare")),
        ("no-shard", ("no-shard/train-00001.tar: missing shard", "qsparse data verify")),
        ("short-shard", ("short-shard/train-00001.tar: truncated shard: 4096 bytes",)),
        ("bad-chunk", ("crc32 is", "bad-chunk/train-", ".tokens.npy", "(on rank 1)")),
        ("small-vocabulary", ("model.vocab_size=100 is smaller than the 512 token ids", "data.path")),
        ("other-model", ("tp2/checkpoints/step-00000008", "model.hidden_size=128 but the checkpoint has 64")),
        ("other-order", ("another dataset, sequence length or data.seed", "checkpoint.load")),
        ("other-optimizer", ("parallel.distributed_optimizer=True but the checkpoint has False",)),
        ("killed", ("another dataset, sequence length or data.seed",)),
        ("no-checkpoint", ("is no complete checkpoint: it has no meta.json",)),
        ("run-as-checkpoint", ("no complete checkpoint", "did you mean", "plain/checkpoints/step-00000008?")),
        ("too-few-processes", ("2 processes are not a multiple of parallel.tp=2 * parallel.pp=2",)),
        ("gone", ("is complete but its checkpoints are gone", "run.name")),
        ("half-copied", ("step-00000008 is damaged: __0_0.distcp has 1000 bytes instead of",)),
        ("past-the-end", ("has done 6 steps already, training.steps=4", "run.name")),
        ("triton-on-cpu", ("run.kernels=triton needs a GPU", "run.kernels=auto")),
        ("owned", ("is being trained by process 1 on elsewhere", "run.name")),
    ],
)
def test_one_line_by_one_rank_and_exit_code_2(starts: Starts, name: str, words: tuple[str, ...]) -> None:
    start = starts.results[name]
    assert set(start.codes) == {2}, start.errors
    assert start.errors[0].startswith("error: ")
    assert start.errors[0].count("\n") == 1
    assert [word for word in words if word not in start.errors[0]] == []
    assert set(start.errors[1:]) <= {""}


@pytest.mark.parametrize("name", ["no-dataset", "no-shard", "no-checkpoint", "too-few-processes", "owned"])
def test_a_run_that_cannot_start_leaves_no_folder(starts: Starts, name: str) -> None:
    assert not (starts.root / name).exists()


def test_a_mistaken_command_does_not_touch_a_run_that_is_complete(starts: Starts) -> None:
    for name in ("tp2", "gone", "half-copied"):
        run = RunFiles(starts.root / name)
        assert run.status["state"] == "completed"
        assert len(run.losses) == 8


def test_a_killed_run_that_cannot_be_resumed_does_not_go_on_claiming_to_run(starts: Starts) -> None:
    status = RunFiles(starts.root / "killed").status
    assert (status["state"], status["step"]) == ("failed", 4)
    assert status["reason"] in starts.results["killed"].errors[0]


def test_damage_that_shows_while_training_ends_the_run_in_that_step(starts: Starts) -> None:
    run = RunFiles(starts.root / "bad-chunk")
    assert (run.status["state"], run.status["step"]) == ("failed", 1)
    assert "(on rank 1)" in run.status["reason"]
    assert len(run.losses) == 1
    assert run.visible == []


@pytest.mark.parametrize(
    ("name", "message", "steps"),
    [
        ("huge-lr", "loss is nan in step 2 (rank 0: samples 8, 9, 12, 13; rank 1: samples 10, 11, 14, 15)", 1),
        ("huge-init", "gradient norm is nan in step 1; the losses of all its samples are finite", 0),
    ],
)
def test_a_run_that_is_no_longer_finite_stops_and_saves_nothing(
    starts: Starts, name: str, message: str, steps: int
) -> None:
    start, run = starts.results[name], RunFiles(starts.root / name)
    assert start.codes == [3, 3]
    assert start.errors == [f"error: {message}\n", ""]
    assert (run.status["state"], run.status["step"], run.status["reason"]) == ("failed", steps, message)
    assert run.visible == run.incomplete == []
