"""How much of a step's communication computation hides, from the times of its kernels.  Times in any unit."""

from collections.abc import Iterable
from typing import NamedTuple

Span = tuple[float, float]
"""Begin and end."""


class Overlap(NamedTuple):
    """Of the kernels of one GPU."""

    communication: float
    """Time in which at least one communication kernel ran."""
    exposed: float
    """The part of it in which no other kernel did."""


def overlap(communication: Iterable[Span], others: Iterable[Span]) -> Overlap:
    """Compare the spans of communication kernels with those of all others; both may overlap among themselves."""
    sent, computed = _union(communication), _union(others)
    total = sum(end - begin for begin, end in sent)
    return Overlap(total, total - _common(sent, computed))


def _union(spans: Iterable[Span]) -> list[Span]:
    """The same times as disjoint spans, in order."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((begin, end))
    return found


def _common(first: list[Span], second: list[Span]) -> float:
    """Time that is in both, each disjoint and in order."""
    total, i, j = 0.0, 0, 0
    while i < len(first) and j < len(second):
        total += max(0.0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return total
