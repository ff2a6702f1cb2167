"""The load of experts over training, from metrics.jsonl alone: a heat map per MoE layer, and the balance of all.

One row per expert, one column per logged step; the colour is the expert's tokens over the even share, so that 1 is
balance, 0 an expert that nobody visits, and E / k one that takes every token.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from pipeline.metrics import read_metrics, series

EXPERT_METRIC = re.compile(r"^layer_expert_tokens/(?P<layer>.+)\.experts\.(?P<expert>\d+)$")
DPI = 130
MOST_LAYERS = 8
"""Heat maps in one figure; of more MoE layers these are drawn, evenly spaced."""

Records = list[dict[str, Any]]


def plot_expert_load(metrics_path: Path, output_dir: Path) -> Path | None:
    """Save expert_load.png; None if the run has no experts.

    Args:
        metrics_path: The run's metrics.jsonl.
        output_dir: Made if absent; a figure of the same name is replaced.

    Raises:
        FileNotFoundError: No such file.
    """
    figure = expert_load_figure(read_metrics(metrics_path))
    if figure is None:
        return None
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / "expert_load.png"
    figure.savefig(path, dpi=DPI)
    return path


def expert_load_figure(records: Records) -> Figure | None:
    """Heat maps of the load and curves of balance and entropy; None without experts."""
    steps, grids = expert_load(records)
    if not grids:
        return None
    names = list(grids)
    shown = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, MOST_LAYERS).round().astype(int))]
    figure = Figure(figsize=(9, 2.4 + 1.7 * len(shown)), layout="constrained")
    *maps, curves = figure.subplots(len(shown) + 1, 1, squeeze=False)[:, 0]
    norm = TwoSlopeNorm(1.0, 0.0, max(2.0, max(float(np.nanmax(grid)) for grid in grids.values())))
    for axes, name in zip(maps, shown, strict=True):
        mesh = axes.pcolormesh(np.arange(len(steps) + 1), np.arange(len(grids[name]) + 1), grids[name],
                               cmap="RdBu_r", norm=norm)  # fmt: skip
        ticks = np.unique(np.linspace(0, len(steps) - 1, 6).round().astype(int))
        axes.set_xticks(ticks + 0.5, [str(steps[i]) for i in ticks])
        axes.set_ylabel("expert")
        axes.set_title(name, fontsize=9)
    figure.colorbar(mesh, ax=maps, label="tokens / even share")
    for name in ("moe/imbalance", "moe/max_imbalance", "moe/router_entropy"):
        curves.plot(*series(records, name), label=name.partition("/")[2])
    curves.set_xlabel("optimizer step")
    curves.grid(alpha=0.3)
    curves.legend(fontsize=8)
    return figure


def expert_load(records: Records) -> tuple[list[int], dict[str, np.ndarray]]:
    """Logged steps, and for each MoE layer its experts' tokens over the even share [experts, steps]."""
    tokens: dict[str, dict[tuple[int, int], float]] = {}
    steps: list[int] = []
    for record in records:
        found = [(match, value) for name, value in record.items() if (match := EXPERT_METRIC.match(name))]
        if found:
            steps.append(record["step"])
        for match, value in found:
            tokens.setdefault(match["layer"], {})[int(match["expert"]), len(steps) - 1] = value
    grids = {}
    for layer, values in tokens.items():
        grid = np.zeros((1 + max(expert for expert, _ in values), len(steps)))
        for place, value in values.items():
            grid[place] = value
        grids[layer] = grid / np.maximum(grid.mean(axis=0, keepdims=True), 1e-9)
    return steps, grids
