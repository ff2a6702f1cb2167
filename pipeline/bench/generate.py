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
from pipeline.bench.machine import machine_lines
from pipeline.bench.options import add_result_options, amount, bench_parser, check_drawable, check_gpus, count
from pipeline.bench.results import Row, extend_csv, markdown_table, publish, read_csv, source
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
    from matplotlib.figure import Figure

    results = read_csv(folder / "generate.csv")
    shapes = list(dict.fromkeys(row["shape"] for row in results.rows))
    figure = Figure(figsize=(4.5 * len(shapes), 3.2), layout="constrained")
    for shape, axes in zip(shapes, figure.subplots(1, len(shapes), squeeze=False)[0], strict=True):
        counts = list(dict.fromkeys(row["rows"] for row in results.rows if row["shape"] == shape))
        for place, (variant, color) in enumerate(zip(VARIANTS, ("#6b6b6b", "#c1440e", "#0b6e4f"), strict=True)):
            times = {row["rows"]: float(row["ms"]) for row in results.rows if _is(row, shape, variant)}
            floors = {row["rows"]: float(row["floor_ms"]) for row in results.rows if _is(row, shape, variant)}
            at = [number + 0.27 * (place - 1) for number in range(len(counts))]
            axes.bar(at, [times[count] for count in counts], 0.25, label=variant, color=color)
            axes.hlines([floors[count] for count in counts], [x - 0.12 for x in at], [x + 0.12 for x in at], "black")
        axes.set(title=f"{shape} (line: a copy of its bytes)", xlabel="texts at once", ylabel="ms per token")
        axes.set_xticks(range(len(counts)), counts)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(VARIANTS), frameon=False)
    figure.savefig(folder / "generate.png", dpi=150)
    table = _table(results.rows)
    console.print(table, markup=False, highlight=False)
    picture = f"![{TITLE}]({folder.name}/generate.png)"
    fragment = "\n\n".join([f"{TITLE}.", table, picture, source(results.head, folder, "generate")])
    publish(folder, {"generate": fragment}, console)


def _is(row: Row, shape: str, variant: str) -> bool:
    return (row["shape"], row["variant"]) == (shape, variant)


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
