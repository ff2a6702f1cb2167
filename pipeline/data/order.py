"""Draw number -> (epoch, chunk, window) of one source, a pure function: the whole state of a reader is one integer.

A chunk of n tokens holds (n - 1) // seq_length windows of seq_length + 1 tokens that overlap by one token.

`windows`: every epoch is a random permutation of all windows.  The best shuffle, and what is right for a corpus that
fits into the page cache; on a large one it would scatter 8 kB reads over the whole store.

`chunks`: every epoch permutes the chunks, lays their windows in a row and reads that row from many places in turn:

    epoch      | chunk 7 | chunk 2 | chunk 9 | chunk 4 | ...       a permutation of the chunks
    lanes      |---- lane 0 ----|---- lane 1 ----| ...             equal pieces, read in turn (see lanes.py)

So a batch draws from as many places of the corpus as it has samples, while each chunk is read once, from front to back
and by one rank.  The obvious alternatives: a shuffle buffer has to be saved in checkpoints and depends on the number of
readers; a stored permutation of 15 T tokens takes 30 GB.  Here nothing depends on ranks, workers or micro-batch, and
nothing is stored but 8 bytes per 16 chunks.  The trade-off: neighbours in a chunk stay about `columns * depth` draws
apart, so documents must have been shuffled when the shards were written (`prepare` does).
"""

import threading
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pipeline.data.lanes import I64, Lanes, Layout, Unread
from pipeline.data.permute import Permutation

ORDER_VERSION = 2
"""Part of the fingerprint in checkpoints: raise it with any change of the order."""
LANE_DEPTH = 4
"""Lanes per column, if the corpus has the chunks for it."""
_CHUNKS_PER_LANE = 8
_GROUP = 16
_SLICE = 1 << 16
_TABLE_WINDOWS = 1 << 20
"""Permutations of at most so many windows are computed once per epoch: a look-up is faster, and takes 8 MB."""
_KNOWN_GROUPS = 1 << 16
"""Of 16 chunks; a rank reads 4 per sample of its batch."""

Shuffle = Literal["windows", "chunks"]
Key = tuple[int | str, ...]


class Places(NamedTuple):
    """Where draws lie; three int64 arrays of equal length."""

    epoch: I64
    chunk: I64
    """Chunk of the split, counted over its shards in order."""
    window: I64
    """Window inside the chunk, from 0."""


class LayoutChange(NamedTuple):
    """From this draw on the source is read in that many columns."""

    first_draw: int
    columns: int


class SourceOrder(Protocol):
    """The endless sequence of draws from one source."""

    num_windows: int
    """Windows per epoch."""

    def locate(self, draws: I64) -> Places:
        """Where these draws lie, [n] each."""


class WindowShuffle:
    """`windows`: each epoch a random permutation.

    Args:
        windows_per_chunk: number of windows of each chunk.
        key: selects the order; each epoch has its own permutation.
    """

    def __init__(self, windows_per_chunk: npt.NDArray[np.integer], key: Key) -> None:
        begin = np.cumsum([0, *windows_per_chunk], dtype=np.int64)
        self.num_windows = _checked_total(int(begin[-1]))
        self._epochs = _Epochs(
            self.num_windows, lambda number: _ShuffledWindows(begin, self.num_windows, (*key, number, "windows"))
        )

    def locate(self, draws: I64) -> Places:
        """Where these draws lie, [n] each."""
        return self._epochs.locate(draws)


class ChunkInterleave:
    """`chunks`: each epoch a permutation of the chunks, read from many places in turn.

    Args:
        windows_per_chunk: number of windows of each chunk.
        key: selects the order; each epoch has its own.
        layouts: columns over the draws, ascending, the first from draw 0.
    """

    def __init__(self, windows_per_chunk: npt.NDArray[np.integer], key: Key, layouts: Sequence[LayoutChange]) -> None:
        self._windows = np.asarray(windows_per_chunk, dtype=np.int32)
        self.num_windows = _checked_total(int(self._windows.sum(dtype=np.int64)))
        self._layouts = tuple(layouts)
        self._epochs = _Epochs(
            self.num_windows,
            lambda number: _InterleavedChunks(self._windows, (*key, number), self._changes(number)),
        )

    def locate(self, draws: I64) -> Places:
        """Where these draws lie, [n] each."""
        return self._epochs.locate(draws)

    def _changes(self, epoch: int) -> list[tuple[int, Layout]]:
        """(first draw of this epoch, layout) of the layouts that are used in the epoch."""
        begin = epoch * self.num_windows
        current = [change for change in self._layouts if change.first_draw <= begin][-1]
        later = [change for change in self._layouts if begin < change.first_draw < begin + self.num_windows]
        return [(max(0, change.first_draw - begin), self._layout(change.columns)) for change in (current, *later)]

    def _layout(self, columns: int) -> Layout:
        depth = len(self._windows) // (columns * _CHUNKS_PER_LANE)
        return Layout(columns, min(max(depth, 1), LANE_DEPTH))


class _Epoch(Protocol):
    def locate(self, position: I64) -> tuple[I64, I64]:
        """Chunks and windows of these draws, counted from the beginning of the epoch."""


class _Epochs:
    """Epochs of the same length one after the other, made when they are needed; threads may share it."""

    def __init__(self, num_windows: int, make: Callable[[int], _Epoch]) -> None:
        self._num_windows, self._make = num_windows, make
        self._known: dict[int, _Epoch] = {}
        self._lock = threading.Lock()

    def locate(self, draws: I64) -> Places:
        epoch, position = np.divmod(draws, self._num_windows)
        chunk, window = np.empty_like(position), np.empty_like(position)
        for number in set(epoch.tolist()):
            here = epoch == number
            chunk[here], window[here] = self._epoch(number).locate(position[here])
        return Places(epoch, chunk, window)

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:
            if number not in self._known:
                if len(self._known) > 1:  # readers stand in one epoch, or across the border of two
                    self._known.pop(min(self._known))
                self._known[number] = self._make(number)
            return self._known[number]


class _ShuffledWindows:
    """One epoch of `windows`."""

    def __init__(self, begin: I64, num_windows: int, key: Key) -> None:
        self._begin = begin
        permutation = Permutation(num_windows, key)
        self._items: Callable[[I64], I64] = permutation
        if num_windows <= _TABLE_WINDOWS:
            self._items = permutation(np.arange(num_windows)).__getitem__

    def locate(self, position: I64) -> tuple[I64, I64]:
        item = self._items(position)
        chunk = np.searchsorted(self._begin, item, side="right") - 1
        return chunk, item - self._begin[chunk]


class _InterleavedChunks:
    """One epoch of `chunks`: a row of windows, and the lanes that read it, cut anew at each change of the layout."""

    def __init__(self, windows_per_chunk: npt.NDArray[np.int32], key: Key, changes: list[tuple[int, Layout]]) -> None:
        self._row = _PermutedChunks(windows_per_chunk, (*key, "chunks"))
        self._begins = np.array([begin for begin, _ in changes])
        self._lanes: list[Lanes] = []
        self._unread: list[Unread] = []
        for number, (begin, layout) in enumerate(changes):
            if number:
                self._unread.append(self._lanes[-1].unread(begin - int(self._begins[number - 1])))
            self._lanes.append(Lanes(self._row.num_windows - begin, layout, (*key, number)))

    def locate(self, position: I64) -> tuple[I64, I64]:
        if not self._unread:
            return self._row.locate(self._lanes[0].items(position))
        level = np.searchsorted(self._begins, position, side="right") - 1
        item = position - self._begins[level]
        for number in range(len(self._lanes) - 1, -1, -1):
            fresh, remapped = level == number, level > number
            item[fresh] = self._lanes[number].items(item[fresh])
            if remapped.any():
                item[remapped] = self._unread[number].items(item[remapped])
        return self._row.locate(item)


class _Groups(NamedTuple):
    """Some groups of 16 chunks."""

    groups: I64
    """[g] ascending."""
    chunks: I64
    """[g, 16]"""
    begins: I64
    """[g, 16] where the windows of each chunk begin in the row."""


class _PermutedChunks:
    """The windows of permuted chunks in a row; remembers where every 16th chunk begins and computes the others."""

    def __init__(self, windows_per_chunk: npt.NDArray[np.int32], key: Key) -> None:
        self._windows = windows_per_chunk
        self._permutation = Permutation(len(windows_per_chunk), key)
        groups = -(-len(windows_per_chunk) // _GROUP)
        lengths = np.zeros(groups + 1, dtype=np.int64)
        for begin in range(0, groups, _SLICE // _GROUP):  # in slices that stay in the processor's cache
            some = np.arange(begin, min(begin + _SLICE // _GROUP, groups))
            lengths[some + 1] = self._lengths_of(some)[1].sum(axis=1)
        self._begin = np.cumsum(lengths)
        self.num_windows = int(self._begin[-1])
        self._known = self._groups(np.zeros(1, dtype=np.int64))

    def locate(self, item: I64) -> tuple[I64, I64]:
        group = np.searchsorted(self._begin, item, side="right") - 1
        known = self._known
        row = np.searchsorted(known.groups, group)
        if not np.array_equal(known.groups.take(row, mode="clip"), group):
            known = self._known = self._learn(group)
            row = np.searchsorted(known.groups, group)
        place = (known.begins[row] <= item[:, None]).sum(axis=1) - 1
        return known.chunks[row, place], item - known.begins[row, place]

    def _learn(self, group: I64) -> "_Groups":
        """What is known, with these groups: readers stay in the same ones for thousands of draws."""
        known, groups = self._known, np.unique(group)
        if len(known.groups) + groups.size > _KNOWN_GROUPS:
            return self._groups(groups)  # without those that readers have left
        new = self._groups(np.setdiff1d(groups, known.groups))
        where = np.searchsorted(known.groups, new.groups)
        return _Groups(*(np.insert(old, where, more, axis=0) for old, more in zip(known, new, strict=True)))

    def _groups(self, groups: I64) -> "_Groups":
        chunks, lengths = self._lengths_of(groups)
        return _Groups(groups, chunks, self._begin[groups][:, None] + np.cumsum(lengths, axis=1) - lengths)

    def _lengths_of(self, groups: I64) -> tuple[I64, I64]:
        """Chunks of these groups in order and their windows, [groups, 16]; what is past the last chunk has none."""
        index = groups[:, None] * _GROUP + np.arange(_GROUP)
        inside = index < len(self._windows)
        chunks = self._permutation(np.where(inside, index, 0).reshape(-1)).reshape(index.shape)
        return chunks, np.where(inside, self._windows[chunks], 0).astype(np.int64)


def make_order(
    shuffle: Shuffle, windows_per_chunk: npt.NDArray[np.integer], key: Key, layouts: Sequence[LayoutChange]
) -> SourceOrder:
    """The order of one source.

    Raises:
        ValueError: no chunk holds a window.
    """
    if shuffle == "windows":
        return WindowShuffle(windows_per_chunk, key)
    return ChunkInterleave(windows_per_chunk, key, layouts)


def _checked_total(num_windows: int) -> int:
    if not num_windows:
        raise ValueError("no chunk holds a single window")
    return num_windows
