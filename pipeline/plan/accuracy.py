"""Estimates against measured runs.

A row of the CSV is one run: `config` and `overrides` (separated by blanks), GPU and number of GPUs, what was measured,
`memory_gib` being torch's peak of allocated memory, and where.  An empty number was not measured.
"""

import shlex
from pathlib import Path
from typing import NamedTuple

from pipeline.bench.results import Row, markdown_table, read_csv
from pipeline.config_loader import load_config
from pipeline.plan.memory import GIB, in_torch
from pipeline.plan.rates import load_rates
from pipeline.plan.search import Cluster, estimate, supported

_COLUMNS = {"name", "config", "overrides", "gpus", "gpu", "memory_gib", "step_ms"}


class Comparison(NamedTuple):
    """One run, measured and estimated."""

    name: str
    memory_gib: float | None
    step_ms: float | None
    estimated_gib: float
    estimated_ms: float

    @property
    def memory_error(self) -> float | None:
        """Estimate over measurement, less one."""
        return self.estimated_gib / self.memory_gib - 1 if self.memory_gib else None

    @property
    def time_error(self) -> float | None:
        """Estimate over measurement, less one."""
        return self.estimated_ms / self.step_ms - 1 if self.step_ms else None


def compare(path: Path, root: Path) -> list[Comparison]:
    """Every run of the file `path`; configurations are relative to `root`.

    Raises:
        ValueError: the file has other columns.
    """
    rows = read_csv(path).rows
    if missing := _COLUMNS - set(rows[0] if rows else ()):
        raise ValueError(f"{path} is no table of measured runs: it has no column {', '.join(sorted(missing))}")
    return [_compare(row, root) for row in rows]


def table(comparisons: list[Comparison]) -> str:
    """For people."""
    head = ("run", "GiB", "estimated", "error", "ms/step", "estimated", "error")
    rows = []
    for run in comparisons:
        memory = (_number(run.memory_gib, ".1f"), f"{run.estimated_gib:.1f}", _number(run.memory_error, "+.1%"))
        rows.append(
            [run.name, *memory, _number(run.step_ms, ".0f"), f"{run.estimated_ms:.0f}", _number(run.time_error, "+.1%")]
        )
    return markdown_table(head, rows)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _compare(row: Row, root: Path) -> Comparison:
    config = supported(load_config(root / row["config"], shlex.split(row["overrides"])))
    rates = load_rates(row["gpu"])
    found = estimate(config, Cluster(int(row["gpus"]), 8, row["gpu"], rates, rates.memory_gib))
    measured = (float(row[name]) if row[name] else None for name in ("memory_gib", "step_ms"))
    memory_gib, step_ms = measured
    return Comparison(row["name"], memory_gib, step_ms, in_torch(found.memory) / GIB, found.seconds * 1e3)
