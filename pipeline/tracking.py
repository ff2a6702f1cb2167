"""MLflow tracking that never waits and never fails on the training thread.

`log` appends to a queue and returns; one daemon thread on rank 0 imports mlflow, batches the queue into `log_batch`
calls and retries with exponential back-off while the store is away.  metrics.jsonl is written before `log` is
called and stays the truth: at a start the thread brings the store up to date with that file, and `replay` does so
for a run that has ended.

The obvious way, `mlflow.log_metrics` in the loop, costs tens of milliseconds a step, blocks for minutes when the
server is down and then raises into training; its asynchronous mode drops what it could not send.  The price of the
queue is that the UI lags by a few seconds, and that a process killed outright leaves its run RUNNING until it is
resumed or `replay` is called.
"""

import atexit
import importlib.util
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from pipeline.config import Config
from pipeline.config_loader import differences, load_config
from pipeline.metrics import read_metrics
from pipeline.mlflow_run import BATCH, STORE_NAME, EndStatus, MLflowRun, Point, RejectedError, RunDescription, points_of
from pipeline.run_directory import RunDirectory

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 60.0
CLOSE_TIMEOUT_SECONDS = 20.0
MAX_QUEUED_RECORDS = 20_000
STATUS_OF_STATE: dict[str, EndStatus] = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class Tracker(Protocol):
    """Where the training loop sends its numbers; no method raises or waits except as documented."""

    @property
    def location(self) -> str:
        """How a person gets to see the run: a command or an address; empty without tracking."""
        ...

    def wait_ready(self, timeout_s: float = 60.0) -> bool:
        """Wait for the one-time set-up, so that it does not compete with the first steps; False on time-out."""
        ...

    def log(self, metrics: Mapping[str, float], step: int, *, time_ms: int | None = None) -> None:
        """Queue one record; `time_ms` is what `MetricsLog.write` returned for it."""
        ...

    def upload(self) -> None:
        """Have configuration, environment, figures and samples uploaded soon."""
        ...

    def close(self, status: EndStatus = "FINISHED") -> int:
        """Deliver the rest and end the run; returns the number of values that could not be delivered."""
        ...


class NullTracker:
    """Tracking switched off, and every rank but 0."""

    location = ""

    def wait_ready(self, timeout_s: float = 60.0) -> bool:
        """Nothing to wait for."""
        return True

    def log(self, metrics: Mapping[str, float], step: int, *, time_ms: int | None = None) -> None:
        """Dropped: metrics.jsonl has it."""

    def upload(self) -> None:
        """Nothing to upload to."""

    def close(self, status: EndStatus = "FINISHED") -> int:
        """Nothing is undelivered."""
        return 0


class MLflowTracker:
    """Non-blocking writer of one MLflow run.

    Construct it after `MetricsLog.rewind`: the records then in metrics.jsonl that the store lacks are delivered
    first.  Use it as a context manager or call `close`; an exception, or an exit without `close`, ends the run FAILED
    (KeyboardInterrupt: KILLED).

    Args:
        uri: Tracking URI, see `resolve_uri`.
        experiment: Experiment name.
        run_name: Name of a newly created run.
        directory: Holds metrics.jsonl, the run id and the files to upload.
        params: Logged once when the run is created.
        tags: Set at every start.
        flush_s: Seconds between deliveries.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        directory: RunDirectory,
        params: Mapping[str, str],
        tags: Mapping[str, str],
        *,
        flush_s: float = FLUSH_SECONDS,
    ) -> None:
        description = RunDescription(uri, experiment, run_name, dict(params), dict(tags))
        self._uri, self._directory, self._flush_s = uri, directory, flush_s
        self._viewer = description.viewer
        self._run = MLflowRun(description, directory)
        backlog = read_metrics(directory.metrics) if directory.metrics.exists() else []
        self._records: deque[dict[str, Any]] = deque(backlog)
        self._max_records = len(backlog) + MAX_QUEUED_RECORDS
        self._points: list[Point] = []
        self._lost = 0
        self._nonfinite = 0
        self._failures = 0
        self._upload_wanted = threading.Event()
        self._ready = threading.Event()
        self._closing = threading.Event()
        self._closed = False
        self._status: EndStatus = "FAILED"
        self._deadline = 0.0
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._work, name="mlflow-writer", daemon=True)
        self._thread.start()
        atexit.register(self.close, "FAILED")

    @property
    def location(self) -> str:
        """The run's page on a server, else the command that opens the SQLite store."""
        return self._viewer or _without_password(self._run.url or self._uri)

    @property
    def undelivered(self) -> int:
        """Values logged and not yet in the store, including those given up."""
        return self._lost + len(self._points) + sum(len(record) - 2 for record in list(self._records))

    @property
    def nonfinite(self) -> int:
        """Values left out so far because they are nan or infinite."""
        return self._nonfinite

    def wait_ready(self, timeout_s: float = 60.0) -> bool:
        """Wait until mlflow is imported and an SQLite store has its schema; a server is not waited for."""
        return self._ready.wait(timeout_s)

    def log(self, metrics: Mapping[str, float], step: int, *, time_ms: int | None = None) -> None:
        """Queue one record.

        Args:
            metrics: Name to value; names are made acceptable to MLflow, non-finite values are counted, not sent.
            step: Optimizer steps done; steps that the store already has under the same name are skipped.
            time_ms: The record's time in metrics.jsonl; absent: now.
        """
        now = time.time_ns() // 1_000_000 if time_ms is None else time_ms
        if len(self._records) >= self._max_records:
            self._lost += len(self._records.popleft()) - 2  # bounded memory; `replay` finds it in metrics.jsonl
        self._records.append({**metrics, "step": step, "time_ms": now})

    def upload(self) -> None:
        """Have the run's files uploaded with the next delivery."""
        self._upload_wanted.set()

    def close(self, status: EndStatus = "FINISHED", *, timeout_s: float = CLOSE_TIMEOUT_SECONDS) -> int:
        """Deliver the rest, upload the files and end the run; a second call does nothing.

        Args:
            status: FINISHED, KILLED (stopped for a requeue) or FAILED.
            timeout_s: Give up after so many seconds.

        Returns:
            The number of values that did not reach the store.  They are in metrics.jsonl.
        """
        if self._closed or os.getpid() != self._pid:  # a forked child inherits the exit hook but not the thread
            return 0
        self._closed = True
        atexit.unregister(self.close)
        self._status, self._deadline = status, time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        if self.undelivered or self._thread.is_alive() or self._failures:
            logger.warning(
                "MLflow at %s is incomplete: %d values and perhaps the end status are missing; they are in %s, and "
                "`qsparse track sync %s` delivers them",
                *(_without_password(self._uri), self.undelivered, self._directory.metrics, self._directory.path),
            )
        return self.undelivered

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _work(self) -> None:
        try:
            self._run.prepare()
        except Exception as error:
            self._note_failure(error)
        self._ready.set()
        delay = self._flush_s
        while True:
            closing = self._closing.is_set()
            delivered = self._attempt(closing)
            if closing and (delivered or time.monotonic() >= self._deadline):
                return
            delay = self._flush_s if delivered else min(MAX_BACKOFF_SECONDS, 2 * delay)
            if closing:
                time.sleep(min(1.0, self._flush_s))
            else:
                self._closing.wait(delay)

    def _attempt(self, closing: bool) -> bool:
        try:
            self._run.connect()
            self._deliver()
            if self._upload_wanted.is_set() or closing:
                self._upload_wanted.clear()
                self._upload()
            if closing:
                self._run.finish(self._status)
        except Exception as error:
            self._note_failure(error)
            return False
        if self._failures:
            logger.warning("MLflow at %s answers again", _without_password(self._uri))
            self._failures = 0
        return True

    def _deliver(self) -> None:
        while self._records or self._points:
            while self._records and len(self._points) < BATCH:
                points, nonfinite = points_of(self._records.popleft())
                self._points += points
                self._nonfinite += nonfinite
            try:
                self._run.send(self._points[:BATCH])
            except RejectedError as error:
                self._lost += len(self._points[:BATCH])
                logger.warning("MLflow refuses a batch of metrics, which stay in metrics.jsonl: %s", _first_line(error))
            del self._points[:BATCH]

    def _upload(self) -> None:
        try:
            self._run.upload()
        except Exception as error:
            # A store that takes metrics but no files (no artifact proxy, no rights) must not keep the run from ending.
            logger.warning("files of %s are not uploaded to MLflow: %s", self._directory.path, _first_line(error))

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1:  # once per outage, not once per retry
            logger.warning(
                "MLflow at %s: %s; training goes on, metrics are queued and in %s",
                *(_without_password(self._uri), _first_line(error), self._directory.metrics),
            )


def flatten_config(config: Config) -> dict[str, str]:
    """Dotted key to value as YAML would show it; lists are one JSON value."""
    flat: dict[str, str] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                visit(f"{prefix}.{key}" if prefix else key, inner)
        else:
            flat[prefix] = _text(value)

    visit("", config.model_dump(mode="json"))
    return flat


def resolve_uri(config: Config, environment: Mapping[str, str]) -> str:
    """The tracking URI: `tracking.uri`, else MLFLOW_TRACKING_URI, else an SQLite store in `run.root`.

    SQLite paths are made absolute, because MLflow takes them relative to wherever a job was started.

    Raises:
        ValueError: The URI is a plain path, of a kind that MLflow does not take for tracking, or a configuration key
            with a password in it, which would be saved and uploaded with the configuration.
    """
    uri, source = config.tracking.uri, "tracking.uri"
    if uri is not None and _without_password(uri) != uri:
        raise ValueError(
            f"tracking.uri={_without_password(uri)!r} holds credentials; set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_URI, in the environment instead"
        )
    if uri is None:
        uri, source = environment.get("MLFLOW_TRACKING_URI"), "MLFLOW_TRACKING_URI"
    if not uri:
        return f"sqlite:///{(config.run.root / STORE_NAME).resolve()}"
    if re.match(r"(https?|postgresql|mysql|mssql)(\+\w+)?://\S|databricks", uri):
        return uri
    path = uri.removeprefix("sqlite:///")
    if path == uri or path in ("", ":memory:"):
        raise ValueError(f"{source}={uri!r} is no tracking store; use http://HOST:PORT or sqlite:///PATH/mlflow.db")
    return f"sqlite:///{Path(path).resolve()}"


def make_tracker(
    config: Config,
    directory: RunDirectory,
    *,
    rank: int = 0,
    tags: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Tracker:
    """The tracker of this process; call it after `MetricsLog.rewind`.

    Args:
        config: The run's configuration; logged as params, what differs from the defaults also as `changed.*` tags.
        directory: The run's folder.
        rank: Global rank; all but 0 get a `NullTracker`.
        tags: Further tags, e.g. versions.
        environment: Environment variables; absent: the process's.

    Raises:
        ValueError: tracking.uri is unusable, or mlflow is not installed though tracking.mlflow is true.
    """
    if rank != 0 or not config.tracking.mlflow:
        return NullTracker()
    if importlib.util.find_spec("mlflow") is None:
        raise ValueError("tracking.mlflow=true needs the mlflow package: pip install mlflow, or set it to false")
    d = _describe(config, directory, tags or {}, os.environ if environment is None else environment)
    return MLflowTracker(d.uri, d.experiment, d.run_name, directory, d.params, d.tags)


def replay(directory: RunDirectory, *, environment: Mapping[str, str] | None = None) -> int:
    """Complete the MLflow copy of a run from its directory: missing points, files and the end status.

    Safe to repeat, and safe beside a live run.  A run that MLflow has never seen is created.

    Args:
        directory: The run's folder; its config.yaml decides the store.
        environment: Environment variables; absent: the process's.

    Returns:
        The number of values delivered.

    Raises:
        ConnectionError: The store does not answer or refuses.
        ValueError: The folder is not that of a run.
    """
    for path in (directory.config, directory.metrics):
        if not path.is_file():
            raise ValueError(f"{directory.path} is not a run directory: it has no {path.name}")
    config = load_config(directory.config)
    records = read_metrics(directory.metrics)
    description = _describe(config, directory, {}, os.environ if environment is None else environment)
    run = MLflowRun(description, directory)
    try:
        run.connect(mark_running=False)
        sent = run.send_missing([point for record in records for point in points_of(record)[0]])
        run.upload()
        status = directory.read_status()
        if status is not None and status["state"] in STATUS_OF_STATE:
            run.finish(STATUS_OF_STATE[status["state"]])
    except Exception as error:
        raise ConnectionError(f"MLflow at {_without_password(description.uri)}: {_first_line(error)}") from error
    return sent


def _describe(
    config: Config, directory: RunDirectory, tags: Mapping[str, str], environment: Mapping[str, str]
) -> RunDescription:
    changed = {f"changed.{key}": _text(value) for key, _, value in differences(config)}
    uri = resolve_uri(config, environment)
    return RunDescription(uri, config.tracking.experiment, config.run.name, flatten_config(config), {**changed, **tags})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _without_password(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri)


def _first_line(error: Exception) -> str:
    # mlflow's own messages repeat the URI, credentials included.
    return f"{type(error).__name__}: {_without_password(str(error)).strip().partition(chr(10))[0][:300]}"
