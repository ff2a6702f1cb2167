"""Table and figure of the layer section."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.bench.kernels.drawing import bars, panels, pass_table, save, speedup, unique
from pipeline.bench.results import Row, markdown_table

FORWARD, WHOLE, PASSES = "forward product", "forward and backward", "passes"
STACKS = {"dense": ("dense",), "exact": ("both", "exact"), "fast": ("both", "fast")}
"""Kinds of passes (their names begin so) that make a layer."""


def sum_of_passes(rows: Sequence[Row], case: str, *kinds: str) -> float:
    """Microseconds of all kernels of some kinds (`dense`, `both`, `exact`, `fast`)."""
    return sum(
        float(row["median_us"])
        for row in rows
        if row["case"] == case and row["operation"] == PASSES and row["variant"].split(":")[0] in kinds
    )


def table(rows: Sequence[Row]) -> str:
    """Speed-ups per shape with their geometric means, and the passes."""
    parts = []
    for operation in (FORWARD, WHOLE):
        here = [row for row in rows if row["operation"] == operation]
        variants, lines = unique(here, "variant"), []
        for case in unique(here, "case"):
            found = {row["variant"]: row for row in here if row["case"] == case}
            lines.append([case, *(_time_and_speedup(found.get(variant)) for variant in variants)])
        means = [_mean([speedup(row) for row in here if row["variant"] == v]) for v in variants]
        lines.append(["geometric mean", *means])
        parts.append(f"{operation.capitalize()} (speed-up over {here[0]['baseline']}):\n\n")
        parts[-1] += markdown_table(["D -> O", *variants], lines)
    return "\n\n".join([*parts, _passes_table(rows)])


def _time_and_speedup(row: Row | None) -> str:
    return "" if row is None else f"{float(row['median_us']):.0f} us ({float(row['speedup']):.2f})"


def _mean(speedups: list[float | None]) -> str:
    known = [value for value in speedups if value]
    return f"{math.exp(sum(map(math.log, known)) / len(known)):.3f}" if known else ""


def _passes_table(rows: Sequence[Row]) -> str:
    here = [row for row in rows if row["operation"] == PASSES]
    sums = {
        f"sum, {name}": [sum_of_passes(here, case, *kinds) for case in unique(here, "case")]
        for name, kinds in STACKS.items()
    }
    return pass_table(here, sums)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Speed-ups as bars, and the passes stacked."""
    figure, axes = panels(4)
    for panel, operation in zip(axes, (FORWARD, WHOLE), strict=False):
        here = [row for row in rows if row["operation"] == operation]
        bars(panel, here, speedup)
        panel.axhline(1.0, color="black", linewidth=0.8, linestyle="--")
        panel.set(title=operation, ylabel=f"speed-up over {here[0]['baseline']}")
    _draw_passes(axes[2], axes[3], [row for row in rows if row["operation"] == PASSES])
    save(figure, path)


def _draw_passes(panel: Any, legend: Any, rows: Sequence[Row]) -> None:
    """Stacked times of the passes, three bars per case; their legend takes a panel of its own."""
    bar = panel.bar
    cases = unique(rows, "case")
    labels, place = [], 0.0
    import matplotlib

    palette = matplotlib.colormaps["tab20"]
    colors = {variant: palette(number % 20) for number, variant in enumerate(unique(rows, "variant"))}
    for case in cases:
        for stack, kinds in STACKS.items():
            bottom = 0.0
            for row in rows:
                if row["case"] == case and row["variant"].split(":")[0] in kinds:
                    bar(place, float(row["median_us"]), 0.85, bottom=bottom, color=colors[row["variant"]])
                    bottom += float(row["median_us"])
            labels.append((place, f"{stack}\n{case}" if stack == "exact" else stack))
            place += 1
        place += 0.5
    panel.set_xticks([at for at, _ in labels], [text for _, text in labels], fontsize=6)
    panel.set(title="passes", ylabel="microseconds")
    handles = [bar(0, 0, color=color, label=variant) for variant, color in colors.items()]
    legend.legend(handles=handles, frameon=False, fontsize=7, loc="center left")
    legend.set_axis_off()
