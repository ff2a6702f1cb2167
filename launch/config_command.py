"""`qsparse config`: look at configurations without starting anything."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.syntax import Syntax
from rich.table import Table

from launch.arguments import OVERRIDES_HELP, add_command, split_overrides
from pipeline.config_loader import ConfigError, differences, dump_config, json_schema, load_config

_EPILOG = """\
examples:
  qsparse config show configs/quickstart.yaml                   every key with its value
  qsparse config check configs/*.yaml parallel.tp=2             OK, or all errors with their lines
  qsparse config diff configs/quickstart.yaml                   what differs from the defaults
  qsparse config diff configs/qsparse.yaml configs/dense.yaml
  qsparse config schema --output configs/schema.json            completion and checks in editors
"""


def add_config_parser(commands: Any) -> None:
    """Add `config` to the subparsers of `qsparse`."""
    config = add_command(commands, "config", "show, check and compare configuration files", _EPILOG)
    verbs = config.add_subparsers(title="commands", metavar="COMMAND", required=True)
    show = verbs.add_parser("show", help="print the resolved configuration as YAML")
    show.add_argument(
        "arguments", nargs="*", metavar="FILE KEY=VALUE", help=f"one file (absent: the defaults); {OVERRIDES_HELP}"
    )
    show.set_defaults(run=_show)
    check = verbs.add_parser("check", help="validate files; exit code 2 if one is wrong")
    check.add_argument("arguments", nargs="+", metavar="FILE KEY=VALUE", help=f"files; {OVERRIDES_HELP}")
    check.set_defaults(run=_check)
    diff = verbs.add_parser("diff", help="keys in which two files, or a file and the defaults, differ")
    diff.add_argument("first", type=Path, metavar="A", help="configuration file")
    diff.add_argument("second", type=Path, nargs="?", metavar="B", help="configuration file; absent: the defaults")
    diff.set_defaults(run=_diff)
    schema = verbs.add_parser("schema", help="print the JSON schema of configuration files")
    schema.add_argument("--output", type=Path, metavar="FILE", help="write it there instead")
    schema.set_defaults(run=_schema)


def _show(arguments: argparse.Namespace) -> int:
    files, overrides = split_overrides(arguments.arguments)
    if len(files) > 1:
        raise ValueError(f"one file is expected, got {len(files)}: {', '.join(map(str, files))}")
    text = dump_config(load_config(files[0] if files else None, overrides))
    if sys.stdout.isatty():
        Console().print(Syntax(text, "yaml", theme="ansi_dark", background_color="default"))
    else:
        print(text, end="")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    files, overrides = split_overrides(arguments.arguments)
    if not files:
        raise ValueError("no file to check")
    code = 0
    for file in files:
        try:
            config = load_config(file, overrides)
        except ConfigError as error:
            print(f"{file}: {error}", file=sys.stderr)
            code = 2
        else:
            print(f"{file}: OK ({config.local_world_size} processes)")
    return code


def _diff(arguments: argparse.Namespace) -> int:
    base = load_config(arguments.second)
    rows = [
        (key, _show_value(old), _show_value(new)) for key, old, new in differences(load_config(arguments.first), base)
    ]
    if not rows:
        print("no differences")
        return 0
    names = ("key", str(arguments.second or "defaults"), str(arguments.first))
    if not sys.stdout.isatty():
        print("\n".join("\t".join(row) for row in (names, *rows)))
        return 0
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name, style in zip(names, ("cyan", "dim", ""), strict=True):
        table.add_column(name, style=style, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return 0


def _schema(arguments: argparse.Namespace) -> int:
    text = json.dumps(json_schema(), indent=2) + "\n"
    if arguments.output is None:
        print(text, end="")
    else:
        arguments.output.write_text(text, encoding="utf-8")
    return 0


def _show_value(value: Any) -> str:
    return json.dumps(value)
