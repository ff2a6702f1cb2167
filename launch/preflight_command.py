"""`qsparse preflight`: check nodes before a run is put on them; on this machine, or on each node of a job.

Under srun it is started once per node (`srun --ntasks-per-node=1 qsparse preflight --nproc 8`) and finds the first node
by itself; without SLURM, `--nnodes`, `--node-rank` and `--rdzv-endpoint` say which node this is.

The ranks are started without torchrun, which would wait for a node that does not come without naming it.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import slurm
from launch.arguments import add_command
from launch.launch_command import add_rendezvous_options, rendezvous_of
from launch.local import Rendezvous, inside_torchrun, rank_environment

_EPILOG = """\
Checked: every node joins; GPU count and memory; matrix products; all-reduce within nodes, between neighbours and over
all; clocks; a shared folder that can be written; equal package versions.  Exit code 5 names the bad nodes.

examples:
  qsparse preflight --nproc 2
  srun --nodes 4 --ntasks-per-node 1 qsparse preflight --nproc 8 --gpus 8 --folder runs
"""
_PORT = 29400


def add_preflight_parser(commands: Any) -> None:
    """Add `preflight` to the subparsers of `qsparse`."""
    summary = "check the nodes of a job: GPUs, network, clocks, disk, versions"
    parser = add_command(commands, "preflight", summary, _EPILOG)
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="ranks per node, one per GPU (default: 1)")
    add_rendezvous_options(parser)
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs each node must have; absent: as most have")
    parser.add_argument("--folder", type=Path, default=Path("."), metavar="DIR", help="a folder that all nodes share")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write preflight.json and bad-nodes there")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="wait for nodes (default: 120 s)")
    parser.set_defaults(run=_preflight)


def _preflight(arguments: argparse.Namespace) -> int:
    if arguments.nproc < 1:
        raise ValueError(f"--nproc {arguments.nproc}: at least one rank per node is needed")
    several = int(os.environ.get("SLURM_NNODES", "1")) > 1 and "SLURM_STEP_ID" in os.environ
    if arguments.rdzv_endpoint is None and several:
        arguments.rdzv_endpoint = f"{slurm.head_node()}:{_PORT}"
    options = ["--folder", str(arguments.folder), "--timeout", str(arguments.timeout)]
    for name in ("output", "gpus"):
        if (value := getattr(arguments, name)) is not None:
            options += [f"--{name}", str(value)]
    if inside_torchrun():
        os.execv(sys.executable, [sys.executable, "-m", "pipeline.preflight", *options])
    return run_ranks(
        options, arguments.nproc, rendezvous_of(arguments) or Rendezvous(1, f"127.0.0.1:{_free_port()}", 0)
    )


def run_ranks(options: Sequence[str], num_processes: int, rendezvous: Rendezvous) -> int:
    """Run this node's ranks of the preflight; returns the largest exit code.

    Raises:
        ValueError: the number of this node is not known.
    """
    if rendezvous.node_rank is None:
        raise ValueError("--node-rank is needed: the number of this node, 0 on the host of --rdzv-endpoint")
    host, _, port = rendezvous.endpoint.rpartition(":")
    shared = {"MASTER_ADDR": host, "MASTER_PORT": port, "LOCAL_WORLD_SIZE": str(num_processes)}
    shared |= {"WORLD_SIZE": str(num_processes * rendezvous.nnodes), **rank_environment(threads=1)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "pipeline.preflight", *options],
            env={**shared, "LOCAL_RANK": str(local), "RANK": str(rendezvous.node_rank * num_processes + local)},
        )
        for local in range(num_processes)
    ]
    codes = [process.wait() for process in processes]
    return max(code if code >= 0 else 128 - code for code in codes)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
