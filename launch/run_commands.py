"""`qsparse train`, `generate` and `evaluate`: check the configuration here, then start `pipeline.*` as processes.

The configuration is loaded before anything is started, so a mistake in it is one message of one process and not the
same traceback from every rank.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.arguments import add_command, add_config_arguments, only_overrides
from launch.local import Rendezvous, inside_torchrun, run_local
from launch.records import record_end
from launch.track_command import tell_end
from pipeline.config import Config
from pipeline.config_loader import load_config
from pipeline.exit_codes import ExitCode
from pipeline.run_directory import RunDirectory
from pipeline.tracking_uri import resolve_uri

NPROC_HELP = "processes on this machine; absent: tp * pp * cp * dp of the configuration"
_TRAIN_EPILOG = """\
Starts tp * pp * cp * dp processes on this machine; inside torchrun it becomes one rank of it.  The same command
resumes a run.  Ctrl-C or SIGTERM: save and stop.

examples:
  qsparse train configs/quickstart.yaml
  qsparse train configs/qsparse.yaml model.qsparse.sparsity=0.5 run.name=half
  qsparse train configs/quickstart.yaml --nproc 4                    (data parallel size 2)
  torchrun --nnodes 2 --nproc-per-node 8 ... -m launch train configs/gpt_7b.yaml parallel.dp=4
"""
_GENERATE_EPILOG = """\
KEY=VALUE replaces what the run's configuration says, such as the place of a dataset that has moved.
Further: --temperature T (default: 0.8; 0 takes the most likely token), --seed N of the draws.

examples:
  qsparse generate runs/quickstart --prompt "def main(" --tokens 64
  qsparse generate runs/quickstart --prompt "def main(" --temperature 0 data.path=/elsewhere/stdlib
"""
_EVALUATE_EPILOG = """\
KEY=VALUE replaces what the run's configuration says, such as the place of a dataset that has moved.

examples:
  qsparse evaluate runs/quickstart
  qsparse evaluate runs/quickstart data.path=/elsewhere/stdlib
"""


def add_run_parsers(commands: Any) -> None:
    """Add the commands that start ranks to the subparsers of `qsparse`."""
    train = add_command(commands, "train", "train or resume the run of a configuration file", _TRAIN_EPILOG)
    add_config_arguments(train)
    train.add_argument("--nproc", type=int, metavar="N", help=NPROC_HELP)
    train.set_defaults(run=_train)
    generate = _add_run_command(commands, "generate", "continue a prompt with the model of a run", _GENERATE_EPILOG)
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="text to continue")
    generate.add_argument("--tokens", type=int, metavar="N", help="tokens to generate")
    generate.set_defaults(run=_generate)
    evaluate = _add_run_command(commands, "evaluate", "held-out loss and measured sparsity of a run", _EVALUATE_EPILOG)
    evaluate.set_defaults(run=_evaluate)


def _add_run_command(commands: Any, name: str, summary: str, epilog: str) -> argparse.ArgumentParser:
    parser = add_command(commands, name, summary, epilog)
    help_text = "directory of the run, e.g. runs/quickstart"
    parser.add_argument("run_directory", type=Path, metavar="RUN_DIR", help=help_text)
    parser.add_argument("--nproc", type=int, metavar="N", help=NPROC_HELP)
    parser.set_defaults(rest=[])
    return parser


def _train(arguments: argparse.Namespace) -> int:
    return train_here(arguments.config, [*arguments.overrides, *arguments.rest], arguments.nproc)


def train_here(
    path: Path, arguments: Sequence[str], num_processes: int | None, rendezvous: Rendezvous | None = None
) -> int:
    """Train the run of a configuration in processes of this machine; returns the exit code.

    Args:
        path: configuration file.
        arguments: overrides.
        num_processes: ranks on this machine; None: all that the configuration asks for.
        rendezvous: the other machines; None: this is the only one.

    Raises:
        ValueError: the configuration is wrong, or does not fit the number of processes.
    """
    overrides = only_overrides(arguments)
    config = load_config(path, overrides)
    if config.tracking.mlflow:
        resolve_uri(config, os.environ)  # says what is wrong with it
    code = _start("pipeline.train", [str(path), *overrides], config, num_processes, rendezvous)
    run = RunDirectory(config.run.root / config.run.name)
    record_end(run, code)
    if code not in (ExitCode.DONE, ExitCode.USER_ERROR) and os.environ.get("SLURM_NODEID", "0") == "0":
        tell_end(run)
    return code


def _generate(arguments: argparse.Namespace) -> int:
    options = ["--prompt", arguments.prompt]
    if arguments.tokens is not None:
        options += ["--tokens", str(arguments.tokens)]
    return _start_on_run("pipeline.generate", [*options, *arguments.rest], arguments)


def _evaluate(arguments: argparse.Namespace) -> int:
    return _start_on_run("pipeline.evaluate", arguments.rest, arguments)


def _start_on_run(module: str, options: Sequence[str], arguments: argparse.Namespace) -> int:
    run = RunDirectory(arguments.run_directory)
    if not run.config.is_file():
        raise ValueError(f"{run.path} is not the directory of a run: it has no {run.config.name}")
    overrides = [option for option in arguments.rest if "=" in option and not option.startswith("-")]
    config = load_config(run.config, overrides)
    return _start(module, [str(run.path), *options], config, arguments.nproc)


def _start(
    module: str,
    options: Sequence[str],
    config: Config,
    num_processes: int | None,
    rendezvous: Rendezvous | None = None,
) -> int:
    if inside_torchrun():
        os.execv(sys.executable, [sys.executable, "-m", module, *options])
    nodes = rendezvous.nnodes if rendezvous else 1
    if num_processes is None:
        num_processes, rest = divmod(config.local_world_size, nodes)
        if rest:
            raise ValueError(f"{config.local_world_size} processes do not divide over {nodes} nodes; give --nproc")
    config.check_world_size(num_processes * nodes)
    return run_local(module, options, config, num_processes, rendezvous)
