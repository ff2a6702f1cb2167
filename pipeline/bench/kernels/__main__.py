"""`qsparse bench kernels`: every table and figure about kernels, as CSV and PNG.

No speed is printed for a section one of whose kernels disagrees with its reference; the exit code is then 1.
"""

import importlib
import math
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from pipeline.bench.kernels.case import Options, Section
from pipeline.bench.kernels.runner import run_section, sweep_section
from pipeline.bench.kernels.timing import Rates
from pipeline.bench.machine import machine_lines
from pipeline.bench.options import add_result_options, amount, bench_parser, check_drawable
from pipeline.bench.results import extend_csv, publish, read_csv, source

SECTIONS = {
    "sparsify": "sparsify",
    "ternarize": "ternarize",
    "fused": "fused",
    "layer": "layer",
    "exact-ways": "exact_ways",
    "public-layers": "public_layers",
    "two-four": "two_four",
    "memory": "memory",
    "grouped": "grouped",
    "block-sparse": "block_sparse",
    "decode": "decode",
}
"""Name -> module of this package."""
_EPILOG = """\
Writes NAME.csv and NAME.png of each section to FOLDER, and the tables of FOLDER.md if that page exists.  Cases that are
in the CSV already, from the same machine, day, versions and commit, stay there: a long section can be run in parts.

examples:
  qsparse bench kernels --only sparsify,layer
  qsparse bench kernels --output docs/performance --draw     (figures and page anew from the CSV; needs no GPU)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    parser = bench_parser("kernels", __doc__, _EPILOG)
    add = parser.add_argument
    add("--only", metavar="NAMES", help=f"some of {','.join(SECTIONS)}, separated by commas (default: all)")
    add(
        "--seconds", type=amount, default=math.inf, metavar="N", help="begin no case of a section after so many seconds"
    )
    add("--case", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    add("--quick", action="store_true", help="one case per section, fewer rounds, nothing compiled by torch.compile")
    add("--sweep", action="store_true", help="time launches of our own kernels instead, fastest first; writes nothing")
    add_result_options(parser, Path("runs/bench/kernels"))
    options = parser.parse_args(arguments)
    names = options.only.split(",") if options.only else list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"--only {','.join(unknown)}: expected some of {', '.join(SECTIONS)}")
    check_drawable(parser, options, *names)
    console = Console(soft_wrap=True)
    if options.draw:
        return draw({name: load_section(name) for name in names}, options.output, console)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU, and there is none here (--draw makes figures from existing results)")
    sections = {name: load_section(name) for name in names}
    size = Options(quick=options.quick, seconds=options.seconds)
    if options.sweep:
        for section in sections.values():
            sweep_section(section, size, console, options.case)
        return 0
    return run(sections, size, options.output, console, options.case, options.commit)


def load_section(name: str) -> Section:
    """The section of that name; imported only now, so that one does not need what another needs."""
    section: Section = importlib.import_module(f"pipeline.bench.kernels.{SECTIONS[name]}").SECTION
    return section


def run(
    sections: Mapping[str, Section],
    options: Options,
    output: Path,
    console: Console,
    wanted: str = "",
    commit: str | None = None,
) -> int:
    """Measure sections and write their files.

    Args:
        sections: by name.
        options: device, size and time.
        output: folder of the files.
        console: where checks, times and tables appear.
        wanted: part of the names of the cases to take.
        commit: of the code, where git does not know.

    Returns:
        0, or 1 if a section is red (it is neither timed nor written) or its timing broke off.
    """
    head = machine_lines(commit)
    for line in head:
        console.print(line, markup=False, highlight=False)
    rates = Rates(options.device)
    green, failures = {}, []
    for name, section in sections.items():
        console.rule(name)
        save = partial(extend_csv, output / f"{name}.csv", head, section.columns, keys=("case",))
        outcome = run_section(section, options, rates, console, wanted, save)
        failures += [f"{name}: {failure}" for failure in outcome.failures]
        if outcome.rows:
            save(outcome.rows)
            green[name] = section
    draw(green, output, console)
    for failure in failures:
        console.print(f"failed: {failure}", style="red", markup=False, highlight=False)
    return 1 if failures else 0


def draw(sections: Mapping[str, Section], folder: Path, console: Console) -> int:
    """Figures and tables of the sections that have a CSV file in `folder`."""
    fragments = {}
    for name, section in sections.items():
        path = folder / f"{name}.csv"
        if not path.is_file():
            continue
        results = read_csv(path)
        section.draw(results.rows, path.with_suffix(".png"))
        table = section.table(results.rows)
        picture = f"![{section.title}]({folder.name}/{name}.png)"
        fragments[name] = f"{section.title}.\n\n{table}\n\n{picture}\n\n{source(results.head, folder, name)}"
        console.rule(section.title)
        console.print(table, markup=False, highlight=False)
    publish(folder, fragments, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
