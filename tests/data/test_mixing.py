"""Mixtures keep their shares exactly and draw from each source without a gap, over phases and batch sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config import Config
from pipeline.data.mixing import MixingError, Mixture, block_size, quotas, spread
from pipeline.data.phases import Phase, resolve_phases

weights = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(weights, st.integers(300, 3000))
def test_quotas_are_the_shares_to_within_one_and_spread_evenly(shares: list[int], block: int) -> None:
    counts = quotas(shares, block)
    exact = np.array(shares) / sum(shares) * block
    assert counts.sum() == block
    assert (np.abs(counts - exact) < 1).all()
    pattern = spread(counts)
    seen = np.cumsum(pattern[:, None] == np.arange(len(shares)), axis=0)
    assert np.array_equal(seen[-1], counts)
    due = np.arange(1, block + 1)[:, None] * counts / block
    # Smooth weighted round robin stays within S - 1 of the share with S sources; 1 for two.
    assert np.abs(seen - due).max() < max(1.0, len(shares) - 1)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.tuples(*[st.integers(0, 20)] * 3).filter(any)), min_size=1, max_size=4),
    st.sampled_from([1, 16, 100]),
)
def test_draws_of_every_source_are_consecutive_over_phases(phases: list, columns: int) -> None:
    begins = np.cumsum([0, *(length for length, _ in phases)]).tolist()
    mixture = Mixture(
        [Phase(begin, 0, shares, 8, 4) for begin, (_, shares) in zip(begins, phases, strict=False)],
        [block_size(3, columns)] * len(phases),
    )
    samples = np.arange(begins[-1] + 2000)
    stretch, source, draw = mixture.locate(samples)
    assert not stretch.any()
    for number in range(3):
        mine = np.sort(draw[source == number])
        assert np.array_equal(mine, np.arange(mine.size))
    for begin, end, (_, shares) in zip(begins, begins[1:], phases, strict=False):
        for number in np.flatnonzero(np.array(shares) == 0):
            assert not (source[begin:end] == number).any()
    picks = np.random.default_rng(0).permutation(samples)[:200]
    for found, whole in zip(mixture.locate(picks), (stretch, source, draw), strict=True):
        assert np.array_equal(found, whole[picks])


def test_shares_are_exact_in_every_block_and_batch() -> None:
    mixture = Mixture([Phase(0, 0, (0.6, 0.3, 0.1), 8, 64)], [block_size(3, 64)])
    _, source, _ = mixture.locate(np.arange(62 * 1024))
    blocks = np.stack([np.bincount(block, minlength=3) for block in source.reshape(-1, 1024)])
    assert (blocks == [615, 307, 102]).all()
    batches = np.stack([np.bincount(batch, minlength=3) for batch in source.reshape(-1, 64)])
    assert np.abs(batches - np.array([38.4, 19.2, 6.4])).max() < 2


def test_equal_remainders_go_to_the_first_source() -> None:
    """0.6 * 1024 and 0.1 * 1024 both end in .4; as floats either may be larger."""
    assert quotas((0.6, 0.3, 0.1), 1024).tolist() == [615, 307, 102]
    assert quotas((0.1, 0.3, 0.6), 1024).tolist() == [103, 307, 614]
    assert quotas((1e-2, 0.99), 1024).tolist() == [10, 1014]
    assert quotas((6, 3, 1), 1024).tolist() == quotas((0.6, 0.3, 0.1), 1024).tolist()


def test_another_length_begins_a_stretch_of_its_own() -> None:
    phases = [Phase(0, 0, (1.0, 1.0), 8, 4), Phase(100, 800, (1.0, 1.0), 16, 4), Phase(200, 2400, (1.0, 3.0), 16, 4)]
    mixture = Mixture(phases, [1024] * 3)
    stretch, source, draw = mixture.locate(np.arange(400))
    assert mixture.lengths == [8, 16]
    assert stretch.tolist() == [0] * 100 + [1] * 300
    for number in range(2):
        assert np.array_equal(np.sort(draw[100:][source[100:] == number]), np.arange((source[100:] == number).sum()))


def test_a_weight_that_is_too_small() -> None:
    with pytest.raises(
        MixingError, match=r"source 1 with weight 0.0001 of 1.0001 would get no sample in a block of 1024"
    ):
        Mixture([Phase(0, 0, (1.0, 0.0001), 8, 4)], [1024])


def config(phases: list[dict], **training: int) -> Config:
    shape = {"global_batch_size": 8, "micro_batch_size": 1, "seq_length": 32, **training}
    sources = [{"path": "a", "weight": 3}, {"path": "b"}]
    return Config(training=shape, data={"sources": sources, "phases": phases})  # type: ignore[arg-type]


def test_phases_by_steps_and_tokens() -> None:
    phases = resolve_phases(
        config([
            {"from_step": 0, "seq_length": 16, "global_batch_size": 4},
            {"from_step": 10, "global_batch_size": 8, "seq_length": 16},
            {"from_tokens": 2000, "weights": [1, 1], "seq_length": 16},
            {"from_tokens": 10_000, "global_batch_size": 16},
        ])
    )  # fmt: skip
    # Steps 0 to 9 have 64 tokens, 640 in all; then 128 a step.  Weights change in the step they fall into, at sample
    # 40 + (2000 - 640) / 16 = 125; length and batch wait: (10,000 - 640) / 128 = 73.1 steps, the phase begins after 74.
    assert [(p.first_sample, p.first_token, p.seq_length, p.global_batch_size) for p in phases.all] == [
        (0, 0, 16, 4),
        (40, 640, 16, 8),
        (125, 2000, 16, 8),
        (40 + 74 * 8, 640 + 74 * 128, 32, 16),
    ]
    assert [phases.samples_after(steps) for steps in (0, 10, 11, 84, 85)] == [0, 40, 48, 632, 648]
    assert [phase.weights for phase in phases.all] == [(3, 1), (3, 1), (1, 1), (3, 1)]


def test_weights_change_at_any_sample_and_shapes_at_steps() -> None:
    phases = resolve_phases(config([{"from_tokens": 1000, "weights": [0, 1]}, {"from_tokens": 2000, "seq_length": 64}]))
    assert [(p.first_sample, p.first_token) for p in phases.all] == [(0, 0), (32, 1024), (64, 2048)]
    assert [phases.tokens(n) for n in (0, 10, 64, 65)] == [0, 320, 2048, 2112]
    assert phases.samples_after(9) == 72
    phases = resolve_phases(config([{"from_tokens": 1100, "weights": [0, 1]}]))
    assert phases.all[1].first_sample == 35


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([{"weights": [1, 1]}], "data.phases.0 needs from_step or from_tokens, one of them"),
        ([{"from_step": 1, "from_tokens": 2}], "data.phases.0 needs from_step or from_tokens"),
        ([{"from_step": 5, "weights": [1]}], "data.phases.0.weights has 1 numbers for 2 data.sources"),
        ([{"from_step": 5, "weights": [0, 0]}], "data.phases.0.weights: all weights are 0"),
        ([{"from_step": 5}, {"from_step": 5}], "data.phases.1 begins at sample 40, not after the phase before it"),
        ([{"from_step": 5, "global_batch_size": 9, "weights": [1, 1]}, {"from_step": 2}], "data.phases.1 begins"),
    ],
)
def test_mistaken_phases(phases: list[dict], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        config(phases)


def test_a_resume_with_another_batch_size_must_meet_the_phases() -> None:
    phases = resolve_phases(config([{"from_step": 5, "global_batch_size": 16}]))
    phases.check_steps_from(16)
    with pytest.raises(ValueError, match="the change of length or batch size at sample 40 lies inside a step"):
        phases.check_steps_from(20)
    phases.check_steps_from(45)


def test_phases_must_fit_the_layout() -> None:
    with pytest.raises(ValueError, match=r"data.phases.0: training.global_batch_size=9 is not divisible"):
        config([{"from_step": 5, "global_batch_size": 9}], micro_batch_size=2)
