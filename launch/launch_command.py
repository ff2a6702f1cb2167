"""`qsparse launch`: the same run through SLURM, through torchrun on several machines, or on this one.

qsparse launch slurm CONFIG --nodes 2          a batch job, which starts on each of its nodes
qsparse launch torchrun CONFIG --nnodes 2 ...  the ranks of one node, which finds the others; also for use by hand
qsparse launch local CONFIG                    all ranks on this machine; the same as `qsparse train`
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from launch.arguments import add_command, add_config_arguments, only_overrides
from launch.cluster import ClusterProfile, load_profile
from launch.local import Rendezvous
from launch.run_commands import NPROC_HELP, train_here
from launch.slurm_script import describe_command
from launch.submission import Request, Submission, prepare, submit

_EPILOG = """\
The same CONFIG and overrides give the same losses however a run is launched; the same command resumes it.

examples:
  qsparse launch local configs/quickstart.yaml
  qsparse launch slurm configs/gpt_1.3b.yaml parallel.dp=16 --cluster modules --nodes 2 --dry-run
  qsparse launch torchrun configs/gpt_1.3b.yaml parallel.dp=16 --nnodes 2 --node-rank 0 --rdzv-endpoint n1:29500
"""
_LOCAL_EPILOG = """\
examples:
  qsparse launch local configs/quickstart.yaml
  qsparse launch local configs/quickstart.yaml parallel.tp=2 --nproc 4      (data parallel size 2)
"""
_TORCHRUN_EPILOG = """\
Run it on every node, with the same CONFIG and overrides; only --node-rank differs.  Ctrl-C or SIGTERM on each node:
save and stop.

examples:
  qsparse launch torchrun configs/gpt_1.3b.yaml parallel.dp=16 --nnodes 2 --node-rank 0 --rdzv-endpoint n1:29500
  qsparse launch torchrun configs/gpt_1.3b.yaml parallel.dp=16 --nnodes 2 --node-rank 1 --rdzv-endpoint n1:29500
"""
_SLURM_EPILOG = """\
Checks the layout against the nodes, asks SLURM whether the job could start, and queues it.  The job saves before its
time limit and when it is preempted, is requeued and goes on; it starts again after failures, up to --max-restarts
times without a new checkpoint.  Profiles and their keys: docs/launch.md.

examples:
  qsparse launch slurm configs/gpt_1.3b.yaml parallel.dp=16 --cluster modules --nodes 2 --dry-run
  qsparse launch slurm configs/gpt_1.3b.yaml --cluster my-site.yaml --nodes 4 --min-nodes 2 --preflight
  qsparse launch slurm configs/qsparse.yaml --cluster cpu --sweep model.qsparse.sparsity=0.0,0.4,0.6 --array-limit 2
  qsparse status RUN      qsparse logs RUN --follow      qsparse cancel RUN
"""
_PROFILE_OPTIONS = ("account", "partition", "qos", "constraint", "reservation", "time")


def add_launch_parser(commands: Any) -> None:
    """Add `launch` to the subparsers of `qsparse`."""
    launch = add_command(commands, "launch", "start a run through SLURM, torchrun or on this machine", _EPILOG)
    verbs = launch.add_subparsers(title="commands", metavar="COMMAND", required=True)
    local = add_command(verbs, "local", "all ranks on this machine, as `qsparse train`", _LOCAL_EPILOG)
    add_config_arguments(local)
    local.add_argument("--nproc", type=int, metavar="N", help=NPROC_HELP)
    local.set_defaults(run=_local)
    _add_torchrun(add_command(verbs, "torchrun", "the ranks of one node of several, without SLURM", _TORCHRUN_EPILOG))
    _add_slurm(add_command(verbs, "slurm", "queue a batch job on a SLURM cluster", _SLURM_EPILOG))


def _add_torchrun(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="processes of this node; absent: an equal share of all")
    add_rendezvous_options(parser)
    parser.set_defaults(run=_torchrun)


def add_rendezvous_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how the nodes of a job find each other."""
    parser.add_argument("--nnodes", type=int, metavar="N", help="nodes; absent: SLURM_NNODES, else 1")
    parser.add_argument(
        "--node-rank", type=int, metavar="I", help="number of this node; absent: SLURM_NODEID, else torchrun assigns it"
    )
    parser.add_argument("--rdzv-endpoint", metavar="HOST:PORT", help="the first node, and a free port of it")


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default: 1)")
    parser.add_argument("--min-nodes", type=int, metavar="N", help="start with as few if there are no more")
    parser.add_argument(
        "--cluster", metavar="NAME|FILE", help="profile in configs/clusters, or a file; absent: $QSPARSE_CLUSTER"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")
    parser.add_argument("--dependency", default="", metavar="LIST", help="as sbatch's, e.g. afterok:123")
    parser.add_argument("--template", type=Path, metavar="FILE", help="jinja2 template instead of our batch script")
    profile = parser.add_argument_group("instead of keys of the profile")
    for option in _PROFILE_OPTIONS:
        profile.add_argument(f"--{option}", metavar="VALUE")
    profile.add_argument("--max-restarts", type=int, metavar="N", help="after failures without a new checkpoint")
    profile.add_argument("--preflight", action="store_true", default=None, help="check the nodes before each start")
    profile.add_argument("--forward", action="append", metavar="NAME", help="a further variable; repeatable")
    sweep = parser.add_argument_group("several runs")
    sweep.add_argument(
        "--sweep", action="append", default=[], metavar="KEY=A,B", help="one run per value; repeated: all combinations"
    )
    sweep.add_argument("--array-limit", type=int, metavar="N", help="runs of a sweep at the same time")
    parser.set_defaults(run=_slurm)


def rendezvous_of(arguments: argparse.Namespace) -> Rendezvous | None:
    """The rendezvous that options and SLURM's variables describe; None for a single node without an endpoint.

    Raises:
        ValueError: several nodes and no endpoint.
    """
    in_step = "SLURM_STEP_ID" in os.environ
    nnodes = arguments.nnodes or (int(os.environ.get("SLURM_NNODES", "1")) if in_step else 1)
    node_rank = arguments.node_rank
    if node_rank is None and in_step:
        node_rank = int(os.environ["SLURM_NODEID"])
    if arguments.rdzv_endpoint is None:
        if nnodes > 1:
            raise ValueError(f"--nnodes {nnodes} needs --rdzv-endpoint HOST:PORT: where the nodes find each other")
        return None
    rendezvous = Rendezvous(nnodes, arguments.rdzv_endpoint, node_rank)
    rendezvous.options()  # says what is wrong with it
    return rendezvous


def _local(arguments: argparse.Namespace) -> int:
    return train_here(arguments.config, [*arguments.overrides, *arguments.rest], arguments.nproc)


def _torchrun(arguments: argparse.Namespace) -> int:
    overrides = [*arguments.overrides, *arguments.rest]
    return train_here(arguments.config, overrides, arguments.nproc, rendezvous_of(arguments))


def _slurm(arguments: argparse.Namespace) -> int:
    if arguments.array_limit is not None and (arguments.array_limit < 1 or not arguments.sweep):
        raise ValueError(f"--array-limit {arguments.array_limit}: at least 1 is expected, together with --sweep")
    request = Request(
        config=arguments.config,
        overrides=only_overrides([*arguments.overrides, *arguments.rest]),
        nodes=arguments.nodes,
        min_nodes=arguments.min_nodes,
        sweeps=arguments.sweep,
        template=arguments.template,
        dependency=arguments.dependency,
        array_limit=arguments.array_limit,
        command=describe_command(sys.argv[1:]),
    )
    submission = prepare(request, _profile(arguments))
    for note in submission.notes:
        print(f"note: {note}", file=sys.stderr)
    if arguments.dry_run:
        print(submission.text, end="")
        return 0
    _tell(submission, submit(submission))
    return 0


def _profile(arguments: argparse.Namespace) -> ClusterProfile:
    options = {option: getattr(arguments, option) for option in (*_PROFILE_OPTIONS, "max_restarts", "preflight")}
    name = arguments.cluster or os.environ.get("QSPARSE_CLUSTER")
    profile = load_profile(name, options)
    if arguments.forward:
        return load_profile(name, {**options, "forward": [*profile.forward, *arguments.forward]})
    return profile


def _tell(submission: Submission, job_id: str) -> None:
    job = submission.job
    where = job.folder.parent
    size = f"{job.allocation.slurm_nodes} nodes of {job.ranks_per_node} ranks"
    print(f"job {job_id}: {size}" + (f", {len(job.runs)} runs" if len(job.runs) > 1 else ""))
    for run in job.runs:
        print(f"run directory {run}")
    if job.forwarded:
        print(f"forwarded variables {', '.join(job.forwarded)}")
    print(f"script {job.script}\nqsparse status {where}")
