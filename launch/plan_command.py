"""`qsparse plan`: what a run will need and which layout to give it on a cluster; neither torch nor a GPU is needed."""

import argparse
import json
from pathlib import Path
from typing import Any

from launch.arguments import OVERRIDES_HELP, add_command, only_overrides
from pipeline.config_loader import load_config

_EPILOG = """\
Layout keys given as overrides stay as they are, those of the file are one candidate.  Estimates are for bf16 and the
fast kernels.  Exit code 1: nothing fits.  Rates and their sources: pipeline/plan/rates.yaml.

examples:
  qsparse plan configs/gpt_1.3b.yaml --gpus 8
  qsparse plan configs/gpt_7b.yaml --gpus 64 --gpu h200 training.global_batch_size=512
  qsparse plan configs/gpt_7b.yaml --gpus 8 parallel.tp=2 training.recompute=full --json
  qsparse plan --check tests/plan/measured.csv                  estimates against measured runs
"""


def add_plan_parser(commands: Any) -> None:
    """Add `plan` to the subparsers of `qsparse`."""
    parser = add_command(commands, "plan", "estimate memory and step time, propose layouts for a cluster", _EPILOG)
    add = parser.add_argument
    add("config", type=Path, nargs="?", metavar="CONFIG", help="configuration file (YAML)")
    add("overrides", nargs="*", metavar="KEY=VALUE", help=OVERRIDES_HELP)
    add("--gpus", type=int, metavar="N", help="GPUs in all")
    add("--gpu", default="h100", metavar="KIND", help="h100 or h200 (default: h100)")
    add("--gpu-memory", type=float, metavar="GIB", help="memory of a GPU (default: that of the kind)")
    add("--nodes-of", type=int, default=8, metavar="N", help="GPUs that NVLink connects (default: 8)")
    add("--top", type=int, default=4, metavar="N", help="layouts shown (default: 4)")
    add("--json", action="store_true", help="print numbers for programs: bytes and seconds")
    add("--figure", type=Path, metavar="FILE", help="draw memory and time by category as PNG")
    add("--check", type=Path, metavar="CSV", help="compare estimates with the measured runs of a file instead")
    parser.set_defaults(run=_plan, rest=[])


def _plan(arguments: argparse.Namespace) -> int:
    from pipeline.plan import accuracy, report
    from pipeline.plan.rates import load_rates
    from pipeline.plan.search import Cluster, given_keys, search, supported

    if arguments.check:
        print(accuracy.table(accuracy.compare(arguments.check, Path.cwd())))
        return 0
    if arguments.config is None or arguments.gpus is None:
        raise ValueError("name a CONFIG and --gpus N, or --check CSV; see --help")
    if arguments.top < 1:
        raise ValueError(f"--top {arguments.top}: at least 1 is expected")
    overrides = only_overrides([*arguments.overrides, *arguments.rest])
    original, rates = load_config(arguments.config, overrides), load_rates(arguments.gpu)
    memory = rates.memory_gib if arguments.gpu_memory is None else arguments.gpu_memory
    cluster = Cluster(arguments.gpus, arguments.nodes_of, arguments.gpu, rates, memory)
    config = supported(original)
    plan = search(config, given_keys(overrides), cluster, arguments.top)
    if arguments.figure:
        report.draw([*plan.best, *plan.too_large], arguments.figure)
    print(
        json.dumps(report.as_json(plan, config), indent=2)
        if arguments.json
        else report.text(plan, config, original, cluster)
    )
    return 0 if plan.best else 1
