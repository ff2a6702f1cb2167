"""`qsparse bench`: measurements that a user can repeat, each a module of `pipeline.bench` with options of its own.

They need torch or other loaders, so they are started as a process; `qsparse bench NAME --help` is answered by them.
"""

import argparse
import subprocess
import sys
from typing import Any, NamedTuple


class Benchmark(NamedTuple):
    """A measurement; to add one, add its line to BENCHMARKS."""

    name: str
    module: str
    summary: str


BENCHMARKS = (
    Benchmark("data", "pipeline.bench.data", "tokens per CPU-second of this data loader and of others"),
    Benchmark("data-scale", "pipeline.bench.data_scale", "opens, requests, bytes and memory of reading at any scale"),
    Benchmark("kernels", "pipeline.bench.kernels", "every kernel: correct, and how fast, against others and the floor"),
    Benchmark("trajectories", "pipeline.bench.trajectories", "losses of the same training on different kernels"),
    Benchmark("moe", "pipeline.bench.moe", "one MoE layer against bf16 experts of other libraries: time and memory"),
    Benchmark("train", "pipeline.bench.train", "tokens per second, memory and step-time breakdown of whole training"),
    Benchmark("generate", "pipeline.bench.generate", "tokens per second of whole models that generate, in two bits"),
    Benchmark("scaling", "pipeline.bench.scaling", "the same training on one GPU and on several, and what hides what"),
)


def add_bench_parser(commands: Any) -> None:
    """Add `bench` to the subparsers of `qsparse`."""
    summary = "repeat the measurements of the docs"
    parser = commands.add_parser("bench", help=summary, description=f"{summary.capitalize()}.", allow_abbrev=False)
    names = parser.add_subparsers(title="benchmarks", metavar="NAME", required=True)
    for benchmark in BENCHMARKS:
        one = names.add_parser(benchmark.name, help=benchmark.summary, add_help=False, allow_abbrev=False)
        one.set_defaults(run=_run, module=benchmark.module, rest=[])


def _run(arguments: argparse.Namespace) -> int:
    return subprocess.run([sys.executable, "-m", arguments.module, *arguments.rest], check=False).returncode
