"""What tracking costs a training loop: `python benchmarks/tracking_overhead.py [--server]` (Linux).

A step is `--step-ms` of the training thread's own CPU time in short calls that release Python's lock, as eager torch
does; every `--log-interval` steps follow a record of `--metrics` numbers and a sample of system metrics.  Loops with
and without tracking alternate.  Wall time would measure what else the machine does, so the kernel is asked how the
thread spent it (/proc/self/task/*/schedstat): on a core, waiting for one, or else blocked, by a file or by Python's
lock while another thread holds it.  The cost of tracking is the CPU time of its calls and all time blocked, less what
the loop without tracking is blocked.  Run directory and store are in a temporary folder.
"""

import argparse
import hashlib
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import psutil

from pipeline.config import Config
from pipeline.config_loader import dump_config
from pipeline.environment import git_commit
from pipeline.metrics import MetricsLog
from pipeline.run_directory import RunDirectory
from pipeline.system_metrics import SystemMetrics
from pipeline.tracking import Tracker, make_tracker

CHUNK = bytes(1 << 15)  # some 20 to 100 us of hashing, without Python's lock


@dataclass(frozen=True)
class Spent:
    """How this thread spent its time so far; seconds."""

    wall: float
    cpu: float
    queued: float

    @classmethod
    def now(cls) -> Self:
        """Until now."""
        text = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat").read_text()
        cpu, queued, _ = (int(word) / 1e9 for word in text.split())
        return cls(time.perf_counter(), cpu, queued)

    def since(self, begin: "Spent") -> tuple[float, float]:
        """(on a core, blocked) seconds since `begin`."""
        cpu, queued = self.cpu - begin.cpu, self.queued - begin.queued
        return cpu, max(0.0, self.wall - begin.wall - cpu - queued)


@dataclass
class Loops:
    """Measurements of all loops of a kind."""

    steps: int = 0
    blocked: float = 0.0
    calls: list[float] = field(default_factory=list)
    """CPU and blocked seconds within each record's calls."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="steps of a loop")
    parser.add_argument("--rounds", type=int, default=6, help="loops of each kind")
    parser.add_argument("--log-interval", type=int, default=10, help="steps between records (tracking.log_interval)")
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--metrics", type=int, default=120, help="numbers of a record (48 layers have about 400)")
    parser.add_argument("--server", action="store_true", help="an MLflow server instead of SQLite")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tracking-overhead-") as folder:
        server, uri = _start_server(Path(folder)) if arguments.server else (None, None)
        try:
            _measure(Path(folder), uri, arguments)
        finally:
            if server is not None:
                server.terminate()
                server.wait()


def _measure(root: Path, uri: str | None, arguments: argparse.Namespace) -> None:
    config = Config.model_validate({"run": {"root": str(root), "name": "tracked"}, "tracking": {"uri": uri}})
    directory = RunDirectory(root / "tracked")
    directory.create(dump_config(config))
    log, system = MetricsLog(directory.metrics), SystemMetrics(root)
    tracker = make_tracker(config, directory, environment={})
    tracker.wait_ready()
    time.sleep(5.0)  # the run is made, its configuration uploaded
    tracked, plain = Loops(), Loops()
    others = 0.0
    for _ in range(arguments.rounds):
        before = _cpu_of_others()
        _loop(tracked, arguments, (log, system, tracker))
        time.sleep(3.0)  # what is still queued must not burden the loop without tracking
        others += _cpu_of_others() - before
        _loop(plain, arguments, None)
    undelivered = tracker.close()
    _report(tracked, plain, others, arguments)
    print(f"undelivered {undelivered}; commit {git_commit()}, Python {platform.python_version()}")


def _report(tracked: Loops, plain: Loops, others: float, arguments: argparse.Namespace) -> None:
    per_step = sum(tracked.calls) / tracked.steps
    blocked, blocked_plain = tracked.blocked / tracked.steps, plain.blocked / plain.steps
    cost = per_step + blocked - blocked_plain
    store = "server" if arguments.server else "SQLite"
    print(f"{store}, {arguments.metrics} numbers every {arguments.log_interval} steps; {tracked.steps} steps each")
    quantile = statistics.quantiles(tracked.calls, n=100)[98]
    print(f"calls    median {1e3 * statistics.median(tracked.calls):.3f} ms, 99 % {1e3 * quantile:.3f} ms per record")
    print(f"blocked  {1e3 * blocked:.3f} ms per step outside of the calls, {1e3 * blocked_plain:.3f} without tracking")
    print(f"cost     {1e3 * cost:.3f} ms per step of {arguments.step_ms:g} ms: {1e3 * cost / arguments.step_ms:.2%}")
    print(f"beside   {1e3 * others / tracked.steps:.3f} ms CPU per step in other threads and processes of the trainer")


def _loop(
    loops: Loops, arguments: argparse.Namespace, tracking: tuple[MetricsLog, SystemMetrics, Tracker] | None
) -> None:
    for step in range(loops.steps + 1, loops.steps + arguments.steps + 1):
        begin = Spent.now()
        while Spent.now().cpu - begin.cpu < arguments.step_ms / 1e3:
            for _ in range(20):
                hashlib.sha256(CHUNK)
        loops.blocked += Spent.now().since(begin)[1]
        if tracking is not None and step % arguments.log_interval == 0:
            log, system, tracker = tracking
            begin = Spent.now()
            record = {f"layer_sparsity/layer.{i}": 1.0 / (step + i) for i in range(arguments.metrics)}
            record |= system.sample()
            tracker.log(record, step, time_ms=log.write(record, step))
            loops.calls.append(sum(Spent.now().since(begin)))
    loops.steps += arguments.steps


def _cpu_of_others() -> float:
    """CPU seconds of all but this thread, and of children."""
    process = psutil.Process()
    times = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
    return sum(found.user + found.system for found in times) - time.thread_time()


def _start_server(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2).close()
            return server, address
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"{' '.join(command)} ended with exit code {server.returncode}")


if __name__ == "__main__":
    main()
