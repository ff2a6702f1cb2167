"""`qsparse bench trajectories`: losses of the same training on different kernels and layouts, on top of each other.

The same weights, data and steps; what differs is the order and the rounding of sums.  Curves:

    reference            run.kernels=reference, plain PyTorch
    reference, halved    the same with two microbatches per step: as far apart as rounding alone brings two runs
    exact                Triton kernels
    fast                 Triton kernels and gradients=e4m3
    exact TP=2, DP=2     on two GPUs, where there are two
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from pipeline.bench.kernels.drawing import COLORS, panels, save, unique
from pipeline.bench.machine import machine_lines
from pipeline.bench.options import add_result_options, amount, bench_parser, check_drawable, count
from pipeline.bench.results import Row, extend_csv, markdown_table, publish, read_csv, source
from pipeline.bench.train_ranks import Ranks

WORKER = "pipeline.bench.trajectory_worker"
COLUMNS = ("curve", "step", "loss", "grad_norm", "held_out", "seconds")
REFERENCE = "reference"
WINDOW = 25
"""Steps whose losses are averaged before curves are compared."""


class Curve(NamedTuple):
    """One training."""

    kernels: str = "auto"
    gradients: str = "full"
    microbatches: int = 1
    tp: int = 1
    dp: int = 1


CURVES = {
    REFERENCE: Curve("reference"),
    "reference, halved": Curve("reference", microbatches=2),
    "exact": Curve(),
    "fast": Curve(gradients="e4m3"),
    "exact, TP=2": Curve(tp=2),
    "exact, DP=2": Curve(dp=2),
}
SHAPES = {
    "tiny": {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 192, "num_attention_heads": 4, "seq_length": 64},
    "100m": {
        **{"num_layers": 8, "hidden_size": 1024, "ffn_hidden_size": 2752, "num_attention_heads": 16},
        "seq_length": 1024,
    },
}
SEQUENCES = 4
"""Per step."""


def configuration(curve: Curve, options: argparse.Namespace) -> dict[str, Any]:
    """The run of a curve, as `pipeline.config.Config` takes it."""
    model: dict[str, Any] = dict(SHAPES[options.shape])
    seq_length = model.pop("seq_length")
    alone = curve.tp * curve.dp == 1 and curve.kernels != "reference"
    parallel = {"tp": curve.tp, "dp": curve.dp}
    parallel |= {"sequence_parallel": curve.tp > 1, "distributed_optimizer": curve.dp > 1}
    return {
        "run": {"device": options.device, "kernels": curve.kernels, "cuda_graph": options.device == "cuda" and alone},
        "model": {
            **model,
            "qsparse": {
                **{"sparsity": 0.5, "weights": "ternary", "activations": "int8", "sub_norm": True},
                "gradients": curve.gradients,
            },
        },
        "parallel": parallel,
        "training": {
            "steps": options.steps,
            "global_batch_size": SEQUENCES,
            "micro_batch_size": SEQUENCES // (curve.microbatches * curve.dp),
            "seq_length": seq_length,
            "precision": "bf16",
            "eval_interval": 0,
            "eval_sequences": 16,
        },
        "optimizer": {"lr": 1e-3, "warmup_steps": min(50, options.steps // 5), "schedule": "cosine"},
        "tracking": {"mlflow": False},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, write and draw; returns the exit code: 1 if a curve could not be trained."""
    parser = _parser()
    options = parser.parse_args(arguments)
    check_drawable(parser, options, "trajectories")
    console = Console(soft_wrap=True)
    if options.draw:
        return _draw(options.output, console)
    if not options.data:
        parser.error("--data FOLDER, a prepared dataset, is needed")
    if unknown := [name for name in options.curves or () if name not in CURVES]:
        parser.error(f"--curves {'; '.join(unknown)}: expected some of {'; '.join(CURVES)}")
    import torch

    gpus = torch.cuda.device_count() if options.device == "cuda" else options.processes
    chosen = {name: CURVES[name] for name in options.curves or CURVES}
    wanted = {name: curve for name, curve in chosen.items() if curve.tp * curve.dp <= gpus}
    failed = _train(wanted, options, console)
    _draw(options.output, console)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = bench_parser("trajectories", __doc__)
    add = parser.add_argument
    add("--data", metavar="FOLDER", help="prepared dataset")
    add("--shape", choices=SHAPES, default="100m", help="model (default: 100m)")
    add(
        "--curves", nargs="+", metavar="NAME", help="only these; they join those in the CSV of the same machine and day"
    )
    add("--steps", type=count, default=500, metavar="N", help="optimizer steps of each (default: 500)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where (default: cuda)")
    add("--processes", type=count, default=1, metavar="N", help="on the CPU: as many as GPUs (default: 1)")
    add("--timeout", type=amount, default=600.0, metavar="SECONDS", help="longest time of one (default: 600)")
    add_result_options(parser, Path("runs/bench/trajectories"))
    return parser


def _train(curves: Mapping[str, Curve], options: argparse.Namespace, console: Console) -> list[str]:
    """Write the CSV, curve by curve; returns the curves that failed."""
    head, rows = machine_lines(options.commit), []
    failed = []

    def start(name: str) -> Ranks:
        order = {"config": configuration(CURVES[name], options), "data": options.data}
        return Ranks(WORKER, order, CURVES[name].tp * CURVES[name].dp)

    names = list(curves)
    ranks = start(names[0])
    for name, following in pairwise([*names, None]):
        assert name is not None
        later = start(following) if following else None  # imports while this one trains
        result = ranks.measure(options.timeout)
        if isinstance(result, str):
            failed.append(name)
            console.print(f"{name}: {result}", markup=False, highlight=False)
        else:
            rows += _rows(name, result)
            extend_csv(options.output / "trajectories.csv", head, COLUMNS, rows, keys=("curve",))
            text = (
                f"{name}: loss {result['loss'][-1]:.4f}, held-out {result['held_out']:.4f}, {result['seconds']:.1f} s"
            )
            console.print(text, markup=False, highlight=False)
        if later is not None:
            ranks = later
    return failed


def _rows(name: str, result: Mapping[str, Any]) -> list[dict[str, Any]]:
    last = {"held_out": f"{result['held_out']:.5f}", "seconds": f"{result['seconds']:.2f}"}
    steps = list(zip(result["loss"], result["grad_norm"], strict=True))
    return [
        {"curve": name, "step": step, "loss": f"{loss:.5f}", "grad_norm": f"{norm:.4f}"}
        | (last if step == len(steps) else {"held_out": "", "seconds": ""})
        for step, (loss, norm) in enumerate(steps, start=1)
    ]


def smoothed(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """Means of `window` losses in a row (fewer, if there are not as many)."""
    window = min(window, len(losses))
    sums = [sum(losses[:window])]
    for old, new in zip(losses, losses[window:], strict=False):
        sums.append(sums[-1] + new - old)
    return [total / window for total in sums]


def table(rows: Sequence[Row]) -> str:
    """A line per curve: its end, and the largest distance of its smoothed losses from the reference's."""
    losses = _losses(rows)
    reference = smoothed(losses[REFERENCE]) if REFERENCE in losses else None
    lines = []
    for curve, values in losses.items():
        end = next(row for row in reversed(rows) if row["curve"] == curve)
        mine = smoothed(values)
        distance = "" if reference is None else f"{max(abs(a - b) for a, b in zip(mine, reference, strict=True)):.4f}"
        lines.append([curve, str(len(values)), f"{mine[-1]:.4f}", end["held_out"], distance, end["seconds"]])
    header = ["curve", "steps", f"mean loss of the last {WINDOW}", "held-out loss", "largest distance", "seconds"]
    return markdown_table(header, lines)


def _losses(rows: Sequence[Row]) -> dict[str, list[float]]:
    return {name: [float(row["loss"]) for row in rows if row["curve"] == name] for name in unique(rows, "curve")}


def _draw(folder: Path, console: Console) -> int:
    results = read_csv(folder / "trajectories.csv")
    text = table(results.rows)
    console.print(text, markup=False, highlight=False)
    draw(results.rows, folder / "trajectories.png")
    picture = f"![Losses of the same training]({folder.name}/trajectories.png)"
    fragment = "\n\n".join([text, picture, source(results.head, folder, "trajectories")])
    publish(folder, {"trajectories": fragment}, console)
    return 0


def draw(rows: Sequence[Row], path: Path) -> None:
    """Losses, and how far each smoothed curve is from the reference's."""
    figure, (top, bottom) = panels(2, width=7.0, height=4.0)
    losses = _losses(rows)
    for number, (name, values) in enumerate(losses.items()):
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "linewidth": 0.9, "label": name}
        top.plot(range(1, len(values) + 1), values, **style)
        if name != REFERENCE and REFERENCE in losses:
            pairs = zip(smoothed(values), smoothed(losses[REFERENCE]), strict=True)
            bottom.plot([mine - reference for mine, reference in pairs], **style)
    top.set(title="training loss", xlabel="step", ylabel="nats per token")
    bottom.axhline(0.0, color="black", linewidth=0.8, linestyle="--")
    bottom.set(title=f"distance from the reference, means of {WINDOW} steps", xlabel="step", ylabel="nats per token")
    for panel in (top, bottom):
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
