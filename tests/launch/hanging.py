"""A run of two ranks whose second rank stands still in step 3; started by test_watchdog with torchrun.

Arguments: run directory, and how rank 1 stands still: `sleep` in Python, or `stop` (SIGSTOP of the process).
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.config import WatchdogConfig
from pipeline.run_directory import RunDirectory
from pipeline.watchdog import Watchdog


def stand_still(how: str) -> None:
    if how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(1000)


def main(path: Path, how: str) -> None:
    dist.init_process_group("gloo")
    rank, directory = dist.get_rank(), RunDirectory(path)
    if rank == 0:
        directory.write_status("running", 2, "started")
    settings = WatchdogConfig(step_seconds=2.0, other_seconds=3.0)
    with Watchdog(directory, settings, rank=rank, world_size=2, host=f"n{rank}", start="now") as watchdog:
        for step in range(1, 10):
            watchdog.beat("step", step)
            if rank == 1 and step == 3:
                stand_still(how)
            dist.all_reduce(torch.ones(1))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
