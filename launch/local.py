"""Starts the ranks of this machine through torchrun, and lets them save when the user says stop.

    python -m pipeline.torchrun --standalone --nproc-per-node N --module MODULE ARGUMENTS...

`pipeline.torchrun` is torchrun with the exit code of the rank that failed.  One process goes through it as well, so
there is one code path; with a `Rendezvous` the machine is one node of several, under SLURM or by hand.  torchrun's own
answer to a signal is to end its workers and then itself with a traceback and exit code 1, even if every worker saved
and left in order.  So the first stop signal goes past it: SIGTERM to each worker, which saves and exits 0, whereupon
torchrun exits 0 as well.  A second signal goes to torchrun.  The price is that the workers must be found among
torchrun's children.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from pipeline.config import Config

if TYPE_CHECKING:
    import psutil

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Each of them, sent to `qsparse train`, means: save and stop."""

SHUTDOWN_TIMEOUT_S = 600
"""Seconds that torchrun gives its workers to save after a second signal; its default of 30 s loses large models."""

RANK_DEFAULTS = {
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_S),  # ignored by torch versions that lack it
    # One hardware queue keeps megatron-core's communication kernels ahead of the computation they overlap with.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # The last collectives of each rank, by which the watchdog names the one that a hung run waits in.
    "TORCH_FR_BUFFER_SIZE": "2000",
}
"""Variables of the ranks unless the user set them."""


@dataclass(frozen=True)
class Rendezvous:
    """How the nodes of a job find each other.

    Attributes:
        nnodes: number of nodes.
        endpoint: HOST:PORT of the first node.
        node_rank: number of this node, 0 on the host of `endpoint`.  None: torchrun's c10d rendezvous numbers the
            nodes, which works only where the host's name in `endpoint` is the name it gives itself.
        job: name that all nodes of the job, and no other job, use.
    """

    nnodes: int
    endpoint: str
    node_rank: int | None = None
    job: str = "qsparse"

    def options(self) -> list[str]:
        """Options of torchrun.

        Raises:
            ValueError: the endpoint is not HOST:PORT, or the node's number is not below the number of nodes.
        """
        host, _, port = self.endpoint.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"--rdzv-endpoint {self.endpoint}: HOST:PORT of the first node is expected, e.g. n1:29500")
        if self.node_rank is None:
            store = ["--rdzv-backend=c10d", f"--rdzv-endpoint={self.endpoint}", f"--rdzv-id={self.job}"]
            return [f"--nnodes={self.nnodes}", *store]
        if not 0 <= self.node_rank < self.nnodes:
            raise ValueError(f"--node-rank {self.node_rank} must be between 0 and --nnodes {self.nnodes} - 1")
        address = [f"--master-addr={host}", f"--master-port={port}"]
        return [f"--nnodes={self.nnodes}", f"--node-rank={self.node_rank}", *address]


def inside_torchrun(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher already made this process one of several ranks."""
    return "RANK" in environ and "WORLD_SIZE" in environ


def torchrun_command(
    module: str, arguments: Sequence[str], num_processes: int, rendezvous: Rendezvous | None = None
) -> list[str]:
    """Command line that runs `python -m MODULE ARGUMENTS` as `num_processes` ranks on this machine."""
    nodes = ["--standalone"] if rendezvous is None else rendezvous.options()
    torchrun = [sys.executable, "-m", "pipeline.torchrun", *nodes]
    return [*torchrun, f"--nproc-per-node={num_processes}", "--module", module, *arguments]


def rank_environment(threads: int, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment of the ranks: `environ`, and what has to be set before torch is imported."""
    return {**RANK_DEFAULTS, **environ, "OMP_NUM_THREADS": str(threads)}


def run_local(
    module: str, arguments: Sequence[str], config: Config, num_processes: int, rendezvous: Rendezvous | None = None
) -> int:
    """Run `module` as `num_processes` ranks of this machine until they end; returns torchrun's exit code."""
    command = torchrun_command(module, arguments, num_processes, rendezvous)
    return run_until_done(command, rank_environment(config.run.threads))


def run_until_done(command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run a launcher; on the first stop signal ask its children to stop, on the next ones itself.

    Returns:
        The launcher's exit code, 128 + n if signal n ended it.
    """
    received: list[int] = []
    launchers: list[subprocess.Popen[bytes]] = []

    def stop(signum: int, _frame: FrameType | None) -> None:
        received.append(signum)
        for launcher in launchers:
            _ask_to_stop(launcher, first=len(received) == 1)

    # Handlers first: a signal between the start and their installation would leave the launcher behind.
    previous = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        # A process group of its own keeps the terminal's Ctrl-C from torchrun, which would kill the workers.
        launchers.append(subprocess.Popen(command, env=dict(environ), process_group=0))
        if received:
            _ask_to_stop(launchers[0], first=True)
        code = launchers[0].wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


def _ask_to_stop(launcher: subprocess.Popen[bytes], *, first: bool) -> None:
    workers = _children(launcher.pid) if first else []
    if not workers:
        launcher.terminate()
        return
    print("qsparse: asked the workers to save and stop; a second signal ends them", file=sys.stderr, flush=True)
    for worker in workers:
        worker.terminate()


def _children(pid: int) -> "list[psutil.Process]":
    # Imported here: the commands that start no process, `qsparse doctor` above all, work without it.
    import psutil

    try:
        return [child for child in psutil.Process(pid).children() if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []
