"""Tables and figures of `qsparse bench train`, from its CSV files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.bench.kernels.drawing import COLORS, panels, save, unique
from pipeline.bench.results import Row, markdown_table

COLUMNS = (
    *("shape", "variant", "gpus", "micro_batch", "microbatches", "tokens_per_s_per_gpu"),
    *("ms_per_step", "q25_ms", "q75_ms", "peak_gib", "mfu", "loss", "absent"),
)
BREAKDOWN_COLUMNS = ("shape", "variant", "gpus", "category", "ms")


def table(rows: Sequence[Row]) -> str:
    """A line per shape and variant."""
    header = ["shape", "variant", "tokens/s/GPU", "against dense", "ms/step (quartiles)", "peak GiB", "MFU", "loss"]
    lines = []
    for row in rows:
        name = [row["shape"], row["variant"]]
        if row["absent"]:
            lines.append([*name, row["absent"], *[""] * 5])
            continue
        mfu = f"{float(row['mfu']):.1%}" if row["mfu"] else ""
        time = f"{row['ms_per_step']} ({row['q25_ms']} to {row['q75_ms']})"
        rate = f"{float(row['tokens_per_s_per_gpu']):,.0f}"
        lines.append([*name, rate, _against_dense(row, rows), time, row["peak_gib"], mfu, row["loss"]])
    return markdown_table(header, lines)


def _against_dense(row: Row, rows: Sequence[Row]) -> str:
    """Ratio of tokens per second to the dense model of the same shape, GPUs and batch; empty without one."""
    same = ("shape", "gpus", "micro_batch", "microbatches")
    wanted = {**{key: row[key] for key in same}, "variant": "dense"}
    dense = [one for one in rows if not one["absent"] and all(one[key] == wanted[key] for key in wanted)]
    return f"{float(row['tokens_per_s_per_gpu']) / float(dense[0]['tokens_per_s_per_gpu']):.3f}" if dense else ""


def breakdown_table(rows: Sequence[Row]) -> str:
    """Milliseconds of a step: a line per shape and variant, a column per category."""
    categories = unique(rows, "category")
    lines = []
    for shape in unique(rows, "shape"):
        here = [row for row in rows if row["shape"] == shape]
        for variant in unique(here, "variant"):
            found = {row["category"]: row["ms"] for row in here if row["variant"] == variant}
            total = f"{sum(map(float, found.values())):.1f}"
            lines.append([shape, variant, *(found.get(category, "") for category in categories), total])
    return markdown_table(["shape", "variant", *categories, "sum"], lines)


def draw(rows: Sequence[Row], breakdown: Sequence[Row], path: Path) -> None:
    """Tokens per second and peak memory of each shape, and where the time of a step goes."""
    shapes = unique(rows, "shape")
    figure, axes = panels(2 * len(shapes), width=7.0)
    for number, shape in enumerate(shapes):
        here = [row for row in rows if row["shape"] == shape and not row["absent"]]
        panel = axes[2 * number]
        names = [row["variant"] for row in here]
        rates = [float(row["tokens_per_s_per_gpu"]) for row in here]
        bars = panel.barh(names, rates, color=COLORS[0])
        panel.bar_label(
            bars, [f"{rate:,.0f}; {row['peak_gib']} GiB" for rate, row in zip(rates, here, strict=True)], fontsize=7
        )
        panel.set(title=f"{shape}: tokens/s per GPU; peak memory", xlim=(0, 1.3 * max(rates, default=1.0)))
        _stacks(axes[2 * number + 1], [row for row in breakdown if row["shape"] == shape], names, shape)
        for one in axes[2 * number : 2 * number + 2]:
            one.invert_yaxis()
            one.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _stacks(panel: Any, rows: Sequence[Row], variants: list[str], shape: str) -> None:
    left = dict.fromkeys(variants, 0.0)
    for number, category in enumerate(unique(rows, "category")):
        times = {row["variant"]: float(row["ms"]) for row in rows if row["category"] == category}
        widths = [times.get(variant, 0.0) for variant in variants]
        panel.barh(
            variants, widths, left=[left[v] for v in variants], label=category, color=COLORS[number % len(COLORS)]
        )
        for variant, width in zip(variants, widths, strict=True):
            left[variant] += width
    panel.set(title=f"{shape}: milliseconds of a step")
    panel.legend(frameon=False, fontsize=6)
