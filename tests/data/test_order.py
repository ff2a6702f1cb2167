"""The order is a bijection of each epoch onto the windows, random access, and well spread."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.order import WindowOrder, choose_run_windows
from pipeline.data.permute import Permutation

chunk_windows = st.lists(st.integers(0, 150), min_size=1, max_size=40).filter(any)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 100))
def test_permutation_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    images = Permutation(size, (seed, epoch, "x"))(np.arange(size))
    assert np.array_equal(np.sort(images), np.arange(size))


def test_permutation_has_no_visible_order() -> None:
    """Chi-square of image deciles against position deciles; 81 degrees of freedom, 99.99 % quantile is 134."""
    size = 100_000
    images = Permutation(size, (1,))(np.arange(size))
    table = np.histogram2d(np.arange(size), images, bins=10)[0]
    chi_square = ((table - size / 100) ** 2 / (size / 100)).sum()
    assert chi_square < 134
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.015


def test_permutation_of_a_huge_set_stays_inside() -> None:
    size = 3_700_000_000
    images = Permutation(size, ("huge",))(np.arange(10_000) * 370_000)
    assert images.min() >= 0
    assert images.max() < size
    assert len(np.unique(images)) == 10_000


@settings(max_examples=80, deadline=None)
@given(chunk_windows, st.integers(0, 2**31), st.integers(1, 60), st.integers(0, 3))
def test_each_window_once_per_epoch(windows: list[int], seed: int, block_runs: int, epoch: int) -> None:
    order = WindowOrder(np.array(windows), seed=seed, block_runs=block_runs)
    total = sum(windows)
    assert order.num_windows == total
    places = order.locate(np.arange(epoch * total, (epoch + 1) * total))
    assert set(places.epoch.tolist()) == {epoch}
    assert set(places.source.tolist()) == {0}
    seen = sorted(zip(places.chunk.tolist(), places.window.tolist(), strict=True))
    assert seen == [(chunk, window) for chunk, count in enumerate(windows) for window in range(count)]


@settings(max_examples=40, deadline=None)
@given(chunk_windows, st.data())
def test_random_access_equals_sequential(windows: list[int], data: st.DataObject) -> None:
    order = WindowOrder(np.array(windows), seed=5, block_runs=7)
    stream = order.locate(np.arange(3 * order.num_windows))
    picks = data.draw(st.lists(st.integers(0, 3 * order.num_windows - 1), min_size=1, max_size=30))
    for field, whole in zip(order.locate(picks), stream, strict=True):
        assert np.array_equal(field, whole[picks])


def test_order_does_not_change_between_versions() -> None:
    """Golden values: a change breaks resuming old runs, so it needs a new ORDER_VERSION."""
    order = WindowOrder(np.array([100, 37, 64, 0, 129]), seed=42)
    places = order.locate([0, 1, 2, 3, 319, 320, 329, 1000])
    assert order.run_windows == 32
    assert places.epoch.tolist() == [0, 0, 0, 0, 0, 0, 0, 3]
    assert places.chunk.tolist() == [2, 4, 2, 4, 0, 0, 1, 4]
    assert places.window.tolist() == [32, 96, 0, 0, 63, 96, 33, 97]


def test_seeds_and_epochs_differ() -> None:
    windows = np.full(50, 40)
    first = WindowOrder(windows, seed=1).locate(np.arange(2000)).chunk
    assert not np.array_equal(first, WindowOrder(windows, seed=2).locate(np.arange(2000)).chunk)
    assert not np.array_equal(first, WindowOrder(windows, seed=1).locate(np.arange(2000, 4000)).chunk)


def test_batches_draw_from_many_chunks_and_read_forwards() -> None:
    order = WindowOrder(np.full(600, 255), seed=0)
    places = order.locate(np.arange(order.num_windows))
    batches = places.chunk[: order.num_windows // 256 * 256].reshape(-1, 256)
    assert min(len(np.unique(batch)) for batch in batches) > 150
    for chunk in (0, 300, 599):
        windows = places.window[places.chunk == chunk]
        runs = windows // order.run_windows
        for run in np.unique(runs):
            assert (np.diff(windows[runs == run]) == 1).all()


@pytest.mark.parametrize(("windows", "run"), [([255] * 9, 51), ([128] * 9, 64), ([20], 20), ([1, 1], 1), ([64, 3], 64)])
def test_run_length_leaves_few_windows_to_the_tail(windows: list[int], run: int) -> None:
    assert choose_run_windows(np.array(windows)) == run


def test_errors() -> None:
    with pytest.raises(ValueError, match="no chunk holds a single window"):
        WindowOrder(np.array([0, 0]), seed=0)
    with pytest.raises(ValueError, match="sample numbers start at 0, got -3"):
        WindowOrder(np.array([4]), seed=0).locate([1, -3])
