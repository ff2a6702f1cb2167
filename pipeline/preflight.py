"""Checks the nodes of a job before it trains on them: `qsparse preflight` runs this module on every rank.

Two kinds of bad node exist: one that does not even join, and one that joins and is slow, wrong or different.  The first
is found by a register: each rank writes its name into the rendezvous store before anything collective happens, and when
some are missing after `--timeout`, rank 0 names them.  The second is found by measuring (`pipeline.preflight_checks`)
and comparing (`pipeline.preflight_report`).

Exit code 0: passed; 5: failed, and `bad-nodes` in --output names the nodes, one per line, for the batch script.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from pipeline.exit_codes import ExitCode
from pipeline.preflight_checks import measure, node_name
from pipeline.preflight_report import Problem, RankFacts, find_problems, render_report
from pipeline.run_directory import write_atomic


def main() -> int:
    """Check this rank together with the others; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.preflight", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("."), help="folder that all nodes share")
    parser.add_argument("--output", type=Path, help="folder for preflight.json and bad-nodes")
    parser.add_argument("--gpus", type=int, help="GPUs that each node must have")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for a node")
    arguments = parser.parse_args()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    try:
        store = register(rank, size, arguments.timeout)
    except RuntimeError as error:  # torch's DistNetworkError and DistStoreError
        print(f"error: rank {rank} on {node_name()} cannot reach the first node: {error}", file=sys.stderr, flush=True)
        return ExitCode.PREFLIGHT
    if missing := missing_ranks(store, size, arguments.timeout):
        return tell_missing(missing, rank, size, local_size, arguments.output)
    cpu = not torch.cuda.is_available()
    device = torch.device("cpu") if cpu else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if not cpu:
        torch.cuda.set_device(device)
    limit = timedelta(seconds=arguments.timeout)
    dist.init_process_group("gloo" if cpu else "nccl", store=store, rank=rank, world_size=size, timeout=limit)
    try:
        facts = gather(measure(device, arguments.folder))
    finally:
        dist.destroy_process_group()
    problems = find_problems(facts, expected_gpus=arguments.gpus)
    if rank == 0:
        print(render_report(facts, problems), flush=True)
        if arguments.output is not None:
            write_results(arguments.output, facts, problems)
    return ExitCode.PREFLIGHT if problems else ExitCode.DONE


def register(rank: int, size: int, timeout: float) -> Store:
    """The rendezvous store, with this rank's node in it; does not wait for the others as torch's own would."""
    in_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    tcp = TCPStore(
        *(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size),
        is_master=rank == 0 and not in_agent,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
    )
    store = PrefixStore("preflight", tcp)
    store.set(f"node/{rank}", node_name())
    return store


def missing_ranks(store: Store, size: int, timeout: float) -> list[int]:
    """Ranks that have not registered within `timeout` seconds."""
    keys = [f"node/{rank}" for rank in range(size)]
    try:
        store.wait(keys, timedelta(seconds=timeout))
    except RuntimeError:  # torch's DistStoreError
        return [rank for rank, key in enumerate(keys) if not store.check([key])]
    return []


def tell_missing(missing: list[int], rank: int, size: int, local_size: int, output: Path | None) -> int:
    """Name the nodes that did not come; their names are known from SLURM only, else their numbers are told."""
    names = node_names(os.environ, size // local_size)
    problems = [
        Problem(
            names[node], f"{len([r for r in missing if r // local_size == node])} of {local_size} ranks did not come"
        )
        for node in sorted({lost // local_size for lost in missing})
    ]
    if rank == min(set(range(size)) - set(missing)):
        for problem in problems:
            print(f"BAD {problem.node}: {problem.message}", flush=True)
        print(f"preflight failed on {', '.join(problem.node for problem in problems)}", flush=True)
        if output is not None:
            write_results(output, [], problems)
    return ExitCode.PREFLIGHT


def node_names(environ: "os._Environ[str] | dict[str, str]", count: int) -> list[str]:
    """Names of the nodes in the order of their numbers (QSPARSE_NODES, set by the batch script), else `node I`."""
    names = environ.get("QSPARSE_NODES", "").split()
    return names if len(names) == count else [f"node {index}" for index in range(count)]


def gather(mine: RankFacts) -> list[RankFacts]:
    """The facts of all ranks; collective."""
    everyone: list[RankFacts | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [facts for facts in everyone if facts is not None]


def write_results(output: Path, facts: list[RankFacts], problems: list[Problem]) -> None:
    """preflight.json with everything, and bad-nodes with names alone."""
    data = {"ranks": [asdict(fact) for fact in facts], "problems": [asdict(problem) for problem in problems]}
    write_atomic(output / "preflight.json", json.dumps(data, indent=2) + "\n")
    bad = sorted({problem.node for problem in problems})
    write_atomic(output / "bad-nodes", "".join(f"{node}\n" for node in bad))


if __name__ == "__main__":
    sys.exit(main())
