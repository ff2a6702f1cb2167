"""Figures and tables that several sections share: a panel per operation, a group of bars per case."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.bench.kernels.runner import COPY
from pipeline.bench.results import Row, markdown_table

COLORS = ("#0b6e4f", "#c1440e", "#6b7a8f", "#d9a441", "#4062bb", "#8e4585", "#9aa5b1", "#2f4858")


def unique(rows: Iterable[Row], key: str) -> list[str]:
    """Values of a column in their order."""
    return list(dict.fromkeys(row[key] for row in rows))


def time_of(rows: Sequence[Row], case: str, operation: str, variant: str) -> float | None:
    """Median microseconds, None where it was not measured."""
    wanted = (case, operation, variant)
    found = (row for row in rows if (row["case"], row["operation"], row["variant"]) == wanted)
    row = next(found, None)
    return None if row is None else float(row["median_us"])


def of_floor(row: Row) -> float | None:
    """Time over floor: 1 is as fast as the machine allows."""
    return float(row["median_us"]) / float(row["floor_us"]) if row["floor_us"] else None


def speedup(row: Row) -> float | None:
    """Time of the baseline over this one's."""
    return float(row["speedup"]) if row["speedup"] else None


def ratio_table(ratio: Callable[[Row], float | None], mark: str) -> Callable[[Sequence[Row]], str]:
    """A table of microseconds with a ratio in parentheses: a line per case and operation, a column per variant.

    Args:
        ratio: of a row of the CSV.
        mark: printed behind the ratio, such as `x copy`.
    """

    def table(rows: Sequence[Row]) -> str:
        shown = [row for row in rows if row["variant"] != COPY]
        variants = unique(shown, "variant")
        lines = []
        for case in unique(shown, "case"):
            here = [row for row in shown if row["case"] == case]
            for operation in unique(here, "operation"):
                cells = {row["variant"]: _cell(row, ratio, mark) for row in here if row["operation"] == operation}
                lines.append([case, operation, *(cells.get(variant, "") for variant in variants)])
        return markdown_table(["case", "operation", *variants], lines)

    return table


def pass_table(rows: Sequence[Row], sums: Mapping[str, Sequence[float]] | None = None) -> str:
    """Microseconds of single kernels: a line per kernel, a column per case.

    Args:
        rows: of one operation.
        sums: further lines, a number per case.
    """
    cases = unique(rows, "case")
    lines = []
    for variant in unique(rows, "variant"):
        times = (time_of(rows, case, rows[0]["operation"], variant) for case in cases)
        lines.append([variant, *("" if time is None else f"{time:.0f}" for time in times)])
    lines += [[name, *(f"{time:.0f}" for time in times)] for name, times in (sums or {}).items()]
    return "Passes, in microseconds:\n\n" + markdown_table(["pass", *cases], lines)


def _cell(row: Row, ratio: Callable[[Row], float | None], mark: str) -> str:
    value = ratio(row)
    time = float(row["median_us"])
    shown = f"{time:.1f}" if time < 100 else f"{time:.0f}"
    return f"{shown} us" if value is None else f"{shown} us ({value:.2f}{mark})"


def ratio_bars(
    ratio: Callable[[Row], float | None], label: str, *, reference: float = 1.0, logarithmic: bool = False
) -> Callable[[Sequence[Row], Path], None]:
    """A figure of the same ratios: a panel per operation.

    Args:
        ratio: of a row of the CSV.
        label: of the axis.
        reference: where a line is drawn.
        logarithmic: for ratios that differ by orders of magnitude.
    """

    def draw(rows: Sequence[Row], path: Path) -> None:
        operations = unique(rows, "operation")
        figure, axes = panels(len(operations))
        for panel, operation in zip(axes, operations, strict=True):
            here = [row for row in rows if row["operation"] == operation and row["variant"] != COPY]
            bars(panel, here, ratio, unique((row for row in rows if row["variant"] != COPY), "variant"))
            panel.axhline(reference, color="black", linewidth=0.8, linestyle="--")
            panel.set(title=operation, ylabel=label)
            if logarithmic:
                panel.set_yscale("log")
        save(figure, path)

    return draw


def panels(count: int, *, width: float = 6.0, height: float = 3.6) -> tuple[Any, list[Any]]:
    """A figure and its axes, two in a row."""
    from matplotlib.figure import Figure

    columns = min(2, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count]


def bars(
    panel: Any, rows: Sequence[Row], ratio: Callable[[Row], float | None], colored: Sequence[str] | None = None
) -> None:
    """A group of bars per case, a bar per variant, with its value on top.

    Args:
        panel: axes.
        rows: of one operation.
        ratio: of a row.
        colored: variants of all panels, so that each has the same color in all; None: there is one panel.
    """
    cases, variants = unique(rows, "case"), unique(rows, "variant")
    order = list(colored or variants)
    width = 0.85 / max(1, len(variants))
    for number, variant in enumerate(variants):
        values = {row["case"]: ratio(row) for row in rows if row["variant"] == variant}
        places = [index + (number - (len(variants) - 1) / 2) * width for index in range(len(cases))]
        heights = [values.get(case) or 0.0 for case in cases]
        color = COLORS[order.index(variant) % len(COLORS)]
        drawn = panel.bar(places, heights, width, label=variant, color=color)
        panel.bar_label(drawn, [f"{height:.2f}" if height else "" for height in heights], fontsize=6, rotation=90)
    panel.set_xticks(range(len(cases)), cases, fontsize=7, rotation=20 if len(cases) > 4 else 0)
    panel.margins(y=0.18)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_ylim(top=1.25 * panel.get_ylim()[1])  # room for the legend
    panel.legend(frameon=False, fontsize=7, ncols=2, loc="upper left")


def save(figure: Any, path: Path) -> None:
    """Write a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
