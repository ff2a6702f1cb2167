"""Real MLflow stores for the tests: runs in scratch folders, what a store holds, a server that can be killed."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.config_loader import dump_config
from pipeline.metrics import MetricsLog
from pipeline.mlflow_run import MLflowRun, RunDescription
from pipeline.mlflow_tracker import MLflowTracker
from pipeline.run_directory import RunDirectory
from pipeline.tracking import describe_run


def make_config(root: Path, name: str = "run", **tracking: Any) -> Config:
    """A configuration with a run in `root`."""
    return Config.model_validate({"run": {"root": str(root), "name": name}, "tracking": tracking})


class Incarnation:
    """One start of a run, as the trainer does it: directory, rewound metrics.jsonl, tracker."""

    def __init__(
        self,
        config: Config,
        *,
        resume_step: int = 0,
        uri: str | None = None,
        flush_s: float = 0.05,
        in_process: bool = True,
    ) -> None:
        """With `uri`: no params and tags, so that little is sent.  `in_process`: spares the start of a process."""
        self.directory = RunDirectory(config.run.root / config.run.name)
        self.directory.create(dump_config(config))
        self.log = MetricsLog(self.directory.metrics)
        self.log.rewind(resume_step)
        description = describe_run(config, {}, {})
        if uri is not None:
            description = RunDescription(uri, "qsparse", config.run.name, {}, {}, config.tracking.parent)
        run = MLflowRun(description, self.directory) if in_process else None
        self.tracker = MLflowTracker(description, self.directory, flush_s=flush_s, run=run)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log as the trainer does: the file first, then the tracker with the file's time."""
        time_ms = self.log.write(metrics, step)
        self.tracker.log(metrics, step, time_ms=time_ms)


def run_id(directory: RunDirectory) -> str:
    """MLflow's id of the run."""
    return directory.mlflow_run_id.read_text().strip()


def fetch_run(uri: str, directory: RunDirectory) -> Any:
    """The run as the store has it."""
    import mlflow

    return mlflow.MlflowClient(uri).get_run(run_id(directory))


def history(uri: str, directory: RunDirectory, name: str) -> list[tuple[int, float]]:
    """(step, value) of every point of one metric, sorted; duplicates stay."""
    import mlflow

    return sorted((m.step, m.value) for m in mlflow.MlflowClient(uri).get_metric_history(run_id(directory), name))


class Server:
    """`mlflow server` over an SQLite file on a free port of 127.0.0.1; `kill` leaves it no time to finish anything."""

    def __init__(self, folder: Path) -> None:
        self.port = _quiet_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.store = f"sqlite:///{folder / 'server.db'}"
        self.artifacts = folder / "artifacts"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, timeout_s: float = 120.0) -> None:
        """Start and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += [
            "--backend-store-uri",
            self.store,
            "--artifacts-destination",
            str(self.artifacts),
            "--workers",
            "1",
        ]
        jobs = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # eight processes that evaluate language models
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", **jobs}
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=2).close()
                return
            except (urllib.error.URLError, OSError):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    code = self._process.poll()
                    self.kill()
                    raise AssertionError(f"no answer from mlflow server, exit code {code}") from None
                time.sleep(0.2)

    @property
    def is_running(self) -> bool:
        """Whether it was started and not killed."""
        return self._process is not None

    def kill(self) -> None:
        """SIGKILL the server and its workers; does nothing if it is not running."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None


def _quiet_port() -> int:
    """A port that nobody listens on now nor gets by asking for any: it stays free while a server starts, or is away."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)  # below Linux's ip_local_port_range
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


class Proxy:
    """A TCP proxy in front of a server that is slow, or loses replies after the server has acted.

    Args:
        port: Port of the server.
        delay_s: Seconds that every request waits.
        lose: Numbers of the replies that are lost, counted from 1.
    """

    def __init__(self, port: int, *, delay_s: float = 0.0, lose: Collection[int] = ()) -> None:
        self._upstream, self._delay_s, self._lose = port, delay_s, lose
        self.lost = self._replies = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._upstream))
                threading.Thread(target=self._requests, args=(client, server), daemon=True).start()
                threading.Thread(target=self._answer, args=(server, client), daemon=True).start()

    def _requests(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(1 << 16):
                time.sleep(self._delay_s)
                server.sendall(data)
            server.shutdown(socket.SHUT_WR)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError), client, server:
            while data := server.recv(1 << 16):
                self._replies += data.startswith(b"HTTP/")
                if data.startswith(b"HTTP/") and self._replies in self._lose:
                    self.lost += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)


def wait_until(condition: Any, timeout_s: float, what: str) -> None:
    """Poll `condition` until it is true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s"
        time.sleep(0.05)
