"""`qsparse bench train`: whole training steps of several formats on one GPU, each in a process of its own.

Prints tokens per second, time per step, peak memory, MFU against the dense bf16 peak and the loss after the
steps; then where the time of one step goes, and its memory.  Each variant runs at the shape's micro-batch, as a CUDA
graph where that works, and then at twice, four times ... that micro-batch for as long as it gets faster and memory and
--total-seconds allow; the fastest is shown.  Tokens are random unless --data names a prepared dataset.  `naive` is
fake quantization in plain PyTorch, as most training code for such models has it.
"""

import argparse
import sys
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.bench.machine import machine_lines
from pipeline.bench.options import check_drawable, check_gpus, count
from pipeline.bench.results import extend_csv, publish, read_csv, source
from pipeline.bench.train_categories import ACTIVATIONS
from pipeline.bench.train_options import missing, parse, training_parser
from pipeline.bench.train_ranks import measure_all
from pipeline.bench.train_report import (
    KEYS,
    SHEETS,
    batch_table,
    breakdown_table,
    draw,
    kernel_table,
    memory_table,
    table,
)
from pipeline.bench.train_variants import SHAPES, VARIANTS, Order

_ROOM = 0.95
"""Share of the GPU's memory that twice the micro-batch may be expected to take."""
_EPILOG = """\
Writes train.csv, train_breakdown.csv, train_memory.csv, train_kernels.csv (the longest kernels) and train.png to
FOLDER, and the tables of FOLDER.md if that page exists.  Rows that are in the CSV already, from the same machine, day,
versions and commit, stay there.

examples:
  qsparse bench train --shapes 1.3b --variants dense,qsparse-bitnet,qsparse-bitnet-fast
  qsparse bench train --device cpu --shapes tiny --variants dense,qsparse-bitnet --steps 2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 1 if a variant failed, not if its library is absent."""
    parser = _parser()
    options = parse(parser, arguments)
    check_drawable(parser, options, "train")
    check_gpus(parser, options)
    console = Console(soft_wrap=True)
    if options.draw:
        return _draw(options.output, console)
    failed = _measure(options, console)
    _draw(options.output, console)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = training_parser("train", __doc__ or "", _EPILOG, shapes=["350m", "1.3b"], variants=list(VARIANTS))
    add = parser.add_argument
    add("--micro-batch", type=count, metavar="N", help="sequences per forward pass, and no other (default: by shape)")
    add("--microbatches", type=count, default=1, metavar="N", help="forward passes per step (default: 1)")
    add("--data", metavar="FOLDER", help="prepared dataset instead of random tokens")
    return parser


def _measure(options: argparse.Namespace, console: Console) -> bool:
    head = machine_lines(options.commit)
    for line in head:
        console.print(line, markup=False, highlight=False)
    book = _Book(options.output, head)
    tell = partial(console.print, markup=False, highlight=False)
    present = [(order, missing(order)) for order in _orders(options)]
    orders = deque(order for order, reason in present if not reason)
    fastest: dict[tuple[str, str], float] = {}
    limits = {"timeout": options.timeout, "total_seconds": options.total_seconds}
    for order, result in measure_all(orders, **limits, tell=tell):
        tell(book.enter(order, result))
        if options.micro_batch is None and isinstance(result, dict):
            speed = result["tokens_per_s_per_gpu"]
            faster = speed > fastest.get((order.shape, order.variant), 0.0)
            fastest[order.shape, order.variant] = speed
            if faster and _has_room(result):
                orders.append(order._replace(micro_batch_size=2 * order.micro_batch_size))
    for order, reason in present:
        if reason:
            tell(book.enter(order, reason))
    return book.failed


def _orders(options: argparse.Namespace) -> Iterable[Order]:
    """What can be measured at all, each at one micro-batch."""
    for shape in options.shapes:
        for variant in options.variants:
            yield Order(
                *(shape, variant, options.device),
                micro_batch_size=options.micro_batch or SHAPES[shape].micro_batch_size,
                microbatches=options.microbatches,
                steps=options.steps,
                warmup_steps=options.warmup_steps,
                data=options.data,
                cuda_graph=options.device == "cuda" and VARIANTS[variant].cuda_graph,
            )


def _has_room(result: Mapping[str, Any]) -> bool:
    """Whether twice the activations fit."""
    import torch

    if not torch.cuda.is_available():
        return False
    doubled = result["peak_gib"] + result["memory"][ACTIVATIONS]
    return doubled * 2**30 < _ROOM * torch.cuda.get_device_properties(0).total_memory


class _Book:
    """The CSV files, written after every measurement."""

    def __init__(self, folder: Path, head: Sequence[str]) -> None:
        self._folder, self._head = folder, head
        self._rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SHEETS}
        self.failed = False
        """Whether a variant failed at the micro-batch that every variant should bear."""

    def enter(self, order: Order, result: Mapping[str, Any] | str) -> str:
        """Write a result, or why there is none; returns a line that tells it."""
        keys = _keys(order)
        is_first = order.micro_batch_size <= SHAPES[order.shape].micro_batch_size
        row = _row(order, result)
        if isinstance(result, str):
            self.failed |= is_first and result.startswith("failed")
            shown = result
        else:
            for name in ("breakdown", "memory"):
                self._rows[f"train_{name}"] += [
                    {**keys, "category": category, SHEETS[f"train_{name}"][-1]: f"{value:.2f}"}
                    for category, value in result[name].items()
                ]
            self._rows["train_kernels"] += [
                {**keys, **kernel, "name": kernel["name"][:120], "ms": f"{kernel['ms']:.3f}"}
                for kernel in result["kernels"]
            ]
            shown = f"{row['tokens_per_s_per_gpu']} tokens/s/GPU, {row['ms_per_step']} ms/step, "
            shown += f"peak {row['peak_gib']} GiB, loss {row['loss']}, CUDA graph: {row['cuda_graph']}"
        if not isinstance(result, str) or is_first:
            self._rows["train"].append(row)
        for name, columns in SHEETS.items():
            extend_csv(self._folder / f"{name}.csv", self._head, columns, self._rows[name], keys=KEYS)
        return f"{order.shape} {order.variant}, micro-batch {order.micro_batch_size}: {shown}"


def _keys(order: Order) -> dict[str, Any]:
    """The columns `KEYS`."""
    values = (order.shape, order.variant, order.micro_batch_size)
    return dict(zip(KEYS, values, strict=True))


def _row(order: Order, result: Mapping[str, Any] | str) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(SHEETS["train"], "")
    row |= {**_keys(order), "microbatches": order.microbatches}
    if isinstance(result, str):
        return row | {"absent": result}
    row |= {"tokens_per_s_per_gpu": f"{result['tokens_per_s_per_gpu']:.1f}"}
    row |= {name: f"{result[name]:.1f}" for name in ("ms_per_step", "q25_ms", "q75_ms", "peak_gib")}
    row |= {"mfu": "" if result["mfu"] is None else f"{result['mfu']:.4f}", "loss": f"{result['loss']:.4f}"}
    return row | {"cuda_graph": "yes" if order.cuda_graph else "no"}


def _draw(folder: Path, console: Console) -> int:
    head, _ = read_csv(folder / "train.csv")
    sheets = {name: read_csv(folder / f"{name}.csv").rows for name in SHEETS}
    draw(sheets, folder / "train.png")
    rows = sheets["train"]
    tables = {
        "": table(rows),
        "By sequences per micro-batch (speed and memory against `dense` at the same):": batch_table(rows),
        "Milliseconds of one step:": breakdown_table(rows, sheets["train_breakdown"]),
        "GiB at the peak, at the same micro-batch:": memory_table(rows, sheets["train_memory"]),
        "The longest kernels of a step:": kernel_table(rows, sheets["train_kernels"]),
    }
    for text in tables.values():
        console.print(text, markup=False, highlight=False)
    parts = [part for title, text in tables.items() if text for part in (title, text) if part]
    parts.insert(1, f"![Training steps]({folder.name}/train.png)")
    publish(folder, {"train": "\n\n".join([*parts, source(head, folder, *SHEETS)])}, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
