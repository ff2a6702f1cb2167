"""What a section of the benchmark consists of: cases, each with checks that gate it and contests that are timed."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from pipeline.bench.kernels.timing import Rates, Variant
from pipeline.bench.results import Row


class Check(NamedTuple):
    """One comparison of a kernel with its reference."""

    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """False also for an error that is no number."""
        return self.error <= self.bound


@dataclass(frozen=True)
class Contest:
    """Variants of one operation, timed in turns."""

    operation: str
    variants: Mapping[str, Variant]
    """Ours; each must run."""
    rivals: Mapping[str, Variant] = field(default_factory=dict)
    """Other libraries': one that does not run here is reported with its error."""
    baseline: str = ""
    """Variant that speed-ups refer to; empty: there are none."""
    copy_bytes: int = 0
    """Bytes that have to move: a copy of as many is timed along, as the floor of every variant."""
    floors: Mapping[str, float] = field(default_factory=dict)
    """Microseconds that each variant cannot go below, where the floor is not the copy."""


class Case(Protocol):
    """Operands of one problem."""

    def checks(self) -> Iterator[Check]:
        """Compare every kernel that `contests` times with its reference."""

    def contests(self, rates: Rates) -> Iterator[Contest]:
        """What to time; operands may be made as it goes."""


@runtime_checkable
class Sweepable(Case, Protocol):
    """A case whose kernels have launches to choose from."""

    def launches(self) -> Iterator[Contest]:
        """Launches of the same kernel, which need not all fit the chip."""


class Options(NamedTuple):
    """What decides the size of a section."""

    device: str = "cuda"
    quick: bool = False
    seconds: float = math.inf
    """Cases not begun after so many are left out."""


class Outcome(NamedTuple):
    """What a section found."""

    rows: list[dict[str, object]]
    """Lines of the CSV; empty if the gate is red."""
    failures: list[str]
    """Checks that failed, and cases whose timing broke off."""


COLUMNS = ("case", "operation", "variant", "median_us", "q25_us", "q75_us", "floor_us", "baseline", "speedup", "timed")


class Section(NamedTuple):
    """A family of kernels: one CSV, one figure, one table."""

    title: str
    draw: Callable[[Sequence[Row], Path], None]
    """The figure, from rows of the CSV."""
    table: Callable[[Sequence[Row]], str]
    """The table in Markdown, from rows of the CSV."""
    cases: Callable[[Options], Mapping[str, Callable[[], Case]]] = lambda options: {}
    """Case name -> what builds its operands."""
    columns: Sequence[str] = COLUMNS
    """Of the CSV."""
    measure: Callable[[Options, str], Outcome] | None = None
    """Instead of timing cases: something else to measure, of the cases whose names contain a text."""
    compile: Callable[[Options, str], Iterable[Callable[[], object]]] | None = None
    """Calls that compile what cases with a text in their names run: made in threads first, since a compiler uses one
    core and cases come one after the other."""


def mismatch(got: Tensor, want: Tensor) -> float:
    """Share of elements that differ: for results that must be equal bit for bit."""
    return float((got != want).float().mean())


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want|| in float64, row by row so that no float64 copy of the whole is made."""
    error = square = 0.0
    for g, w in zip(got.split(1024), want.split(1024), strict=True):
        wide = w.double()
        error += float((g.double() - wide).square().sum())
        square += float(wide.square().sum())
    return (error / square) ** 0.5 if square else float("nan")
