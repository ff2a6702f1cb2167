"""`qsparse bench generate`: whole models reading one token after the other, in bf16 and with weights in two bits.

Models with random weights read a beginning of a quarter of their context, then tokens one by one, from a CUDA graph.
No speed is printed if weights in two bits give other logits than those in eight; the exit code is then 1.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline.bench.generate_worker import SHAPES, VARIANTS, Job
from pipeline.bench.kernels.drawing import COLORS, panels, save, unique
from pipeline.bench.machine import machine_lines
from pipeline.bench.options import add_result_options, amount, bench_parser, check_drawable, check_gpus, count
from pipeline.bench.results import Row, extend_csv, markdown_table, publish_table, read_csv
from pipeline.bench.train_ranks import Ranks

WORKER = "pipeline.bench.generate_worker"
COLUMNS = (
    *("shape", "rows", "variant", "ms", "q25_ms", "q75_ms", "tokens_per_s", "products_ms", "floor_ms"),
    "speedup",
)
TITLE = "One more token of each text, the whole model (speed-up over dense bf16)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = bench_parser("generate", __doc__)
    add = parser.add_argument
    shapes = [name for name in SHAPES if name != "tiny"]
    add("--shapes", nargs="+", default=shapes, choices=SHAPES, metavar="NAME", help=f"some of {', '.join(SHAPES)}")
    add("--rows", nargs="+", type=count, default=[1, 4, 16], metavar="N", help="texts at once (default: 1 4 16)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where (default: cuda)")
    add("--rounds", type=count, default=7, metavar="N", help="times that every variant is timed (default: 7)")
    add("--timeout", type=amount, default=600.0, metavar="SECONDS", help="longest time for one shape (default: 600)")
    add_result_options(parser, Path("runs/bench/generate"))
    options = parser.parse_args(arguments)
    check_drawable(parser, options, "generate")
    check_gpus(parser, options)
    console = Console(soft_wrap=True)
    failed = False if options.draw else _measure(options, console)
    if (options.output / "generate.csv").is_file():
        _draw(options.output, console)
    return 1 if failed else 0


def _measure(options: argparse.Namespace, console: Console) -> bool:
    head = machine_lines(options.commit)
    for line in head:
        console.print(line, markup=False, highlight=False)
    failed = False
    for shape in options.shapes:
        job = Job(shape, options.rows, options.device, options.rounds)
        result = Ranks(WORKER, job._asdict(), 1).measure(options.timeout)
        wrong = [f"{shape}: {result}"] if isinstance(result, str) else result["wrong"]
        for message in wrong:
            console.print(f"failed: {message}", style="red", markup=False, highlight=False)
        failed |= bool(wrong)
        if not wrong and isinstance(result, dict):
            extend_csv(options.output / "generate.csv", head, COLUMNS, result["rows"], keys=("shape", "rows"))
    return failed


def _draw(folder: Path, console: Console) -> None:
    results = read_csv(folder / "generate.csv")
    shapes = unique(results.rows, "shape")
    figure, all_axes = panels(len(shapes), width=4.5, height=3.2)
    for shape, axes in zip(shapes, all_axes, strict=True):
        here = [row for row in results.rows if row["shape"] == shape]
        counts = unique(here, "rows")
        for place, (variant, color) in enumerate(zip(VARIANTS, COLORS, strict=False)):
            mine = [row for row in here if row["variant"] == variant]
            at = [counts.index(row["rows"]) + 0.27 * (place - 1) for row in mine]
            axes.bar(at, [float(row["ms"]) for row in mine], 0.25, label=variant, color=color)
            floors = [float(row["floor_ms"]) for row in mine]
            axes.hlines(floors, [x - 0.12 for x in at], [x + 0.12 for x in at], "black")
        axes.set(title=f"{shape} (line: a copy of its bytes)", xlabel="texts at once", ylabel="ms per token")
        axes.set_xticks(range(len(counts)), counts)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(VARIANTS), frameon=False)
    save(figure, folder / "generate.png")
    shown = {"title": TITLE, "table": _table(results.rows), "picture": TITLE}
    publish_table(folder, "generate", **shown, head=results.head, console=console)


def _table(rows: Sequence[Row]) -> str:
    """A line per shape and number of texts and variant."""
    lines = [
        [
            f"{row['shape']} {row['variant']}",
            row["rows"],
            f"{float(row['ms']):.2f} ({float(row['speedup']):.2f}x)",
            f"{float(row['tokens_per_s']):,.0f}",
            f"{float(row['products_ms']):.2f}",
            f"{float(row['floor_ms']):.2f}",
        ]
        for row in rows
    ]
    return markdown_table(["model", "texts", "ms", "tokens/s", "ms of products", "ms to copy its bytes"], lines)


if __name__ == "__main__":
    sys.exit(main())
