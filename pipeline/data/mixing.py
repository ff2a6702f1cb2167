"""Sample number -> (source, draw): weighted mixing with exact shares and no state.

Samples come in blocks of B.  In every block each source has a fixed quota, its share of B rounded so that the quotas
sum to B (largest remainder), and fixed positions, spread as evenly as they go:

    block    web web code web web math web code ...       B positions, the same in every block of a phase
    draw     number of quotas of the blocks before + rank of the position among those of its source

So after any number of blocks the shares are exact, and every batch has them to within one sample per source; drawing
the source at random would be right only on average, and off by sqrt(n).  A position always has the same source, and a
source has as many columns as positions (see lanes.py): the rank that reads a position reads the same chunks on.

When the weights change, every source goes on with its next draw: what a phase has not seen comes in the next one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from pipeline.data.lanes import I64
from pipeline.data.order import LayoutChange
from pipeline.data.phases import Phase

MIN_MIXED_BLOCK = 1024
"""Smallest block of a mixture: shares are exact to 0.1%."""


class MixingError(ValueError):
    """A weight that is too small to be kept."""


def block_size(num_sources: int, columns: int) -> int:
    """B: a multiple of the columns, large enough to hold small shares."""
    return columns if num_sources == 1 else columns * -(-MIN_MIXED_BLOCK // columns)


def quotas(weights: Sequence[float], block: int) -> npt.NDArray[np.int64]:
    """Samples of each source per block: largest remainders, the first source where they are equal.

    Computed with the decimals that were written, not with floats: 0.6 and 0.1 of 1,024 have equal remainders, and
    which one is larger as a float depends on the version of Python, whose `sum` is compensated since 3.12.

    Raises:
        MixingError: a source with a weight above 0 gets none.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    total = sum(exact)
    shares = [weight * block / total for weight in exact]
    counts = np.array([math.floor(share) for share in shares], dtype=np.int64)
    missing = block - int(counts.sum())
    counts[sorted(range(len(shares)), key=lambda number: -(shares[number] % 1))[:missing]] += 1
    for number, (weight, count) in enumerate(zip(weights, counts.tolist(), strict=True)):
        if weight and not count:
            raise MixingError(
                f"source {number} with weight {weight:g} of {sum(weights):g} would get no sample in a block of "
                f"{block}; give it at least {sum(weights) / block:.2g}, or 0"
            )
    return counts


def spread(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Source of each position of a block: at every position the source that is furthest behind its share."""
    block = int(counts.sum())
    pattern = np.empty(block, dtype=np.int64)
    behind = np.zeros(len(counts), dtype=np.int64)
    for position in range(block):
        behind += counts
        pattern[position] = source = int(np.argmax(behind))
        behind[source] -= block
    return pattern


@dataclass(frozen=True)
class _Part:
    """Samples from `first` on, up to the next part."""

    first: int
    stretch: int
    quotas: I64
    pattern: I64
    rank: I64
    """Of each position, among the positions of its source."""
    base: I64
    """Draws of each source before `first`, within the stretch."""

    def draws(self, sources: I64, samples: I64) -> I64:
        block, position = (samples - self.first) // len(self.pattern), (samples - self.first) % len(self.pattern)
        return self.base[sources] + block * self.quotas[sources] + self.rank[position]

    def sources(self, samples: I64) -> I64:
        return self.pattern[(samples - self.first) % len(self.pattern)]

    def drawn(self, samples: int) -> I64:
        """Draws of each source before sample number `samples`."""
        blocks, rest = divmod(samples - self.first, len(self.pattern))
        begun = np.bincount(self.pattern[:rest], minlength=len(self.quotas)).astype(np.int64)
        drawn: I64 = self.base + blocks * self.quotas + begun
        return drawn


class Mixture:
    """Which source a sample comes from, and which draw of it it is.

    A stretch is a run of phases with one sequence length: its draws count from 0.

    Args:
        phases: in order.
        blocks: B of each phase.

    Raises:
        MixingError: a weight is too small.
    """

    def __init__(self, phases: Sequence[Phase], blocks: Sequence[int]) -> None:
        self._parts: list[_Part] = []
        self.lengths: list[int] = []
        """Sequence length of each stretch."""
        for phase, block in zip(phases, blocks, strict=True):
            self._parts.append(self._part(phase, block))
        self._firsts = np.array([part.first for part in self._parts])

    def _part(self, phase: Phase, block: int) -> _Part:
        counts = quotas(phase.weights, block)
        pattern = spread(counts)
        is_new = not self.lengths or phase.seq_length != self.lengths[-1]
        if is_new:
            self.lengths.append(phase.seq_length)
        base = np.zeros(len(counts), dtype=np.int64) if is_new else self._parts[-1].drawn(phase.first_sample)
        rank = np.empty(block, dtype=np.int64)
        for source in range(len(counts)):
            rank[pattern == source] = np.arange(counts[source])
        return _Part(phase.first_sample, len(self.lengths) - 1, counts, pattern, rank, base)

    def locate(self, samples: I64) -> tuple[I64, I64, I64]:
        """Stretch, source and draw of samples, [n] each."""
        if len(self._parts) == 1:
            (only,) = self._parts
            source = only.sources(samples)
            return np.zeros_like(samples), source, only.draws(source, samples)
        part = np.searchsorted(self._firsts, samples, side="right") - 1
        stretch, source, draw = (np.empty_like(samples) for _ in range(3))
        for number in np.unique(part):
            here, settings = part == number, self._parts[number]
            stretch[here] = settings.stretch
            source[here] = settings.sources(samples[here])
            draw[here] = settings.draws(source[here], samples[here])
        return stretch, source, draw

    def layouts(self, stretch: int, source: int) -> list[LayoutChange]:
        """How many columns the source is read in: one for each position it has in a block."""
        changes: dict[int, int] = {}
        for part in self._parts:
            if part.stretch == stretch and part.quotas[source]:
                changes[int(part.base[source])] = int(part.quotas[source])
        kept: list[LayoutChange] = []
        for first, columns in changes.items():
            if not kept or columns != kept[-1].columns:
                kept.append(LayoutChange(first, columns))
        return kept or [LayoutChange(0, 1)]
