"""The `qsparse` command line: one parser, one sub-parser per verb, no torch.

Every sub-parser sets `run`, a function from the parsed arguments to the exit code; `main` only calls it.  Verbs that
need torch or MLflow (train, generate, evaluate, mlflow, track) are started as processes and never imported, so help
and configuration errors come at once, also where neither is installed.  The module that adds a verb owns its options.

Exit codes: 0 success, 1 a problem was found or the started command failed, 2 the user's mistake (told in one message).
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import metadata

from launch.bench_command import add_bench_parser
from launch.compare_command import add_compare_parser
from launch.config_command import add_config_parser
from launch.doctor import add_doctor_parser
from launch.launch_command import add_launch_parser
from launch.mlflow_command import add_mlflow_parser
from launch.plan_command import add_plan_parser
from launch.preflight_command import add_preflight_parser
from launch.report_command import add_report_parser
from launch.run_commands import add_run_parsers
from launch.status_command import add_status_parsers
from launch.track_command import add_track_parser
from pipeline.data.commands import add_data_parser

_EPILOG = """\
examples:
  qsparse data prepare --source stdlib --output data/stdlib
  qsparse train configs/quickstart.yaml training.steps=50
  qsparse generate runs/quickstart --prompt "def main("
  qsparse config diff configs/qsparse.yaml configs/dense.yaml
  qsparse COMMAND --help                                     options and examples of one command
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of `qsparse` with all its commands."""
    parser = argparse.ArgumentParser(
        prog="qsparse",
        description="Pretraining of sparsely activated (Q-Sparse), ternary (BitNet b1.58) language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qsparse {version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_run_parsers(commands)
    add_launch_parser(commands)
    add_status_parsers(commands)
    add_preflight_parser(commands)
    add_config_parser(commands)
    add_plan_parser(commands)
    add_data_parser(commands)
    add_report_parser(commands)
    add_compare_parser(commands)
    add_mlflow_parser(commands)
    add_track_parser(commands)
    add_bench_parser(commands)
    add_doctor_parser(commands)
    return parser


def version() -> str:
    """Version of the installed distribution."""
    try:
        return metadata.version("qsparse")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` absent: the process's own arguments.  Returns the exit code."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse cannot take `CONFIG --nproc 2 key=value` in one go; verbs that want what is left have `rest`.
    if not hasattr(arguments, "rest") and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.rest = rest
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (`| head`) left; without this the interpreter complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("QSPARSE_TRACEBACK"):
            raise
        print(f"qsparse: {error}", file=sys.stderr)
        return 2
