"""`qsparse bench moe`: forward and backward of one MoE layer against bf16 experts of other libraries, as CSV and PNG.

Router, dispatcher and combination are the same for all; experts are ours (Q-Sparse BitNet, exact or with 8-bit
gradients, and dense ones as block-sparse products), torch._grouped_mm's and Transformer Engine's.  With --gpus N they
are spread over N processes.  No speed is printed if our experts disagree with their reference; the exit code is then 1.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.bench.machine import machine_lines
from pipeline.bench.moe_worker import BOUNDS, SHAPES, Job
from pipeline.bench.options import add_result_options, bench_parser, check_drawable, check_gpus, count
from pipeline.bench.results import Row, extend_csv, markdown_table, publish_table, read_csv

BASELINE = "torch._grouped_mm"
COLUMNS = ("layer", "gpus", "variant", "ms", "q25_ms", "q75_ms", "tokens_per_s_per_gpu", "step_gib", "timed", "speedup")
TITLE = "One MoE layer, 16384 tokens per GPU, forward and backward (speed-up over torch._grouped_mm in bf16)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = bench_parser("moe", __doc__)
    add = parser.add_argument
    add("--layers", nargs="+", default=[*SHAPES][:2], metavar="NAME", help=f"some of {'; '.join(SHAPES)}")
    add("--gpus", type=count, default=1, metavar="N", help="expert-parallel processes (default: 1)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where (default: cuda)")
    add("--rounds", type=count, default=9, metavar="N", help="times that every variant is timed (default: 9)")
    add_result_options(parser, Path("runs/bench/moe"))
    options = parser.parse_args(arguments)
    check_drawable(parser, options, "moe")
    for layer in options.layers:
        if layer not in SHAPES:
            parser.error(f"--layers {layer!r}: expected some of {'; '.join(SHAPES)}")
    check_gpus(parser, options, options.gpus, "gpus", tiny="layers")
    console = Console(soft_wrap=True)
    failed = False if options.draw else _measure(options, console)
    if (options.output / "moe.csv").is_file():
        _draw(options.output, console)
    return 1 if failed else 0


def _measure(options: argparse.Namespace, console: Console) -> bool:
    """Check our layers, in processes side by side, which compile the kernels on the way; then time layer by layer."""
    head = machine_lines(options.commit)
    for line in head:
        console.print(line, markup=False, highlight=False)
    with ThreadPoolExecutor() as pool:
        checks = [Job(layer, [name], options.device, rounds=0) for layer in options.layers for name in BOUNDS]
        found = list(pool.map(partial(run_ranks, gpus=options.gpus), checks))
    wrong = [
        f"{job.layer}: {message}" for job, result in zip(checks, found, strict=True) for message in result["wrong"]
    ]
    for layer in [] if wrong else options.layers:
        floats = ["ours exact, floats travel"] if options.gpus > 1 else []
        variants = [*BOUNDS, *floats, BASELINE, f"{BASELINE}, dW added", "TE GroupedLinear"]
        result = run_ranks(Job(layer, variants, options.device, options.rounds), gpus=options.gpus)
        wrong += [f"{layer}: {message}" for message in result["wrong"]]
        for name, why in result["absent"].items():
            console.print(f"{layer}: {name} is left out: {why}", markup=False, highlight=False)
        if rows := _with_speedup(layer, options.gpus, result["rows"]):
            extend_csv(options.output / "moe.csv", head, COLUMNS, rows, keys=("layer", "gpus"))
    for message in wrong:
        console.print(f"failed: {message}", style="red", markup=False, highlight=False)
    return bool(wrong)


def run_ranks(job: Job, *, gpus: int) -> dict[str, Any]:
    """What `gpus` processes of `moe_worker` found; a process that fails ends the others and is told as wrong."""
    with tempfile.TemporaryDirectory(prefix="qsparse-bench-") as folder:
        result = Path(folder, "result.json")
        command = [sys.executable, "-m", "pipeline.bench.moe_worker", json.dumps(job._asdict()), str(result)]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = {"WORLD_SIZE": str(gpus), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONWARNINGS": "ignore", **os.environ, **place}
        ranks = [
            subprocess.Popen(command, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(gpus)
        ]
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.1)
        for rank in ranks:
            rank.kill()
            rank.wait()
        if not result.is_file():
            return {"wrong": [f"{', '.join(job.variants)}: a process failed, see above"], "rows": [], "absent": {}}
        found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return found


def _with_speedup(layer: str, gpus: int, rows: list[dict[str, str]]) -> list[dict[str, object]]:
    base = next((float(row["ms"]) for row in rows if row["variant"] == BASELINE), None)
    return [
        {"layer": layer, "gpus": gpus, **row, "speedup": "" if base is None else f"{base / float(row['ms']):.3f}"}
        for row in rows
    ]


def _draw(folder: Path, console: Console) -> None:
    from matplotlib.figure import Figure

    results = read_csv(folder / "moe.csv")
    cases = list(dict.fromkeys((row["layer"], row["gpus"]) for row in results.rows))
    figure = Figure(figsize=(10, 2.6 * len(cases)), layout="constrained")
    for (layer, gpus), (speed, memory) in zip(cases, figure.subplots(len(cases), 2, squeeze=False), strict=True):
        rows = [row for row in results.rows if (row["layer"], row["gpus"]) == (layer, gpus)]
        names = [row["variant"] for row in rows]
        speed.barh(names, [float(row["ms"]) for row in rows], color="#0b6e4f")
        speed.set(title=f"{layer}, {gpus} GPU{'s' if gpus != '1' else ''}", xlabel="ms, forward and backward")
        memory.barh(names, [float(row["step_gib"]) for row in rows], color="#c1440e")
        memory.set(xlabel="GiB on top of weights", yticks=[])
        for axes in (speed, memory):
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "moe.png", dpi=150)
    shown = {"title": TITLE, "table": _table(results.rows), "picture": "One MoE layer"}
    publish_table(folder, "moe", **shown, head=results.head, console=console)


def _table(rows: Sequence[Row]) -> str:
    """Milliseconds, tokens per second and memory: a line per variant."""
    lines = [
        [
            row["layer"],
            row["gpus"],
            row["variant"],
            f"{float(row['ms']):.1f}" + (f" ({float(row['speedup']):.2f}x)" if row["speedup"] else ""),
            f"{float(row['tokens_per_s_per_gpu']):,.0f}",
            row["step_gib"],
            row["timed"],
        ]
        for row in rows
    ]
    return markdown_table(["layer", "GPUs", "experts", "ms", "tokens/s/GPU", "GiB on top of weights", "timed"], lines)


if __name__ == "__main__":
    sys.exit(main())
