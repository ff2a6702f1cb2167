"""The order is a bijection of each epoch onto the windows, random access, well spread, and reads forwards."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.lanes import Lanes, Layout
from pipeline.data.order import ChunkInterleave, LayoutChange, WindowShuffle, make_order
from pipeline.data.permute import Permutation

chunk_windows = st.lists(st.integers(0, 150), min_size=1, max_size=40).filter(any)
layouts = st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 60)), max_size=3)


def changes(first: int, later: list[tuple[int, int]]) -> list[LayoutChange]:
    """Layouts that change after so many further draws."""
    begins = np.cumsum([0, *(gap for gap, _ in later)])
    return [
        LayoutChange(int(begin), columns)
        for begin, columns in zip(begins, [first, *dict(later).values()], strict=False)
    ]


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


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 5), st.data())
def test_lanes_give_every_item_once_and_unread_is_the_rest(
    length: int, columns: int, depth: int, data: st.DataObject
) -> None:
    lanes = Lanes(length, Layout(columns, depth), ("x",))
    items = lanes.items(np.arange(length))
    assert sorted(items.tolist()) == list(range(length))
    done = data.draw(st.integers(0, length))
    rest = lanes.unread(done)
    assert rest.end[-1] == length - done
    assert rest.items(np.arange(length - done)).tolist() == sorted(items[done:].tolist())


@settings(max_examples=80, deadline=None)
@given(chunk_windows, st.integers(0, 2**31), st.integers(1, 60), layouts, st.sampled_from(["windows", "chunks"]))
def test_each_window_once_per_epoch(
    windows: list[int], seed: int, columns: int, later: list[tuple[int, int]], shuffle: str
) -> None:
    counts, total = np.array(windows), sum(windows)
    if shuffle == "windows":
        order = WindowShuffle(counts, (seed,))
    else:
        order = ChunkInterleave(counts, (seed,), changes(columns, later))
    assert order.num_windows == total
    places = order.locate(np.arange(3 * total))
    for epoch in range(3):
        here = places.epoch == epoch
        seen = sorted(zip(places.chunk[here].tolist(), places.window[here].tolist(), strict=True))
        assert seen == [(chunk, window) for chunk, count in enumerate(windows) for window in range(count)]


@settings(max_examples=40, deadline=None)
@given(chunk_windows, st.integers(1, 30), layouts, st.data())
def test_random_access_equals_sequential(
    windows: list[int], columns: int, later: list[tuple[int, int]], data: st.DataObject
) -> None:
    order = ChunkInterleave(np.array(windows), (5,), changes(columns, later))
    stream = order.locate(np.arange(4 * order.num_windows))
    picks = data.draw(st.lists(st.integers(0, 4 * order.num_windows - 1), min_size=1, max_size=30))
    for field, whole in zip(order.locate(np.array(picks)), stream, strict=True):
        assert np.array_equal(field, whole[picks])


def test_order_does_not_change_between_versions() -> None:
    """Golden values: a change breaks resuming old runs, so it needs a new ORDER_VERSION."""
    windows, draws = np.array([100, 37, 64, 0, 129]), np.array([0, 1, 2, 3, 319, 320, 329, 1000])
    places = WindowShuffle(windows, (42,)).locate(draws)
    assert places.epoch.tolist() == [0, 0, 0, 0, 0, 0, 0, 3]
    assert (places.chunk.tolist(), places.window.tolist()) == GOLDEN["windows"]
    places = ChunkInterleave(windows, (42,), [LayoutChange(0, 4), LayoutChange(500, 3)]).locate(draws)
    assert (places.chunk.tolist(), places.window.tolist()) == GOLDEN["chunks"]


GOLDEN = {
    "windows": ([0, 0, 2, 1, 0, 4, 0, 0], [81, 73, 24, 17, 66, 4, 92, 34]),
    "chunks": ([1, 2, 4, 0, 0, 2, 4, 4], [0, 46, 65, 18, 97, 43, 64, 113]),
}


def test_seeds_and_epochs_differ() -> None:
    windows = np.full(50, 40)
    for make in (
        lambda seed: WindowShuffle(windows, (seed,)),
        lambda seed: ChunkInterleave(windows, (seed,), [LayoutChange(0, 8)]),
    ):
        first = make(1).locate(np.arange(2000)).chunk
        assert not np.array_equal(first, make(2).locate(np.arange(2000)).chunk)
        assert not np.array_equal(first, make(1).locate(np.arange(2000, 4000)).chunk)


@pytest.mark.parametrize("dp", [1, 2, 8, 64])
def test_a_rank_reads_its_chunks_once_and_forwards(dp: int) -> None:
    """8,192 chunks of 20 to 39 windows in 64 columns of 4 lanes; each cut between two lanes is one more visit."""
    windows = np.random.default_rng(0).integers(20, 40, 8192)
    order = ChunkInterleave(windows, (0,), [LayoutChange(0, 64)])
    total = order.num_windows // 64 * 64
    places = order.locate(np.arange(total))
    rank = np.arange(total) % 64 // (64 // dp)
    readers, visits = set(), 0
    for mine in range(dp):
        chunk, window = places.chunk[rank == mine], places.window[rank == mine]
        for number in np.unique(chunk).tolist():
            steps = np.diff(window[chunk == number])
            visits += 1 + int((steps != 1).sum())
            readers.add((mine, number))
    assert visits <= 8192 + 256
    assert len(readers) <= 8192 + 256


def test_a_rank_goes_on_reading_forwards_when_the_columns_change() -> None:
    windows = np.full(2048, 32)
    order = ChunkInterleave(windows, (0,), [LayoutChange(0, 16), LayoutChange(20_000, 64)])
    places = order.locate(np.arange(order.num_windows))
    visits = 0
    for begin, end, columns in ((0, 20_000, 16), (20_000, order.num_windows, 64)):
        column = (np.arange(begin, end) - begin) % columns
        for mine in range(columns):
            chunk, window = places.chunk[begin:end][column == mine], places.window[begin:end][column == mine]
            visits += sum(1 + int((np.diff(window[chunk == c]) != 1).sum()) for c in np.unique(chunk))
    assert visits <= 2048 + 16 * 4 + 64 * 4 + 16 * 4


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any),
    st.sampled_from([1, 2, 3, 4, 8, 16, 48]),
    st.sampled_from(["windows", "chunks"]),
)
def test_no_rank_starves(windows: list[int], dp: int, shuffle: str) -> None:
    """Corpora smaller than a batch of 48 included: every rank gets its samples, and every window comes 48 times."""
    counts, total = np.array(windows), sum(windows)
    order = make_order(shuffle, counts, (1,), [LayoutChange(0, 48)])
    draws = np.arange(48 * total)
    places, rank = order.locate(draws), draws % 48 // (48 // dp)
    assert np.bincount(rank).tolist() == [48 * total // dp] * dp
    begin = np.cumsum(counts) - counts
    window = begin[places.chunk] + places.window
    assert np.array_equal(np.bincount(window, minlength=total), np.full(total, 48))
    own = order.locate(draws[rank == dp - 1])  # what the last rank asks for, alone
    assert np.array_equal(begin[own.chunk] + own.window, window[rank == dp - 1])


def test_batches_draw_from_many_chunks() -> None:
    order = ChunkInterleave(np.full(4096, 64), (0,), [LayoutChange(0, 128)])
    places = order.locate(np.arange(order.num_windows))
    batches = places.chunk.reshape(-1, 128)
    assert min(len(np.unique(batch)) for batch in batches) > 120


@pytest.mark.parametrize("shuffle", ["windows", "chunks"])
def test_batches_do_not_come_back_to_the_same_chunks(shuffle: str) -> None:
    """A small corpus of 64 chunks, batches of 16: the chunks of a batch say nothing of those k steps later.

    Expected under independence: batches of 16 from 64 chunks share 16 * 16 / 64 = 4 pairs; a fixed cycle through the
    chunks gives 16 at its period and 0 elsewhere.
    """
    windows = np.full(64, 200)
    order = (
        WindowShuffle(windows, (0,)) if shuffle == "windows" else ChunkInterleave(windows, (0,), [LayoutChange(0, 16)])
    )
    batches = order.locate(np.arange(order.num_windows)).chunk.reshape(-1, 16)
    counts = np.stack([np.bincount(batch, minlength=64) for batch in batches])
    if shuffle == "windows":
        for lag in range(1, 40):
            assert abs((counts[lag:] * counts[:-lag]).sum(axis=1).mean() - 4) < 0.35, lag
    else:  # neighbours in time read on in the same chunks, in no fixed rhythm
        shared = np.array([(counts[lag:] * counts[:-lag]).sum(axis=1).mean() for lag in range(4, 40)])
        assert shared.max() - shared.min() < 6


def test_errors() -> None:
    with pytest.raises(ValueError, match="no chunk holds a single window"):
        WindowShuffle(np.array([0, 0]), (0,))
    with pytest.raises(ValueError, match="no chunk holds a single window"):
        ChunkInterleave(np.array([0, 0]), (0,), [LayoutChange(0, 1)])
    with pytest.raises(ValueError, match="a permutation needs 1 to"):
        Permutation(0, ("x",))


def test_a_corpus_of_15_trillion_tokens() -> None:
    """14.3 million chunks, 8,192 GPUs: opening the order and locating steps anywhere is a matter of seconds."""
    windows = np.random.default_rng(0).integers(256, 300, 14_300_000).astype(np.int32)
    order = ChunkInterleave(windows, (0,), [LayoutChange(0, 4096)])
    assert order.num_windows == windows.sum()
    steps = [order.locate(step * 4096 + np.arange(4096)) for step in (0, 1, 2, 3, 4, 400_000, 960_000)]
    assert len(np.unique(steps[0].chunk)) > 4000
    column = np.arange(4096)
    for places in steps:
        assert (places.window < windows[places.chunk]).all()
    # The same rank's lanes: after a round of 4 steps each column is in the same 4 chunks, one window further.
    first = [{(int(step.chunk[c]), int(step.window[c])) for step in steps[:4]} for c in column]
    assert all((int(steps[4].chunk[c]), int(steps[4].window[c]) - 1) in first[c] for c in column[steps[4].window > 0])
