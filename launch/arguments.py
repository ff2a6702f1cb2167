"""Arguments that several commands share: configuration files and `section.key=value` overrides in any order."""

from collections.abc import Sequence
from pathlib import Path

OVERRIDES_HELP = "overrides, e.g. model.num_layers=8 parallel.tp=2; the value is YAML, KEY=null unsets"


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
