"""What the commands share: how a parser looks, and files and `section.key=value` overrides in any order."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OVERRIDES_HELP = "overrides, e.g. model.num_layers=8 parallel.tp=2; the value is YAML, KEY=null unsets"


def add_command(commands: Any, name: str, summary: str, epilog: str = "") -> argparse.ArgumentParser:
    """The parser of one command, whose help shows `epilog` as it is written."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary[0].upper() + summary[1:] + ".",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """CONFIG and overrides; `main` puts what argparse leaves of the latter into `rest`."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="configuration file (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES_HELP)
    parser.set_defaults(rest=[])


def only_overrides(arguments: Sequence[str]) -> list[str]:
    """The overrides among the arguments behind CONFIG.

    Raises:
        ValueError: An argument is something else.
    """
    files, overrides = split_overrides(arguments)
    if files:
        raise ValueError(f"one CONFIG and overrides of the form KEY=VALUE are expected, got also {str(files[0])!r}")
    return overrides


def split_overrides(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    """(files, overrides): an override has a `=` and is not the name of an existing file.

    Raises:
        ValueError: An argument looks like an option.
    """
    for argument in arguments:
        if argument.startswith("-"):
            raise ValueError(f"unrecognized option {argument!r}; see --help")
    overrides = [argument for argument in arguments if "=" in argument and not Path(argument).exists()]
    return [Path(argument) for argument in arguments if argument not in overrides], overrides
