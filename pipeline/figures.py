"""Figures of one run, from metrics.jsonl alone; those of several side by side are in `pipeline.compare`.

Everything is drawn from the file that the run wrote, so a figure can be made on a laptop, without the tracking
server, the checkpoint or torch, and again later.  Each `*_figure` function returns a matplotlib Figure built without
pyplot: no global state, no display, nothing to close.  `plot_run` saves them.
"""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from pipeline.metrics import METRICS, read_metrics, series

Records = list[dict[str, Any]]
LAYER_METRIC = re.compile(r"^layer_(?P<quantity>sparsity|ternary_zeros)/(?P<layer>.+)$")
DPI = 130
_TRAIN_STYLE: dict[str, Any] = {"color": "C0", "linewidth": 1.2}
_VAL_STYLE: dict[str, Any] = {**_TRAIN_STYLE, "linestyle": "--", "marker": "o", "markersize": 4}
TAIL_SHARE = 0.1  # the final training loss is a mean over this last part of the records: single batches are noisy


def plot_run(metrics_path: Path, output_dir: Path) -> list[Path]:
    """Save loss.png, schedule.png, grad_norm.png and, for sparse or ternary runs, layers.png.

    Args:
        metrics_path: The run's metrics.jsonl.
        output_dir: Made if absent; figures of the same name are replaced.

    Returns:
        The files written; a figure whose metrics the run has not logged is left out.

    Raises:
        ValueError: The file holds no records.
        FileNotFoundError: No such file.
    """
    records = read_metrics(metrics_path)
    if not records:
        raise ValueError(f"{metrics_path} holds no records; there is nothing to plot")
    figures = {
        "loss": loss_figure(records),
        "schedule": curves_figure(records, ("train/lr", "train/weight_decay")),
        "grad_norm": curves_figure(records, ("train/grad_norm",), log=True),
        "layers": layers_figure(records),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            written.append(output_dir / f"{name}.png")
            figure.savefig(written[-1], dpi=DPI)
    return written


def read_run(run_dir: Path) -> Records:
    """The records of a run.

    Raises:
        ValueError: The folder holds no metrics.jsonl, or an empty one.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run_dir} is not a run directory: it has no metrics.jsonl")
    records = read_metrics(path)
    if not records:
        raise ValueError(f"{path} holds no records; there is nothing to plot")
    return records


def loss_figure(records: Records) -> Figure | None:
    """Training and held-out loss, over steps on the left and over tokens on the right; None without any loss."""
    losses = {name: series(records, name) for name in ("train/loss", "val/loss")}
    if not any(steps for steps, _ in losses.values()):
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_step, by_token = figure.subplots(1, 2, sharey=True)
    for (name, (steps, values)), style in zip(losses.items(), (_TRAIN_STYLE, _VAL_STYLE), strict=True):
        if not steps:
            continue
        by_step.plot(steps, values, label=name.partition("/")[0], **style)
        tokens = tokens_at(records, steps)
        if tokens is not None:
            by_token.plot(tokens, values, **style)
    finish(by_step, "optimizer step", "loss [nat/token]")
    finish(by_token, "tokens", "")
    by_token.xaxis.set_major_formatter(EngFormatter(sep=""))
    by_step.legend()
    return figure


def curves_figure(records: Records, names: Sequence[str], *, log: bool = False) -> Figure | None:
    """One panel per metric over the optimizer step; None if none of them was logged.

    Args:
        records: The run.
        names: Metric names of the table in `pipeline.metrics`.
        log: Logarithmic value axis.
    """
    present = [name for name in names if series(records, name)[0]]
    if not present:
        return None
    figure = Figure(figsize=(7, 0.8 + 2.6 * len(present)), layout="constrained")
    panels = figure.subplots(len(present), 1, sharex=True, squeeze=False)[:, 0]
    for axes, name in zip(panels, present, strict=True):
        axes.plot(*series(records, name), **_TRAIN_STYLE)
        unit = next((info.unit for info in METRICS if info.name == name), "1")
        finish(axes, "", name if unit == "1" else f"{name} [{unit}]")
        if log:
            axes.set_yscale("log")
    panels[-1].set_xlabel("optimizer step")
    return figure


def layers_figure(records: Records) -> Figure | None:
    """Heat maps of sparsity and ternary zeros: one row per layer, one column per record; None if never logged."""
    grids = {q: grid for q in ("sparsity", "ternary_zeros") if (grid := layer_grid(records, q)) is not None}
    if not grids:
        return None
    rows = max(len(layers) for layers, _, _ in grids.values())
    figure = Figure(figsize=(5.5 * len(grids) + 2.5, 1.6 + 0.22 * max(rows, 6)), layout="constrained")
    panels = figure.subplots(1, len(grids), squeeze=False)[0]
    titles = {"sparsity": "zeros among layer inputs", "ternary_zeros": "zeros among ternary weights"}
    for axes, (quantity, (layers, steps, values)) in zip(panels, grids.items(), strict=True):
        mesh = axes.pcolormesh(edges(steps), np.arange(len(layers) + 1), values, vmin=0.0, vmax=1.0, cmap="viridis")
        axes.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("optimizer step")
        axes.set_title(titles[quantity])
        figure.colorbar(mesh, ax=axes, label="share")
    return figure


def layer_grid(records: Records, quantity: str) -> tuple[list[str], list[int], np.ndarray] | None:
    """Layers in natural order, steps, and values [layers, steps] (nan where a record lacks a layer)."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            match = LAYER_METRIC.match(name)
            if match and match["quantity"] == quantity:
                found.setdefault(match["layer"], {})[record["step"]] = value
    if not found:
        return None
    layers = sorted(found, key=natural)
    steps = sorted({step for values in found.values() for step in values})
    return layers, steps, np.array([[found[layer].get(step, math.nan) for step in steps] for layer in layers])


def results_table(name: str, records: Records) -> str:
    """Markdown: one line with what the run reached."""
    columns = ["run", "steps", "tokens", "train loss", "val loss", "perplexity", "tokens/s", "sparsity", "zeros in w"]
    losses = series(records, "train/loss")[1]
    tail = losses[-max(1, round(TAIL_SHARE * len(losses))) :]
    speeds = series(records, "perf/tokens_per_second")[1]
    row = [name, f"{max((r['step'] for r in records), default=0):,}", _last(records, "train/tokens", ",.0f")]
    row += [f"{statistics.fmean(tail):.4f}" if tail else "-", _last(records, "val/loss", ".4f")]
    row += [_last(records, "val/perplexity", ".2f"), f"{statistics.median(speeds):,.0f}" if speeds else "-"]
    row += [_last(records, "qsparse/sparsity", ".1%"), _last(records, "qsparse/ternary_zeros", ".1%")]
    note = f"train loss: mean of the last {TAIL_SHARE:.0%} of the records; tokens/s: median; others: last value; "
    note += "sparsity: zeros among layer inputs; zeros in w: zeros among ternary weights."
    lines = [columns, ["---"] * len(columns), row]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + f"\n{note}\n"


def tokens_at(records: Records, steps: Sequence[int]) -> np.ndarray | None:
    """Tokens trained on after each of `steps`, interpolated between records; None if they were never logged."""
    known_steps, tokens = series(records, "train/tokens")
    return np.interp(steps, [0, *known_steps], [0.0, *tokens]) if known_steps else None


def edges(steps: Sequence[int]) -> np.ndarray:
    """Cell borders halfway between records; a single record is one step wide."""
    centres = np.asarray(steps, dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _last(records: Records, name: str, form: str) -> str:
    values = series(records, name)[1]
    return format(values[-1], form) if values else "-"


def natural(layer: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", layer)]


def finish(axes: Axes, xlabel: str, ylabel: str) -> None:
    """Axis labels, a grid, and no frame."""
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
