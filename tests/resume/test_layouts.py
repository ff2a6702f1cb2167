"""A run that is killed and resumed under another layout goes on as if nothing had happened.

In fp64 with everything on, one process and any layout agree to the last bits.  megatron-core saves the reshardable
state of its distributed optimizer in fp32, whatever the model, so there dense models in fp32 are compared, in which the
order of the sum over ranks leaves differences of some 1e-7.
"""

import json

import pytest

from tests.resume.conftest import Starts
from tests.resume.recipe import assert_same_bits, optimizer_steps

EXACT = 1e-12


@pytest.mark.parametrize(
    ("name", "reference", "resumed_at", "tolerance"),
    [
        ("plain-dp2", "plain", 2, EXACT),
        ("plain-dp2-plain", "plain", 6, EXACT),
        ("dense-dp2", "dense", 2, 1e-6),
        ("dense-dp2-one", "dense", 6, 1e-6),
        ("tp2", "plain", 0, EXACT),
        ("tp2-pp2", "tp2", 4, EXACT),
        ("tp2-pp2-tp2", "tp2", 6, EXACT),
        ("plain-vpp", "plain", 4, EXACT),
        ("vpp-plain", "vpp", 4, EXACT),
        ("dense-tp2-dp2-one", "dense-tp2-dp2", 4, 1e-6),
        ("moe-resumed", "moe", 4, EXACT),
        ("moe-one", "moe", 4, EXACT),
    ],
)
def test_the_continuation_is_that_of_the_uninterrupted_run(
    starts: Starts, name: str, reference: str, resumed_at: int, tolerance: float
) -> None:
    found, expected = starts.run(name), starts.run(reference)
    assert len(found.losses) == 8
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert found.val_losses[-1] == pytest.approx(expected.val_losses[-1], rel=tolerance)
    # Steps up to the checkpoint are the records of the killed run, the others were trained again.
    kept = [mine["time_ms"] == theirs["time_ms"] for mine, theirs in zip(found.records, expected.records, strict=True)]
    if name.count("-") == reference.count("-") + 1 and resumed_at:
        assert kept == [True] * resumed_at + [False] * (8 - resumed_at)


def test_the_losses_depend_on_the_data(starts: Starts) -> None:
    losses = starts.run("plain").losses
    assert len(set(losses)) == 8
    assert losses[-1] < losses[0] - 0.1


def test_another_batch_size_goes_on_with_the_next_sample(starts: Starts) -> None:
    run, reference = starts.run("batch"), starts.run("plain")
    consumed = 4 * 8 + 4 * 16
    assert json.loads((run.checkpoint(8) / "meta.json").read_text())["consumed_samples"] == consumed
    assert [record["train/tokens"] for record in run.records] == [256, 512, 768, 1024, 1536, 2048, 2560, 3072]
    assert run.losses[:4] == reference.losses[:4]


def test_an_overlapped_parameter_gather_is_finished_before_a_save(starts: Starts) -> None:
    assert_same_bits(starts.run("overlapped-gather").checkpoint(8), starts.run("gather").checkpoint(8))


def test_weights_of_another_run_are_a_new_start(starts: Starts) -> None:
    run, source = starts.run("from-weights"), starts.run("plain")
    meta = json.loads((run.checkpoint(8) / "meta.json").read_text())
    assert (meta["step"], meta["consumed_samples"]) == (8, 64)
    assert optimizer_steps(run.checkpoint(8)) == {8}
    # A fresh model has 6.24 here; so would the second step, had the optimizer kept weights of its own.
    assert max(run.losses[:2]) < source.losses[0] - 0.2
