"""`qsparse bench data`: tokens per CPU-second of this loader and of others, on the same tokens in one run.

CPU time rather than wall time, because a loader shares its cores with the training process, and because it repeats on a
busy machine.  Readers take turns over several rounds, so that a disturbance does not hit one alone; the median counts.
A loader that is not installed is listed as absent: `pip install qsparse[bench]` brings the others.
"""

import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipeline.bench.data_formats import describe, make_documents, write_all
from pipeline.bench.data_readers import FORMATS, READERS
from pipeline.bench.machine import machine_lines, processor
from pipeline.bench.options import amount, bench_parser, count

_EPILOG = """\
Writes data.csv, data.md (the table of docs/data.md) and data.png to FOLDER.

example:
  qsparse bench data --output benchmarks/data_loading
"""
_PACKAGES = ("numpy", "isal", "megatron-core", "webdataset", "megatron-energon", "mosaicml-streaming")


@dataclass
class Result:
    """One reader at one sequence length."""

    reader: str
    seq_length: int
    rates: list[float] = field(default_factory=list)
    """Tokens per CPU-second of every round."""
    absent: str = ""
    """Why there are none."""

    @property
    def rate(self) -> float:
        """Median, in millions of tokens per CPU-second."""
        return statistics.median(self.rates) / 1e6 if self.rates else float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = bench_parser("data", __doc__, _EPILOG)
    add = parser.add_argument
    add("--output", type=Path, default=Path("benchmarks/data_loading"), metavar="FOLDER", help="where results go")
    add("--seq-length", type=count, nargs="+", default=[2048, 4096], metavar="N", help="sequence lengths")
    add("--megatokens", type=amount, default=64, metavar="N", help="size of the corpus, and tokens read per round")
    add("--rounds", type=count, default=3, metavar="N", help="measurements of each reader")
    add("--readers", nargs="+", choices=list(READERS), metavar="NAME", help=f"some of: {', '.join(READERS)}")
    options = parser.parse_args(arguments)
    results, corpus = run(options.readers or list(READERS), options.seq_length, options.megatokens, options.rounds)
    options.output.mkdir(parents=True, exist_ok=True)
    write_csv(options.output / "data.csv", results, corpus)
    (options.output / "data.md").write_text(markdown(results))
    plot(options.output / "data.png", results)
    print_table(results, corpus)
    return 0


def run(readers: list[str], seq_lengths: list[int], megatokens: float, rounds: int) -> tuple[list[Result], str]:
    """Measure; returns the results and a line about the corpus."""
    num_tokens = int(megatokens * 1e6)
    documents = make_documents(num_tokens)
    results: list[Result] = []
    corpus = ""
    for seq_length in seq_lengths:
        with tempfile.TemporaryDirectory(prefix="qsparse-bench-") as folder:
            missing = write_all(Path(folder), documents, seq_length)
            corpus = describe(Path(folder))
            here = [Result(reader, seq_length, absent=missing.get(FORMATS.get(reader, ""), "")) for reader in readers]
            for number in range(rounds):
                for result in here:
                    if not result.absent:
                        print(f"round {number + 1}/{rounds}, {seq_length}: {result.reader}", file=sys.stderr)
                        _measure(result, Path(folder), num_tokens)
            results += here
    return results, corpus


def _measure(result: Result, folder: Path, num_tokens: int) -> None:
    command = [sys.executable, "-m", "pipeline.bench.data_readers", result.reader, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(result.seq_length), str(num_tokens)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode or not done.stdout.strip():
        result.absent = f"failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1][:120]}"
        return
    values = json.loads(done.stdout.strip().splitlines()[-1])
    if "absent" in values:
        result.absent = values["absent"]
    else:
        result.rates.append(values["tokens"] / values["cpu_seconds"])


def write_csv(path: Path, results: list[Result], corpus: str) -> None:
    """One line per reader and sequence length, after comment lines on where this was measured."""
    with path.open("w", newline="") as file:
        for line in environment_lines(corpus):
            file.write(f"# {line}\n")
        writer = csv.writer(file)
        writer.writerow(
            ["reader", "seq_length", "median_mtokens_per_cpu_second", "rounds", "lowest", "highest", "absent"]
        )
        for result in results:
            bounds = [f"{f(result.rates) / 1e6:.2f}" if result.rates else "" for f in (min, max)]
            rate = f"{result.rate:.2f}" if result.rates else ""
            writer.writerow([result.reader, result.seq_length, rate, len(result.rates), *bounds, result.absent])


def environment_lines(corpus: str) -> list[str]:
    """Machine, date, versions and corpus."""
    return [*machine_lines(packages=_PACKAGES, device=processor()), f"corpus: {corpus}"]


def plot(path: Path, results: list[Result]) -> None:
    """A bar per reader and sequence length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    readers = list(dict.fromkeys(result.reader for result in results))
    lengths = list(dict.fromkeys(result.seq_length for result in results))
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(readers) + 1.2), layout="constrained")
    height = 0.8 / len(lengths)
    for number, length in enumerate(lengths):
        rates = {result.reader: result.rate for result in results if result.seq_length == length}
        places = [row + (number - (len(lengths) - 1) / 2) * height for row in range(len(readers))]
        values = [0.0 if rates[reader] != rates[reader] else rates[reader] for reader in readers]
        bars = axes.barh(places, values, height, label=f"seq_length {length}")
        labels = [f"{value:.1f}" if value else "absent" for value in values]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(readers)), readers)
    axes.invert_yaxis()
    axes.set_xlabel("million tokens per CPU-second (more is better)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def markdown(results: list[Result]) -> str:
    """The medians as a table, a column per sequence length."""
    lengths = list(dict.fromkeys(result.seq_length for result in results))
    rows = [
        ["million tokens per CPU-second", *(f"seq_length {length}" for length in lengths)],
        ["---"] * (len(lengths) + 1),
    ]
    for reader in dict.fromkeys(result.reader for result in results):
        rows.append([reader, *(f"{r.rate:.0f}" if r.rates else r.absent for r in results if r.reader == reader)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def print_table(results: list[Result], corpus: str) -> None:
    """The medians, a column per sequence length."""
    lengths = list(dict.fromkeys(result.seq_length for result in results))
    table = Table("Mtokens per CPU-second", *(f"seq_length {length}" for length in lengths))
    for reader in dict.fromkeys(result.reader for result in results):
        cells = [next(r for r in results if (r.reader, r.seq_length) == (reader, length)) for length in lengths]
        table.add_row(reader, *(f"{cell.rate:.1f}" if cell.rates else cell.absent for cell in cells))
    console = Console()
    for line in environment_lines(corpus):
        console.print(line, highlight=False)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
