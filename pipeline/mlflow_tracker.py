"""Delivers a run to MLflow without ever waiting on, or failing, the training thread.

`log` appends to a queue and returns; one daemon thread on rank 0 batches the queue, has a process of its own send the
batches (`pipeline.mlflow_process`), and retries with exponential back-off while the store is away.  metrics.jsonl is
written before `log` is called and stays the truth: at a start the thread brings the store up to date with that file,
and `pipeline.track_sync.replay` does so for a run that has ended.

The obvious way, `mlflow.log_metrics` in the loop, costs tens of milliseconds a step, blocks for minutes when the
server is down and then raises into training; its asynchronous mode drops what it could not send.  The price of the
queue is that the UI lags by a few seconds, and that a process killed outright leaves its run RUNNING until it is
resumed or `replay` is called.
"""

import atexit
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from pipeline.metrics import read_metrics
from pipeline.mlflow_points import Point, points_of
from pipeline.mlflow_process import RemoteRun
from pipeline.mlflow_run import BATCH, EndStatus, MLflowRun, RejectedError, RunDescription, first_line
from pipeline.run_directory import RunDirectory
from pipeline.tracking_uri import without_password

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 60.0
CLOSE_TIMEOUT_SECONDS = 20.0
MAX_QUEUED_RECORDS = 20_000


class MLflowTracker:
    """Non-blocking writer of one MLflow run.

    Construct it after `MetricsLog.rewind`: the records then in metrics.jsonl that the store lacks are delivered
    first.  Use it as a context manager or call `close`; an exception, or an exit without `close`, ends the run FAILED
    (KeyboardInterrupt: KILLED).

    Args:
        description: Store, names, params and tags.
        directory: Holds metrics.jsonl, the run id and the files to upload.
        flush_s: Seconds between deliveries.
        run: What delivers; absent: a process of its own.
    """

    def __init__(
        self,
        description: RunDescription,
        directory: RunDirectory,
        *,
        flush_s: float = FLUSH_SECONDS,
        run: MLflowRun | RemoteRun | None = None,
    ) -> None:
        self._uri, self._directory, self._flush_s = description.uri, directory, flush_s
        self._viewer = description.viewer
        self._run = run or RemoteRun(description, directory)
        backlog = read_metrics(directory.metrics) if directory.metrics.exists() else []
        self._records: deque[dict[str, Any]] = deque(backlog)
        self._max_records = len(backlog) + MAX_QUEUED_RECORDS
        self._points: list[Point] = []
        self._lost = 0
        self._nonfinite = 0
        self._failures = 0
        self._upload_wanted = threading.Event()
        self._upload_wanted.set()  # configuration and environment, so that a killed run has them too
        self._upload_problem = ""
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
        return self._viewer or without_password(self._run.url or self._uri)

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
        is_cut_off = bool(self.undelivered or self._thread.is_alive() or self._failures)
        if is_cut_off or self._upload_problem:
            missing = f"{self.undelivered} values and perhaps the end status" if is_cut_off else "files"
            logger.warning(
                "MLflow at %s is incomplete: %s are missing; they are in %s, and `qsparse track sync %s` delivers them",
                *(without_password(self._uri), missing, self._directory.path, self._directory.path),
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
                self._run.close()
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
                self._upload()
            if closing:
                self._run.finish(self._status)
        except Exception as error:
            self._note_failure(error)
            return False
        if self._failures:
            logger.warning("MLflow at %s answers again", without_password(self._uri))
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
                logger.warning("MLflow refuses a batch of metrics, which stay in metrics.jsonl: %s", first_line(error))
            del self._points[:BATCH]

    def _upload(self) -> None:
        self._upload_wanted.clear()
        try:
            self._run.upload()
            self._upload_problem = ""
        except Exception as error:
            # A store that takes metrics but no files (no artifact proxy, no rights) must not keep the run from ending.
            self._upload_wanted.set()
            if not self._upload_problem:
                logger.warning("files of %s are not yet in MLflow: %s", self._directory.path, error)
            self._upload_problem = first_line(error)

    def _note_failure(self, error: Exception) -> None:
        self._failures += 1
        if self._failures == 1:  # once per outage, not once per retry
            logger.warning(
                "MLflow at %s: %s; training goes on, metrics are queued and in %s",
                *(without_password(self._uri), first_line(error), self._directory.metrics),
            )
