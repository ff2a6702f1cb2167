"""Figures of one run, and several runs side by side, from metrics.jsonl alone.

Everything is drawn from the file that the run wrote, so a figure can be made on a laptop, without the tracking
server, the checkpoint or torch, and again later.  Each `*_figure` function returns a matplotlib Figure built without
pyplot: no global state, no display, nothing to close.  `plot_run` and `compare_runs` save them.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from pipeline.metrics import METRICS, read_metrics, series

Records = list[dict[str, Any]]
LAYER_METRIC = re.compile(r"^layer_(?P<quantity>sparsity|ternary_zeros)/(?P<layer>.+)$")
DPI = 130
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
        "loss": loss_figure({"": records}),
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


def compare_runs(run_dirs: Sequence[Path], output: Path) -> str:
    """Overlay the loss curves of several runs and tabulate where they ended.

    Args:
        run_dirs: Run directories; each needs a metrics.jsonl.
        output: The figure, e.g. `compare.png`; the table goes to the same name with `.md`.

    Returns:
        The markdown: one table of results and one of the configuration keys that differ.

    Raises:
        ValueError: A folder holds no metrics.jsonl, or two of them have the same name.
    """
    runs: dict[str, Records] = {}
    for run_dir in run_dirs:
        if run_dir.resolve().name in runs:
            raise ValueError(f"two runs are called {run_dir.resolve().name!r}; give one of them another folder name")
        runs[run_dir.resolve().name] = read_run(run_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure = loss_figure(runs)
    if figure is not None:
        figure.savefig(output, dpi=DPI)
    configs = {run_dir.resolve().name: _read_config(run_dir / "config.yaml") for run_dir in run_dirs}
    markdown = results_table(runs) + "\n" + differences_table(configs)
    output.with_suffix(".md").write_text(markdown, encoding="utf-8")
    return markdown


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


def loss_figure(runs: Mapping[str, Records]) -> Figure | None:
    """Training and held-out loss, over steps on the left and over tokens on the right; None without any loss.

    Args:
        runs: Label to records; the label "" is left out of the legend.
    """
    if not any(series(records, "train/loss")[0] or series(records, "val/loss")[0] for records in runs.values()):
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_step, by_token = figure.subplots(1, 2, sharey=True)
    for i, (label, records) in enumerate(runs.items()):
        for name, style in (("train/loss", _train_style(i)), ("val/loss", _val_style(i))):
            steps, losses = series(records, name)
            if not steps:
                continue
            text = f"{label} {name.partition('/')[0]}".strip()
            by_step.plot(steps, losses, label=text, **style)
            tokens = _tokens_at(records, steps)
            if tokens is not None:
                by_token.plot(tokens, losses, label=text, **style)
    _finish(by_step, "optimizer step", "loss [nat/token]")
    _finish(by_token, "tokens", "")
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
        axes.plot(*series(records, name), **_train_style(0))
        unit = next((info.unit for info in METRICS if info.name == name), "1")
        _finish(axes, "", name if unit == "1" else f"{name} [{unit}]")
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
        mesh = axes.pcolormesh(_edges(steps), np.arange(len(layers) + 1), values, vmin=0.0, vmax=1.0, cmap="viridis")
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
    layers = sorted(found, key=_natural)
    steps = sorted({step for values in found.values() for step in values})
    return layers, steps, np.array([[found[layer].get(step, math.nan) for step in steps] for layer in layers])


def results_table(runs: Mapping[str, Records]) -> str:
    """Markdown: one line per run with what it reached."""
    columns = ["run", "steps", "tokens", "train loss", "val loss", "perplexity", "tokens/s", "sparsity", "zeros in w"]
    rows = []
    for name, records in runs.items():
        losses = series(records, "train/loss")[1]
        tail = losses[-max(1, round(TAIL_SHARE * len(losses))) :]
        speeds = series(records, "perf/tokens_per_second")[1]
        row = [name, f"{max((r['step'] for r in records), default=0):,}", _last(records, "train/tokens", ",.0f")]
        row += [f"{statistics.fmean(tail):.4f}" if tail else "-", _last(records, "val/loss", ".4f")]
        row += [_last(records, "val/perplexity", ".2f"), f"{statistics.median(speeds):,.0f}" if speeds else "-"]
        row += [_last(records, "qsparse/sparsity", ".1%"), _last(records, "qsparse/ternary_zeros", ".1%")]
        rows.append(row)
    note = f"train loss: mean of the last {TAIL_SHARE:.0%} of the records; tokens/s: median; others: last value; "
    note += "sparsity: zeros among layer inputs; zeros in w: zeros among ternary weights."
    return f"{_markdown(columns, rows)}\n{note}\n"


def differences_table(configs: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown: the configuration keys in which the runs differ; one column per run."""
    keys = sorted({key for config in configs.values() for key in config})
    rows = []
    for key in keys:
        values = [config.get(key, "-") for config in configs.values()]
        if len(set(values)) > 1 and key != "run.name":
            rows.append([f"`{key}`", *values])
    return _markdown(("key", *configs), rows) if rows else "The configurations are the same.\n"


def _read_config(path: Path) -> dict[str, str]:
    # BaseLoader keeps every scalar as the text in the file: this is for showing, not for typing.
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    flat: dict[str, str] = {}

    def visit(prefix: str, value: object) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = str(value)

    visit("", yaml.load(text, Loader=yaml.BaseLoader) or {})  # builds strings, lists and dicts only
    return flat


def _tokens_at(records: Records, steps: Sequence[int]) -> np.ndarray | None:
    known_steps, tokens = series(records, "train/tokens")
    return np.interp(steps, [0, *known_steps], [0.0, *tokens]) if known_steps else None


def _edges(steps: Sequence[int]) -> np.ndarray:
    """Cell borders halfway between records; a single record is one step wide."""
    centres = np.asarray(steps, dtype=float)
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - middle[0]], middle, [2 * centres[-1] - middle[-1]]])


def _last(records: Records, name: str, form: str) -> str:
    values = series(records, name)[1]
    return format(values[-1], form) if values else "-"


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _natural(layer: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", layer)]


def _train_style(i: int) -> dict[str, Any]:
    return {"color": f"C{i % 10}", "linewidth": 1.2}


def _val_style(i: int) -> dict[str, Any]:
    return {"color": f"C{i % 10}", "linewidth": 1.2, "linestyle": "--", "marker": "o", "markersize": 4}


def _finish(axes: Axes, xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
