"""Sample number -> (source, epoch, chunk, window), a pure function: the whole state of a reader is one integer.

A chunk of n tokens holds (n - 1) // seq_length windows of seq_length + 1 tokens that overlap by one token.  Chunks are
cut into runs of W consecutive windows; an epoch visits the runs in a permuted order, K at a time:

    chunk 7  [ w0 w1 .. w(W-1) | ..      block 0 = K permuted runs     sample p of a block -> run p mod K,
    chunk 2  [ ..              | ..      block 1 = the next K runs                             window p div K of it
                                         tail    = windows that fill no run, permuted singly

So every batch draws from K places of the corpus, while each run is read front to back once.  The obvious way, a
permutation of all windows, scatters 8 kB reads over the whole corpus; a shuffle buffer would have to be saved in
checkpoints and depends on the number of readers.  Here nothing depends on ranks, workers, micro- or global batch.
The trade-off: within an epoch, windows of one run stay K samples apart, so documents must have been shuffled when the
shards were written (`prepare` does).
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.data.permute import Permutation

I64 = npt.NDArray[np.int64]

ORDER_VERSION = 1
"""Part of the fingerprint in checkpoints: raise it with any change of the order."""
BLOCK_RUNS = 256
"""K: runs that are interleaved."""
MAX_RUN_WINDOWS = 64
"""Upper bound of W."""


class Locations(NamedTuple):
    """Where samples lie; four int64 arrays of equal length."""

    source: I64
    """Index of the dataset in a mixture; 0 as long as there is one dataset."""
    epoch: I64
    chunk: I64
    """Chunk of the split, counted over its shards in order."""
    window: I64
    """Window inside the chunk: tokens `window * seq_length` to `(window + 1) * seq_length`, both included."""


def choose_run_windows(windows_per_chunk: I64) -> int:
    """W in [max/2, max], max = min(64, largest chunk), that leaves the fewest windows to the tail; ties: the largest.

    A fixed W = 64 would send a quarter of the windows of a 255-window chunk to the tail; W = 51 sends none.
    """
    limit = int(min(MAX_RUN_WINDOWS, windows_per_chunk.max(initial=1)))
    sizes, counts = np.unique(windows_per_chunk, return_counts=True)
    candidates = range(max(1, limit), max(1, (limit + 1) // 2) - 1, -1)
    return min(candidates, key=lambda run: int(((sizes % run) * counts).sum()))


class WindowOrder:
    """The endless sample order of one split.

    Args:
        windows_per_chunk: Number of windows of each chunk.
        seed: Selects the order; each epoch has its own permutation.
        block_runs: K, runs that are interleaved.

    Raises:
        ValueError: There is no window at all.
    """

    def __init__(self, windows_per_chunk: I64, *, seed: int, block_runs: int = BLOCK_RUNS) -> None:
        windows = np.asarray(windows_per_chunk, dtype=np.int64)
        self.num_windows = int(windows.sum())
        if self.num_windows == 0:
            raise ValueError("no chunk holds a single window")
        self.run_windows = choose_run_windows(windows)
        self._seed = seed
        self._runs_of_chunk, left = np.divmod(windows, self.run_windows)
        self._run_start = np.concatenate(([0], np.cumsum(self._runs_of_chunk)))
        self._tail_start = np.concatenate(([0], np.cumsum(left)))
        self._num_runs = int(self._run_start[-1])
        self._num_blocks = -(-self._num_runs // block_runs)

    def locate(self, samples: npt.ArrayLike) -> Locations:
        """Where the samples with these numbers lie.

        Args:
            samples: Sample numbers of the endless stream, any order, [n].

        Returns:
            Locations, arrays of [n].

        Raises:
            ValueError: A number is negative.
        """
        numbers = np.asarray(samples, dtype=np.int64).reshape(-1)
        if numbers.size and numbers.min() < 0:
            raise ValueError(f"sample numbers start at 0, got {numbers.min()}")
        epoch, position = np.divmod(numbers, self.num_windows)
        chunk, window = np.empty_like(position), np.empty_like(position)
        for current in np.unique(epoch):
            here = epoch == current
            chunk[here], window[here] = self._locate_in_epoch(int(current), position[here])
        return Locations(np.zeros_like(epoch), epoch, chunk, window)

    def _locate_in_epoch(self, epoch: int, position: I64) -> tuple[I64, I64]:
        body = self._num_runs * self.run_windows
        chunk, window = np.empty_like(position), np.empty_like(position)
        in_body = position < body
        if in_body.any():
            chunk[in_body], window[in_body] = self._locate_in_runs(epoch, position[in_body])
        if not in_body.all():
            chunk[~in_body], window[~in_body] = self._locate_in_tail(epoch, position[~in_body] - body)
        return chunk, window

    def _locate_in_runs(self, epoch: int, position: I64) -> tuple[I64, I64]:
        # Blocks differ by at most one run: a short last block would put one run's windows next to each other.
        small, num_large = divmod(self._num_runs, self._num_blocks)
        large_end = num_large * (small + 1) * self.run_windows
        is_large = position < large_end
        runs = np.where(is_large, small + 1, small)
        block, offset = np.divmod(np.where(is_large, position, position - large_end), runs * self.run_windows)
        first_run = np.where(is_large, 0, num_large * (small + 1)) + block * runs
        step, lane = np.divmod(offset, runs)
        run = Permutation(self._num_runs, (self._seed, epoch, "runs"))(first_run + lane)
        chunk = np.searchsorted(self._run_start, run, side="right") - 1
        return chunk, (run - self._run_start[chunk]) * self.run_windows + step

    def _locate_in_tail(self, epoch: int, position: I64) -> tuple[I64, I64]:
        rank = Permutation(int(self._tail_start[-1]), (self._seed, epoch, "tail"))(position)
        chunk = np.searchsorted(self._tail_start, rank, side="right") - 1
        return chunk, self._runs_of_chunk[chunk] * self.run_windows + rank - self._tail_start[chunk]
