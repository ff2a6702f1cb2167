"""What the commands that measure trainings have in common: their options, and what cannot be measured here."""

import argparse
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from pipeline.bench.options import add_result_options, amount, bench_parser, count
from pipeline.bench.train_variants import SHAPES, VARIANTS, Order


def training_parser(
    name: str, doc: str, epilog: str, *, shapes: Sequence[str], variants: Sequence[str]
) -> argparse.ArgumentParser:
    """The parser of `qsparse bench NAME`.

    Args:
        name: of the command.
        doc: docstring of its module.
        epilog: examples and the like, shown above the list of variants.
        shapes: measured if none are named.
        variants: likewise.
    """
    described = "".join(f"  {name:24} {variant.summary}\n" for name, variant in VARIANTS.items())
    parser = bench_parser(name, doc, f"{epilog}\nvariants:\n{described}")
    add = parser.add_argument
    add("--shapes", type=_names, default=list(shapes), metavar="NAMES", help=f"some of {','.join(SHAPES)}")
    add("--variants", type=_names, default=list(variants), metavar="NAMES", help="see below")
    add("--steps", type=count, default=6, metavar="N", help="steps measured of each (default: 6)")
    add("--warmup-steps", type=count, default=5, metavar="N", help="before that; a graph takes 4 (default: 5)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="where (default: cuda)")
    add("--timeout", type=amount, default=600.0, metavar="SECONDS", help="longest time for one variant (default: 600)")
    add("--total-seconds", type=float, default=math.inf, metavar="N", help="then end; what is left is named")
    add_result_options(parser, Path("runs/bench", name))
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; unknown names of shapes and variants end the process like any wrong option."""
    options = parser.parse_args(arguments)
    for name, known in (("shapes", SHAPES), ("variants", VARIANTS)):
        unknown = [value for value in getattr(options, name) if value not in known]
        if unknown:
            parser.error(f"--{name} {','.join(unknown)}: expected some of {', '.join(known)}")
    return options


def missing(order: Order) -> str:
    """Why an order cannot be measured here; empty if it can."""
    variant = VARIANTS[order.variant]
    if order.tp > 1 and variant.engine.startswith("fake"):
        return "left out: needs whole weights, tp=1"
    return f"not installed: {variant.package}" if variant.package and not _is_installed(variant.package) else ""


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _names(text: str) -> list[str]:
    return text.split(",")
