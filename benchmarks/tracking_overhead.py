"""What tracking costs a training loop: `python benchmarks/tracking_overhead.py [--server]`.

A step is `--step-ms` of matrix products (numpy, which releases Python's lock as torch does); every `--log-interval`
steps follow a record of `--metrics` numbers and a sample of system metrics.  Loops with and without tracking alternate.
Reported are what the loop waits for in the calls themselves, and the difference of the mean step times, which also
holds what the writer thread takes away from the loop.  Run directory and store are in a temporary folder.
"""

import argparse
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pipeline.config import Config
from pipeline.config_loader import dump_config
from pipeline.environment import git_commit
from pipeline.metrics import MetricsLog
from pipeline.run_directory import RunDirectory
from pipeline.system_metrics import SystemMetrics
from pipeline.tracking import NullTracker, Tracker, make_tracker


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
    products = _products_for(arguments.step_ms)
    config = Config.model_validate({"run": {"root": str(root), "name": "tracked"}, "tracking": {"uri": uri}})
    directory = RunDirectory(root / "tracked")
    directory.create(dump_config(config))
    log, system = MetricsLog(directory.metrics), SystemMetrics(root)
    tracker = make_tracker(config, directory, environment={})
    tracker.wait_ready()
    steps: dict[str, list[float]] = {"tracked": [], "plain": []}
    calls: list[float] = []
    first = 1
    for _ in range(arguments.rounds):
        times, waits = _loop(first, arguments, products, log, system, tracker)
        steps["tracked"] += times
        calls += waits
        first += arguments.steps
        time.sleep(3.0)  # what is still queued must not burden the loop without tracking
        steps["plain"] += _loop(0, arguments, products, None, None, NullTracker())[0]
    undelivered = tracker.close()
    tracked, plain = statistics.fmean(steps["tracked"]), statistics.fmean(steps["plain"])
    store = "server" if arguments.server else "SQLite"
    print(
        f"{store}, {arguments.metrics} numbers every {arguments.log_interval} steps, {len(steps['plain'])} steps each"
    )
    print(f"calls       median {1e3 * statistics.median(calls):.3f} ms, 99 % {1e3 * np.quantile(calls, 0.99):.3f} ms")
    print(f"step        mean {1e3 * plain:.2f} ms plain, {1e3 * tracked:.2f} ms tracked: {tracked / plain - 1:+.2%}")
    print(f"undelivered {undelivered}; commit {git_commit()}, Python {platform.python_version()}")


def _loop(
    first: int,
    arguments: argparse.Namespace,
    products: int,
    log: MetricsLog | None,
    system: SystemMetrics | None,
    tracker: Tracker,
) -> tuple[list[float], list[float]]:
    matrix = np.ones((256, 256), dtype=np.float32)
    steps, calls = [], []
    for step in range(first, first + arguments.steps):
        begun = time.perf_counter()
        for _ in range(products):
            matrix @ matrix
        if log is not None and system is not None and step % arguments.log_interval == 0:
            called = time.perf_counter()
            record = {f"layer_sparsity/layer.{i}": 1.0 / (step + i) for i in range(arguments.metrics)}
            record |= system.sample()
            tracker.log(record, step, time_ms=log.write(record, step))
            calls.append(time.perf_counter() - called)
        steps.append(time.perf_counter() - begun)
    return steps, calls


def _products_for(milliseconds: float) -> int:
    matrix = np.ones((256, 256), dtype=np.float32)
    begun = time.perf_counter()
    for _ in range(500):
        matrix @ matrix
    return max(1, round(500 * milliseconds / 1e3 / (time.perf_counter() - begun)))


def _start_server(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return server, f"http://127.0.0.1:{port}"


if __name__ == "__main__":
    main()
