"""Options that the benchmarks share, and how they are refused."""

import argparse
from pathlib import Path


def count(text: str) -> int:
    """A whole number of at least 1, as the `type` of an option.

    Raises:
        ArgumentTypeError: It is something else; argparse names the option.
    """
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of at least 1 is expected")
    return number


def amount(text: str) -> float:
    """A number above 0, likewise."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is expected")
    return number


def bench_parser(name: str, doc: str | None, epilog: str = "") -> argparse.ArgumentParser:
    """The parser of `qsparse bench NAME`, described by the first paragraph of its module's docstring."""
    return argparse.ArgumentParser(
        prog=f"qsparse bench {name}",
        description=(doc or "").split("\n\n")[0],
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_result_options(parser: argparse.ArgumentParser, folder: Path) -> None:
    """--output, --draw and --commit of a benchmark whose results are CSV files that can be drawn elsewhere."""
    add = parser.add_argument
    add("--output", type=Path, default=folder, metavar="FOLDER", help=f"where results go (default: {folder})")
    add("--draw", action="store_true", help="measure nothing: figures and tables from the CSV files in FOLDER")
    add("--commit", metavar="TEXT", help="commit of the code, for a copy that git does not know")


def check_gpus(
    parser: argparse.ArgumentParser, options: argparse.Namespace, needed: int = 1, asked: str = "", tiny: str = "shapes"
) -> None:
    """End with an error if something is to be measured on more GPUs than there are.

    Args:
        parser: of the options.
        options: --draw and --device among them.
        needed: GPUs.
        asked: the option that asks for so many.
        tiny: the option whose value `tiny` a CPU can measure.
    """
    import torch

    if options.draw or options.device == "cpu" or (found := torch.cuda.device_count()) >= needed:
        return
    what = "a CUDA GPU" if needed == 1 else f"{needed} CUDA GPUs"
    asked = f"--{asked}: " if asked else ""
    parser.error(f"{asked}needs {what}, found {found or 'none'} (--device cpu --{tiny} tiny runs anywhere)")


def check_drawable(parser: argparse.ArgumentParser, options: argparse.Namespace, *names: str) -> None:
    """End with an error if FOLDER has none of the CSV files `names` that are to be drawn."""
    if options.draw and not any((options.output / f"{name}.csv").is_file() for name in names):
        wanted = " or ".join(f"{name}.csv" for name in names)
        parser.error(f"--draw: no {wanted} in {options.output}; measure first, or name their folder with --output")
