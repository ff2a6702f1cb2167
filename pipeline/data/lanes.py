"""Read a long list from many places in turn: each place is read from front to back, and by the same rank.

    list     |---- lane 0 ----|---- lane 1 ----|---- lane 2 ----| ...      L = columns * depth equal pieces

    round r  the r-th item of every lane, columns next to each other:
             draw n  ->  round n div L,  slot n mod L,  column = slot mod columns,  depth rotated by hash(round, column)

Draw n always falls into column n mod columns.  So if the columns are a multiple of what a global batch takes, the same
rank, whichever it is, reads a column's lanes from start to end.  `depth` lanes per column come in an order that is
drawn anew every round; otherwise batch after batch would draw from the same places, which shows as waves in the loss.

When the number of columns changes on the way (another mixture, another batch size), what no lane has read yet is again
a list, and is cut into new lanes: `Unread` maps it.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data.permute import derive_keys, mix64

I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Layout:
    """How a list is read: from so many columns in turn, each made of `depth` lanes."""

    columns: int
    depth: int

    @property
    def lanes(self) -> int:
        """Places that are read in turn."""
        return self.columns * self.depth


class Lanes:
    """A bijection from draws to the items of a list.

    Args:
        length: items of the list.
        layout: how it is read.
        key: selects the order of the lanes of a column.
    """

    def __init__(self, length: int, layout: Layout, key: tuple[int | str, ...]) -> None:
        self.length, self._layout = length, layout
        self._rounds, self._longer = divmod(length, layout.lanes)  # the first `_longer` lanes have one item more
        self._key = derive_keys((*key, "lanes"), 1)[0]

    def items(self, draws: I64) -> I64:
        """Items of these draws, each in `[0, length)`."""
        turn, slot = np.divmod(draws, self._layout.lanes)
        lane = np.where(turn < self._rounds, self._lane(turn, slot), slot)
        return self._start(lane) + turn

    def unread(self, draws: int) -> "Unread":
        """What is left of the list after the first `draws` draws."""
        turn, slots = divmod(draws, self._layout.lanes)
        lanes = np.arange(self._layout.lanes)
        done = np.full(lanes.size, turn)
        visited = lanes[:slots]
        done[self._lane(np.full(slots, turn), visited) if turn < self._rounds else visited] += 1
        first = self._start(lanes) + done
        return Unread(first, np.cumsum(self._start(lanes + 1) - first))

    def _lane(self, turn: I64, slot: I64) -> I64:
        depth, column = np.divmod(slot, self._layout.columns)
        if self._layout.depth > 1:
            place = (turn * self._layout.columns + column).astype(np.uint64)
            turned = mix64(place ^ self._key) % np.uint64(self._layout.depth)
            depth = (depth + turned.astype(np.int64)) % self._layout.depth
        return depth * self._layout.columns + column

    def _start(self, lane: I64) -> I64:
        return lane * self._rounds + np.minimum(lane, self._longer)


@dataclass(frozen=True)
class Unread:
    """A list made of the ends of lanes, one after the other."""

    first: I64
    """First unread item of each lane."""
    end: I64
    """Unread items of the lanes up to and including each."""

    def items(self, index: I64) -> I64:
        """Items of the list that the lanes were cut from."""
        lane = np.searchsorted(self.end, index, side="right")
        before = np.where(lane > 0, self.end[lane - 1], 0)
        return self.first[lane] + index - before
