"""`qsparse bench scaling`: the same training on one GPU and on several, with as many tokens per GPU.

Every variant runs alone and in each layout, one after the other on the same machine: data parallel with the distributed
optimizer and overlapped gradients, tensor parallel with sequence parallelism and as many times the sequences.  Prints
tokens per second and GPU, their ratio to those of one GPU, and how much of the communication nothing else runs beside.
"""

import argparse
import math
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.bench.kernels.drawing import COLORS, panels, save, unique
from pipeline.bench.machine import machine_lines
from pipeline.bench.options import check_drawable, check_gpus, count
from pipeline.bench.results import Row, extend_csv, markdown_table, publish_table, read_csv
from pipeline.bench.train_options import missing, parse, training_parser
from pipeline.bench.train_ranks import Result, measure_all
from pipeline.bench.train_variants import SHAPES, VARIANTS, Order, layout_name

KEYS = ("shape", "variant", "dp", "tp", "micro_batch")
COLUMNS = (
    *(*KEYS, "cuda_graph", "tokens_per_s_per_gpu", "ms_per_step", "q25_ms", "q75_ms"),
    *("communication_ms", "exposed_ms", "peak_gib", "loss", "absent"),
)
TITLE = "The same tokens per GPU on one GPU and on several"
_EPILOG = """\
Writes scaling.csv and scaling.png to FOLDER, and the table of FOLDER.md if that page exists.  Rows that are in the CSV
already, from the same machine, day, versions and commit, stay there.

examples:
  qsparse bench scaling --layouts dp=2 tp=2
  qsparse bench scaling --layouts dp=4,tp=2 --variants dense,qsparse-bitnet --micro-batch 8
  qsparse bench scaling --device cpu --shapes tiny --layouts dp=2 tp=2 --steps 2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 1 if anything failed."""
    parser = _parser()
    options = parse(parser, arguments)
    check_drawable(parser, options, "scaling")
    check_gpus(parser, options, max(math.prod(sizes) for sizes in options.layouts), "layouts")
    console = Console(soft_wrap=True)
    if options.draw:
        return _draw(options.output, console)
    failed = _measure(options, console)
    _draw(options.output, console)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    variants = ["dense", "qsparse-bitnet", "qsparse-bitnet-fast"]
    parser = training_parser("scaling", __doc__ or "", _EPILOG, shapes=["1.3b"], variants=variants)
    add = parser.add_argument
    add("--layouts", nargs="+", type=_layout, default=[(2, 1), (1, 2)], metavar="L", help="default: dp=2 tp=2")
    add("--micro-batch", type=count, metavar="N", help="sequences per GPU (default: by shape)")
    return parser


def _layout(text: str) -> tuple[int, int]:
    """`dp=2,tp=4` -> (2, 4)."""
    sizes = {"dp": 1, "tp": 1}
    for part in text.split(","):
        name, _, size = part.partition("=")
        if name not in sizes or not size.isdecimal() or size == "0":
            raise argparse.ArgumentTypeError(f"{text!r}: expected sizes of dp and tp, such as dp=2 or dp=4,tp=2")
        sizes[name] = int(size)
    return sizes["dp"], sizes["tp"]


def _measure(options: argparse.Namespace, console: Console) -> bool:
    head, rows, failed = machine_lines(options.commit), [], False
    tell = partial(console.print, markup=False, highlight=False)
    for line in head:
        tell(line)
    present = [
        _order(options, shape, variant, *sizes)
        for shape in options.shapes
        for variant in options.variants
        for sizes in dict.fromkeys([(1, 1), *options.layouts])
    ]
    absent = [(order, reason) for order in present if (reason := missing(order))]
    orders = deque(order for order in present if not missing(order))
    limits = {"timeout": options.timeout, "total_seconds": options.total_seconds}
    for order, result in chain(absent, measure_all(orders, **limits, tell=tell)):
        failed |= isinstance(result, str) and result.startswith("failed")
        rows.append(_row(order, result))
        extend_csv(options.output / "scaling.csv", head, COLUMNS, rows, keys=KEYS)
        told = result if isinstance(result, str) else f"{rows[-1]['tokens_per_s_per_gpu']} tokens/s/GPU"
        tell(f"{order.name}: {told}")
    return failed


def _order(options: argparse.Namespace, shape: str, variant: str, dp: int, tp: int) -> Order:
    return Order(
        *(shape, variant, options.device),
        micro_batch_size=(options.micro_batch or SHAPES[shape].micro_batch_size) * tp,
        microbatches=1,
        steps=options.steps,
        warmup_steps=options.warmup_steps,
        data=None,
        cuda_graph=options.device == "cuda" and VARIANTS[variant].cuda_graph,
        dp=dp,
        tp=tp,
    )


def _row(order: Order, result: Result) -> dict[str, Any]:
    keys = (order.shape, order.variant, order.dp, order.tp, order.micro_batch_size)
    row: dict[str, Any] = {**dict.fromkeys(COLUMNS, ""), **dict(zip(KEYS, keys, strict=True))}
    if isinstance(result, str):
        return row | {"absent": result}
    for name in ("tokens_per_s_per_gpu", "ms_per_step", "q25_ms", "q75_ms", "peak_gib"):
        row[name] = f"{result[name]:.1f}"
    if (communication := result["communication"]) is not None:
        row |= {"communication_ms": f"{communication[0]:.1f}", "exposed_ms": f"{communication[1]:.1f}"}
    return row | {"cuda_graph": "yes" if order.cuda_graph else "no", "loss": f"{result['loss']:.4f}"}


def scaling_table(rows: Sequence[Row]) -> str:
    """A line per shape, variant and layout."""
    lines = []
    for row in rows:
        name = [row["shape"], row["variant"], layout_name(int(row["dp"]), int(row["tp"]))]
        if row["absent"]:
            lines.append([*name, row["absent"], *[""] * 6])
            continue
        time_ms = f"{row['ms_per_step']} ({row['q25_ms']} to {row['q75_ms']})"
        numbers = [f"{_rate(row):,.0f}", efficiency(row, rows), time_ms, row["communication_ms"], row["exposed_ms"]]
        lines.append([*name, *numbers, row["peak_gib"], row["cuda_graph"]])
    header = ["shape", "variant", "layout", "tokens/s/GPU", "of one GPU's", "ms/step (quartiles)"]
    header += ["communication, ms", "exposed, ms", "peak GiB", "CUDA graph"]
    return markdown_table(header, lines)


def efficiency(row: Row, rows: Sequence[Row]) -> str:
    """Tokens per second and GPU over those of one GPU with as many sequences per GPU; empty without them."""
    micro_batch = str(int(row["micro_batch"]) // int(row["tp"]))
    wanted = (row["shape"], row["variant"], "1", "1", micro_batch)
    alone = (one for one in rows if tuple(one[key] for key in KEYS) == wanted and not one["absent"])
    one = next(alone, None)
    return "" if one is None else f"{_rate(row) / _rate(one):.1%}"


def _rate(row: Row) -> float:
    return float(row["tokens_per_s_per_gpu"])


def _draw(folder: Path, console: Console) -> int:
    head, rows = read_csv(folder / "scaling.csv")
    _figure(rows, folder / "scaling.png")
    table = scaling_table(rows)
    publish_table(folder, "scaling", title=TITLE, table=table, picture=TITLE, head=head, console=console)
    return 0


def _figure(rows: Sequence[Row], path: Path) -> None:
    """Per shape, a bar per variant and layout: the step, with the communication that it hides and that it waits for."""
    shapes = unique(rows, "shape")
    figure, axes = panels(len(shapes), width=8.0)
    for panel, shape in zip(axes, shapes, strict=True):
        here = [row for row in rows if row["shape"] == shape and not row["absent"]]
        names = [f"{row['variant']}, {layout_name(int(row['dp']), int(row['tp']))}" for row in here]
        exposed = [float(row["exposed_ms"] or 0) for row in here]
        hidden = [float(row["communication_ms"] or 0) - alone for row, alone in zip(here, exposed, strict=True)]
        rest = [float(row["ms_per_step"]) - a - b for row, a, b in zip(here, exposed, hidden, strict=True)]
        left = [0.0] * len(here)
        parts: Mapping[str, list[float]] = {
            "computation": rest,
            "communication beside it": hidden,
            "communication alone": exposed,
        }
        for color, (label, widths) in zip(COLORS, parts.items(), strict=False):
            bars = panel.barh(names, widths, left=left, label=label, color=color)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        panel.bar_label(bars, [efficiency(row, rows) for row in here], fontsize=7, padding=3)
        panel.set(title=f"{shape}: ms per step, tokens/s per GPU over one GPU's", xlim=(0, 1.15 * max(left, default=1)))
        panel.invert_yaxis()
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=7)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main())
