"""`qsparse doctor`: what is installed, and what about it will break a run.

Only metadata is read and nothing imported: an installation that is broken enough to need this must not break it too.
"""

import argparse
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.markup import escape

from launch.arguments import add_command

_REQUIRED = ("torch", "megatron-core", "pydantic", "numpy", "tokenizers", "webdataset", "mlflow", "psutil")
_OPTIONAL = ("triton", "transformer-engine")
_OUR_PACKAGES = ("kernels", "launch", "moe", "pipeline", "qsparse_layers")
_MEGATRON_RANGE = ((0, 16, 1), (0, 20))

FindVersion = Callable[[str], str | None]
"""From the name of a distribution to its version, None if it is not installed."""


def add_doctor_parser(commands: Any) -> None:
    """Add `doctor` to the subparsers of `qsparse`."""
    add_command(commands, "doctor", "check the installation and print versions").set_defaults(run=_doctor)


def installed_version(name: str) -> str | None:
    """Version of a distribution, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def find_problems(
    find_version: FindVersion, owners: Mapping[str, Sequence[str]], python: tuple[int, ...] = sys.version_info[:3]
) -> list[str]:
    """What is wrong, each with its cure; empty if nothing is.

    Args:
        find_version: Looks up distributions.
        owners: Distributions by the top-level packages that they install.
        python: Version of the interpreter.
    """
    problems = []
    if python < (3, 11):
        problems.append(f"Python {'.'.join(map(str, python))}: 3.11 or newer is needed")
    for name in _REQUIRED:
        if find_version(name) is None:
            why = "without it megatron-core hangs when it saves a checkpoint; " if name == "psutil" else ""
            problems.append(f"{name} is not installed: {why}run `pip install -c constraints.txt -e .`")
    megatron = find_version("megatron-core")
    if megatron is not None and not _MEGATRON_RANGE[0] <= _numbers(megatron) < _MEGATRON_RANGE[1]:
        problems.append(f"megatron-core {megatron}: >=0.16.1,<0.20 is needed")
    if megatron is not None and _numbers(megatron) >= (0, 17) and find_version("triton") is None:
        problems.append(f"triton is not installed: megatron-core {megatron} imports it; use 0.16.1 or install triton")
    return problems + _name_clashes(owners)


def _name_clashes(owners: Mapping[str, Sequence[str]]) -> list[str]:
    """Other distributions with a package of our name, e.g. Hugging Face's `kernels`: one hides the other."""
    return [
        f"the distribution {other!r} has a top-level package {name!r} as we do: run `pip uninstall {other}`"
        for name in _OUR_PACKAGES
        for other in sorted(set(owners.get(name, ())) - {"qsparse"})
    ]


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdecimal())


def _doctor(_arguments: argparse.Namespace) -> int:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{'python':<20}{platform.python_version()}  {sys.executable}")
    for name in (*_REQUIRED, *_OPTIONAL):
        missing = "[dim]not installed (optional)[/]" if name in _OPTIONAL else "[red]not installed[/]"
        console.print(f"{name:<20}{installed_version(name) or missing}")
    problems = find_problems(installed_version, metadata.packages_distributions())
    for problem in problems:
        console.print(f"[red]problem[/] {escape(problem)}")
    if not problems:
        console.print("[green]no problems found[/]")
    return 1 if problems else 0
