"""`qsparse bench train`: whole training steps of several formats, each in processes of its own.

Prints tokens per second and GPU, time per step, peak memory, MFU against the dense bf16 peak and the loss after the
steps; then where the time of one step goes.  Tokens are random unless --data names a prepared dataset.  `naive` is
run.kernels=reference: what the layer costs in plain PyTorch.
"""

import argparse
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.bench.machine import machine_lines
from pipeline.bench.results import extend_csv, read_csv, update_page
from pipeline.bench.train_report import BREAKDOWN_COLUMNS, COLUMNS, breakdown_table, draw, table
from pipeline.bench.train_variants import DEFAULT_VARIANTS, SHAPES, VARIANTS, Order

_KEYS = ("shape", "variant", "gpus")
_EPILOG = """\
Writes train.csv, train_breakdown.csv and train.png to FOLDER, and the tables of FOLDER.md if that page exists.
Rows that are in the CSV already, from the same machine, day, versions and commit, stay there.

examples:
  qsparse bench train --shapes 1.3b --variants dense,qsparse-bitnet,qsparse-bitnet-fast
  qsparse bench train --device cpu --shapes tiny --variants dense,qsparse-bitnet --steps 2
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code: 1 if a variant failed, not if its library is absent."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name, known in (("shapes", SHAPES), ("variants", VARIANTS)):
        unknown = [value for value in getattr(options, name) if value not in known]
        if unknown:
            parser.error(f"--{name} {','.join(unknown)}: expected some of {', '.join(known)}")
    console = Console(soft_wrap=True)
    if options.draw:
        return _draw(options.output, console)
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, and there is none here (--device cpu --shapes tiny runs anywhere)")
    failed = _measure(options, console)
    _draw(options.output, console)
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsparse bench train",
        description=__doc__.split("\n\n")[0] if __doc__ else None,
        epilog=_EPILOG + "\nvariants:\n" + "".join(f"  {name:20} {v.summary}\n" for name, v in VARIANTS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", type=_names, default=["350m", "1.3b"], metavar="NAMES", help=f"some of {','.join(SHAPES)}")
    add("--variants", type=_names, default=list(DEFAULT_VARIANTS), metavar="NAMES", help="see below")
    add("--steps", type=int, default=8, metavar="N", help="steps measured of each (default: 8)")
    add("--warmup-steps", type=int, default=3, metavar="N", help="steps before that (default: 3)")
    add("--micro-batch", type=int, metavar="N", help="sequences per forward pass (default: by shape)")
    add("--microbatches", type=int, default=1, metavar="N", help="forward passes per step (default: 1)")
    add("--gpus", type=int, default=1, metavar="N", help="data-parallel processes (default: 1)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where (default: cuda)")
    add("--data", metavar="FOLDER", help="prepared dataset instead of random tokens")
    add("--timeout", type=float, default=600.0, metavar="SECONDS", help="longest time for one variant (default: 600)")
    add("--output", type=Path, default=Path("runs/bench/train"), metavar="FOLDER", help="where results go")
    add("--draw", action="store_true", help="measure nothing: figures and tables from the CSV files in FOLDER")
    add("--commit", metavar="TEXT", help="commit of the code, for a copy that git does not know")
    return parser


def _names(text: str) -> list[str]:
    return text.split(",")


def _measure(options: argparse.Namespace, console: Console) -> bool:
    head = machine_lines(options.commit)
    for line in head:
        console.print(line, markup=False, highlight=False)
    rows: list[dict[str, Any]] = []
    breakdown: list[dict[str, Any]] = []
    for shape in options.shapes:
        for variant in options.variants:
            order = Order(
                *(shape, variant, options.device, options.gpus),
                micro_batch_size=options.micro_batch or SHAPES[shape].micro_batch_size,
                microbatches=options.microbatches,
                steps=options.steps,
                warmup_steps=options.warmup_steps,
                data=options.data,
            )
            row, parts = _row(order, options.timeout)
            rows.append(row)
            breakdown += parts
            extend_csv(options.output / "train.csv", head, COLUMNS, rows, keys=_KEYS)
            extend_csv(options.output / "train_breakdown.csv", head, BREAKDOWN_COLUMNS, breakdown, keys=_KEYS)
            shown = row["absent"] or f"{row['tokens_per_s_per_gpu']} tokens/s/GPU, {row['ms_per_step']} ms/step"
            console.print(
                f"{shape} {variant}: {shown}, peak {row['peak_gib']} GiB, loss {row['loss']}", highlight=False
            )
    return any(row["absent"].startswith("failed") for row in rows)


def _row(order: Order, timeout: float) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "")
    row |= {"shape": order.shape, "variant": order.variant, "gpus": order.gpus}
    row |= {"micro_batch": order.micro_batch_size, "microbatches": order.microbatches}
    package = VARIANTS[order.variant].package
    if package and importlib.util.find_spec(package) is None:
        return row | {"absent": f"not installed: {package}"}, []
    result = run_order(order, timeout)
    if isinstance(result, str):
        return row | {"absent": result}, []
    row |= {"tokens_per_s_per_gpu": f"{result['tokens_per_s_per_gpu']:.1f}"}
    row |= {name: f"{result[name]:.1f}" for name in ("ms_per_step", "q25_ms", "q75_ms", "peak_gib")}
    row |= {"mfu": "" if result["mfu"] is None else f"{result['mfu']:.4f}", "loss": f"{result['loss']:.4f}"}
    parts = [
        {
            "shape": order.shape,
            "variant": order.variant,
            "gpus": order.gpus,
            "category": category,
            "ms": f"{milliseconds:.2f}",
        }
        for category, milliseconds in result["breakdown"].items()
    ]
    return row, parts


def run_order(order: Order, timeout: float) -> dict[str, Any] | str:
    """Measure in fresh processes, one per GPU: the numbers, or why there are none."""
    with tempfile.TemporaryDirectory(prefix="qsparse-bench-") as folder:
        result, errors = Path(folder, "result.json"), Path(folder, "errors.txt")
        command = [sys.executable, "-m", "pipeline.bench.train_worker", json.dumps(order._asdict()), str(result)]
        # As `qsparse train` starts its ranks: communication kernels stay ahead of the computation they overlap with.
        defaults = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        place = {"WORLD_SIZE": str(order.gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        with errors.open("w") as stream:
            ranks = [
                subprocess.Popen(
                    command,
                    env={**defaults, **os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=stream,
                    stderr=stream,
                )
                for rank in range(order.gpus)
            ]
            in_time = _wait(ranks, timeout)
        if result.is_file() and in_time:
            values: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return values
        return (
            f"failed: longer than --timeout {timeout:g}" if not in_time else _reason(errors.read_text(errors="replace"))
        )


def _wait(ranks: list[subprocess.Popen[bytes]], timeout: float) -> bool:
    """Until all have ended, or one has failed, which ends the others; False if the time is over."""
    end = time.monotonic() + timeout
    try:
        while any(rank.poll() is None for rank in ranks):
            if any(rank.poll() for rank in ranks):
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def _reason(errors: str) -> str:
    """The line of a traceback that names the error."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Interrupt"))]
    return f"failed: {(named or lines or ['without a word'])[-1][:200]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _draw(folder: Path, console: Console) -> int:
    results, breakdown = read_csv(folder / "train.csv"), read_csv(folder / "train_breakdown.csv")
    draw(results.rows, breakdown.rows, folder / "train.png")
    tables = [table(results.rows), breakdown_table(breakdown.rows)]
    for text in tables:
        console.print(text, markup=False, highlight=False)
    page = folder.with_suffix(".md")
    if page.is_file():
        source = f"{'; '.join(results.head)}. All numbers: [train.csv]({folder.name}/train.csv)."
        picture = f"![Training steps]({folder.name}/train.png)"
        fragment = "\n\n".join([tables[0], picture, "Milliseconds of one step:", tables[1], source])
        for name in update_page(page, {"train": fragment}):
            console.print(f"{page} has no place for '{name}': <!-- bench: {name} --> and <!-- end -->", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
