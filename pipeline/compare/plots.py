"""Figures of several runs: losses, operations, activated parameters, speed, gradients, and heat maps of each run.

A run has one colour in all figures.  Lines have ids (`loss_tokens:dense:train/loss`), so that a page in which they
are drawn as SVG can be asked for them.  As in `pipeline.figures`, no pyplot and so no global state.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from pipeline.compare.runs import ComparedRun
from pipeline.compare.summary import RunSummary, equal_tokens
from pipeline.figures import Records, edges, finish, layers_figure, natural

EXPERT = re.compile(r"^layer_expert_tokens/(?P<layer>.+)\.experts\.(?P<expert>\d+)$")
FRACTION_OF_RUN = 0.02
"""Training losses are smoothed over this part of the tokens; the raw ones are drawn faintly behind."""


def curve_figures(runs: Sequence[ComparedRun], summaries: Sequence[RunSummary]) -> Iterator[tuple[str, str, Figure]]:
    """(name, caption, figure) of what overlays all runs; what none of them has logged is left out."""
    yield (
        "loss_tokens",
        "Loss over tokens: training (lines, smoothed) and held out (dashed). The dotted line is where all runs are.",
        _loss_over_tokens(runs),
    )
    if (figure := _loss_over_operations(runs)) is not None:
        text = "Loss over operations: of the dense model (left), and without those that a zero input spares (right)."
        yield "loss_flops", text, figure
    if (figure := _loss_over_activated(runs, summaries)) is not None:
        yield "loss_activated", "Loss at equal tokens over activated parameters, N (1 - sparsity).", figure
    if (figure := _speed(runs, summaries)) is not None:
        yield "throughput", "Tokens per second over training, and its median with peak memory.", figure
    if (figure := _metric(runs, "train/grad_norm", "gradient norm before clipping", log=True)) is not None:
        yield "grad_norm", "Norm of the gradient before clipping.", figure


def heat_maps(run: ComparedRun) -> Iterator[tuple[str, str, Figure]]:
    """(name, caption, figure) of what is drawn per run: zeros of each layer over training, load of each expert."""
    name = re.sub(r"[^\w.-]", "-", run.name)
    if (figure := layers_figure(run.records)) is not None:
        yield f"layers-{name}", f"{run.name}: zeros among each layer's inputs and ternary weights.", figure
    if (figure := _expert_load(run.records)) is not None:
        yield f"experts-{name}", f"{run.name}: load of each expert; 1 is an equal share.", figure


def smoothed(values: np.ndarray, window: int) -> np.ndarray:
    """Means over `window` values up to each, over fewer at the beginning."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))


def _loss_over_tokens(runs: Sequence[ComparedRun]) -> Figure:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for i, run in enumerate(runs):
        for metric in ("train/loss", "val/loss"):
            curve = run.curve(metric)
            _draw(axes, curve.tokens, curve.values, i, run.name, metric, "loss_tokens")
    axes.axvline(equal_tokens(runs), color="grey", linestyle=":", linewidth=1)
    _finish_tokens(axes, "loss [nat/token]")
    return figure


def _loss_over_operations(runs: Sequence[ComparedRun]) -> Figure | None:
    known = [(i, run, run.operations) for i, run in enumerate(runs)]
    if not any(operations for *_, operations in known):
        return None
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind in zip(panels, ("dense", "needed"), strict=True):
        for i, run, operations in known:
            for metric in ("train/loss", "val/loss"):
                curve = run.curve(metric)
                if operations is not None:
                    spent = np.interp(curve.tokens, operations.tokens, getattr(operations, kind))
                    _draw(axes, spent, curve.values, i, run.name, metric, f"loss_flops:{kind}")
        title = {"dense": "operations of the dense model", "needed": "operations without spared ones"}[kind]
        finish(axes, f"{title} [FLOP]", "loss [nat/token]" if kind == "dense" else "")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    panels[0].legend(fontsize=8)
    return figure


def _loss_over_activated(runs: Sequence[ComparedRun], summaries: Sequence[RunSummary]) -> Figure | None:
    points = [(i, s, s.val_loss or s.train_loss) for i, s in enumerate(summaries) if s.activated_parameters]
    if not any(loss for *_, loss in points):
        return None
    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, summary, loss in points:
        if loss is not None and summary.activated_parameters:
            (line,) = axes.plot([summary.activated_parameters], [loss], "o", color=_colour(i), markersize=8)
            line.set_gid(f"loss_activated:{summary.name}")
            place = (summary.activated_parameters, loss)
            axes.annotate(summary.name, place, xytext=(7, 5), textcoords="offset points", fontsize=9)
    axes.margins(x=0.25, y=0.15)
    finish(axes, "activated parameters", "loss at equal tokens [nat/token]")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure


def _speed(runs: Sequence[ComparedRun], summaries: Sequence[RunSummary]) -> Figure | None:
    if not any(summary.tokens_per_second for summary in summaries):
        return None
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    over_time, speed, memory = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    for i, run in enumerate(runs):
        curve = run.curve("perf/tokens_per_second")
        (line,) = over_time.plot(curve.tokens, curve.values, color=_colour(i), linewidth=1.2, label=run.name)
        line.set_gid(f"throughput:{run.name}")
    _finish_tokens(over_time, "tokens/s")
    names, colours = [s.name for s in summaries], [_colour(i) for i in range(len(summaries))]
    for axes, values, label in (
        (speed, [s.tokens_per_second or 0.0 for s in summaries], "median tokens/s"),
        (memory, [(s.peak_bytes or 0.0) / 2**30 for s in summaries], "peak memory [GiB]"),
    ):
        axes.bar_label(axes.bar(names, values, color=colours), fmt="{:,.4g}", fontsize=8)
        axes.tick_params(axis="x", rotation=30)
        finish(axes, "", label)
    return figure


def _metric(runs: Sequence[ComparedRun], metric: str, label: str, *, log: bool) -> Figure | None:
    curves = [run.curve(metric) for run in runs]
    if not any(len(curve.tokens) for curve in curves):
        return None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, (run, curve) in enumerate(zip(runs, curves, strict=True)):
        (line,) = axes.plot(curve.tokens, curve.values, color=_colour(i), linewidth=1.0, label=run.name)
        line.set_gid(f"{metric}:{run.name}")
    if log:
        axes.set_yscale("log")
    _finish_tokens(axes, label)
    return figure


def expert_shares(records: Records) -> tuple[list[str], list[int], np.ndarray] | None:
    """Experts in natural order, steps, and loads [experts, steps]: tokens over the layer's mean; None without MoE."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for record in records:
        for name, value in record.items():
            if match := EXPERT.match(name):
                found.setdefault((match["layer"], int(match["expert"])), {})[record["step"]] = value
    if not found:
        return None
    experts = sorted(found, key=lambda expert: (natural(expert[0]), expert[1]))
    steps = sorted({step for values in found.values() for step in values})
    tokens = np.array([[found[expert].get(step, np.nan) for step in steps] for expert in experts])
    for layer in {layer for layer, _ in experts}:
        rows = [i for i, expert in enumerate(experts) if expert[0] == layer]
        means = tokens[rows].mean(axis=0)
        tokens[rows] /= np.where(means > 0, means, 1.0)
    return [f"{layer} expert {number}" for layer, number in experts], steps, tokens


def _expert_load(records: Records) -> Figure | None:
    grid = expert_shares(records)
    if grid is None:
        return None
    experts, steps, shares = grid
    figure = Figure(figsize=(8, 1.6 + 0.16 * max(len(experts), 8)), layout="constrained")
    axes = figure.subplots()
    mesh = axes.pcolormesh(edges(steps), np.arange(len(experts) + 1), shares, vmin=0.0, vmax=2.0, cmap="coolwarm")
    axes.set_yticks(np.arange(len(experts)) + 0.5, experts, fontsize=6)
    axes.invert_yaxis()
    axes.set_xlabel("optimizer step")
    figure.colorbar(mesh, ax=axes, label="tokens / mean of the layer")
    return figure


def _draw(axes: Axes, x: np.ndarray, y: np.ndarray, i: int, name: str, metric: str, figure: str) -> None:
    if not len(x):
        return
    style: dict[str, Any] = {"color": _colour(i), "linewidth": 1.4}
    if metric == "val/loss":
        style |= {"linestyle": "--", "marker": "o", "markersize": 3.5}
    else:
        window = max(1, round(FRACTION_OF_RUN * len(y)))
        if window > 1:
            axes.plot(x, y, color=_colour(i), linewidth=0.6, alpha=0.3)
        y = smoothed(y, window)
    (line,) = axes.plot(x, y, label=f"{name} {metric.partition('/')[0]}", **style)
    line.set_gid(f"{figure}:{name}:{metric}")


def _finish_tokens(axes: Axes, label: str) -> None:
    finish(axes, "tokens", label)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(fontsize=8)


def _colour(i: int) -> str:
    return f"C{i % 10}"
