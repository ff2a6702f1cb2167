"""The processes of measured trainings: started ahead, told to go, watched, ended.

Importing torch, megatron-core and Transformer Engine takes longer than many a measurement.  A run's processes therefore
start while those of the run before are measuring; they import, wait for a line on their standard input, and touch no
GPU until it comes.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.bench.train_variants import WORKER, Order

Result = dict[str, Any] | str
"""Numbers, or why there are none."""


def measure_all(
    orders: deque[Order], *, timeout: float, total_seconds: float, tell: Callable[[str], None]
) -> Iterator[tuple[Order, Result]]:
    """Measure one training after the other.

    What fails as a CUDA graph is told and, after the others, measured without one; a larger micro-batch of what worked
    is not.

    Args:
        orders: taken from the left; more may be appended while this runs.
        timeout: seconds for one.
        total_seconds: for all; what is left then gets the reason as its result.
        tell: prints a line.
    """
    end, worked, waiting = time.monotonic() + total_seconds, set(), None
    while orders:
        order = orders.popleft()
        ranks = waiting or _start(order)
        waiting = _start(orders[0]) if orders else None  # imports while this one measures
        seconds = min(timeout, end - time.monotonic())
        result: Result = f"left out: {total_seconds:g} seconds were over"
        if seconds > 0:
            result = ranks.measure(seconds)
        else:
            ranks.close()
        what = order.shape, order.variant, order.dp, order.tp
        if isinstance(result, dict):
            worked.add(what)
        elif result.startswith("failed") and order.cuda_graph and what not in worked and time.monotonic() < end:
            tell(f"{order.name}, CUDA graph: {result}")
            orders.append(order._replace(cuda_graph=False))
            continue
        yield order, result


def _start(order: Order) -> "Ranks":
    return Ranks(WORKER, order._asdict(), order.gpus)


class Ranks:
    """One process per GPU, each started as `python -m MODULE ORDER_JSON RESULT_JSON` (see `train_worker`).

    Args:
        module: the program.
        order: what it is asked to do.
        count: of processes.
    """

    def __init__(self, module: str, order: Mapping[str, Any], count: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="qsparse-bench-")
        self._result, self._errors = Path(self._folder.name, "result.json"), Path(self._folder.name, "errors.txt")
        command = [sys.executable, "-m", module, json.dumps(order), str(self._result)]
        # As `qsparse train` starts its ranks: communication kernels stay ahead of the computation they overlap with.
        defaults = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
        with self._errors.open("w") as stream:
            self._processes = [
                subprocess.Popen(
                    command,
                    env={**defaults, **os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,
                    stdout=stream,
                    stderr=stream,
                    text=True,
                )
                for rank in range(count)
            ]

    def measure(self, timeout: float) -> Result:
        """Let them go."""
        port = _free_port()
        for process in self._processes:
            assert process.stdin is not None
            try:
                process.stdin.write(f"{port}\n")
                process.stdin.flush()
            except BrokenPipeError:  # it has failed already, and has said why
                break
        in_time = self._wait(timeout)
        failure = None if in_time else f"failed: longer than {timeout:.0f} seconds"
        if failure is None and self._result.is_file():
            values: dict[str, Any] = json.loads(self._result.read_text(encoding="utf-8"))
        else:
            failure = failure or _reason(self._errors.read_text(errors="replace"))
        self.close()
        return failure or values

    def close(self) -> None:
        """End what still runs."""
        for process in self._processes:
            process.kill()
            process.wait()
            assert process.stdin is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
        self._folder.cleanup()

    def _wait(self, timeout: float) -> bool:
        """Until all have ended, or one has failed; False if the time is over."""
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in self._processes):
            if any(process.poll() for process in self._processes):
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True


def _reason(errors: str) -> str:
    """The line of a traceback that names the error."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Interrupt"))]
    return f"failed: {(named or lines or ['without a word'])[-1][:200]}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
