"""One run in an MLflow store: find or create it, send points, upload files, end it.  Every call blocks and may raise.

`pipeline.mlflow_tracker` calls this from its writer thread.  mlflow is imported inside functions only, here and in
the `mlflow_*` modules beside, because the import takes seconds and is needed on rank 0 alone.  `MlflowClient` rather
than the fluent `mlflow.log_metric`: no global active run, no exit hook that marks a crashed run FINISHED, and batches.

What makes delivery exactly-once over retries, kills and resumes:
- MLflow's key of a point is (run, name, time, step, value), so sending a batch again after a time-out adds nothing;
- the run id lies in the run directory, and what a resumed run finds there decides which steps are new: MLflow cannot
  delete points, so steps that a rewound run trains again are skipped up to the last one it has, name by name;
- a run whose creation got lost on the way is found again by its unique tag.
"""

import fcntl
import logging
import os
import shlex
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pipeline.mlflow_artifacts import Artifacts
from pipeline.mlflow_points import Point, clean_name
from pipeline.mlflow_sweep import SweepParent
from pipeline.run_directory import RunDirectory, write_atomic
from pipeline.tracking_uri import STORE_NAME, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

EndStatus = Literal["FINISHED", "KILLED", "FAILED"]
BATCH = 1000  # most metrics that a server takes in one log_batch
PARAM_BATCH = 100
MAX_VALUE = 5000

# For this process only, and only where the user has not decided.  The library's own retries block for minutes
# (245 s for a dead server), and one of `create_run` after a lost reply makes a second run; ours are in the writer
# thread, where waiting costs nothing, and look for the first one before.
PROCESS_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}


class RejectedError(Exception):
    """The store answered that it will never take this batch; sending it again is pointless."""


class StoreError(Exception):
    """What the store answered to another process, or that this process is gone; in one line."""


@dataclass(frozen=True)
class RunDescription:
    """What a new MLflow run is created with.

    Attributes:
        uri: Tracking URI: `http(s)://...` or `sqlite:////absolute/path.db`.
        experiment: Experiment name; made if absent.
        run_name: Name shown in the UI.
        params: Written once per run; MLflow refuses to change them later.
        tags: Written at every start.
        parent: Name of the sweep that the run belongs to; MLflow shows it below a run of that name.
    """

    uri: str
    experiment: str
    run_name: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    parent: str | None = None

    @property
    def database(self) -> Path | None:
        """File of an SQLite store; None for a server."""
        return Path(self.uri.removeprefix("sqlite:///")) if self.uri.startswith("sqlite:") else None

    @property
    def viewer(self) -> str | None:
        """Command that shows an SQLite store in a browser; None for a server."""
        database = self.database
        if database is None:
            return None
        if database.name != STORE_NAME:
            return f"mlflow ui --backend-store-uri {shlex.quote(self.uri)}"
        nearby = database.is_relative_to(Path.cwd())
        root = database.parent.relative_to(Path.cwd()) if nearby else database.parent
        return f"qsparse mlflow --root {shlex.quote(str(root))}"


class MLflowRun:
    """The run of `directory` in the store of `description`.

    Args:
        description: Store, names, params and tags.
        directory: Holds the run id between starts and the files to upload.
    """

    def __init__(self, description: RunDescription, directory: RunDirectory) -> None:
        self._description = description
        self._directory = directory
        self._uid = uuid.uuid4().hex
        self._client: MlflowClient | None = None
        self._run_id: str | None = None
        self._experiment_id: str | None = None
        self._last_step: dict[str, int] = {}
        self._artifacts = Artifacts(directory)
        parent = description.parent
        self._parent = SweepParent(parent, directory.path.parent.resolve() / parent) if parent else None

    @property
    def url(self) -> str | None:
        """Address of the run's page on a server; None before `connect` and for an SQLite store."""
        if self._run_id is None or self._description.database is not None:
            return None
        return f"{self._description.uri.rstrip('/')}/#/experiments/{self._experiment_id}/runs/{self._run_id}"

    def prepare(self) -> None:
        """Import mlflow and bring an SQLite store to the current schema: the seconds that are paid only once.

        Does not touch a server.  Two runs that start together on one store take turns.
        """
        database = self._description.database
        if database is None:
            self._client = make_client(self._description.uri)
            return
        with _locked(database.with_name(f"{database.name}.lock")):
            if not database.exists():
                _create_store(database)
            client = make_client(self._description.uri)  # migrates a store of an older version
            self._find_or_create_experiment(client)
        self._client = client

    def connect(self, *, mark_running: bool = True) -> None:
        """Find the run of this directory or create it; does nothing once that has succeeded.

        Args:
            mark_running: Set a run that ended, or was killed, back to RUNNING.
        """
        if self._run_id is not None:
            return
        if self._client is None:
            self.prepare()
        client = self._ready_client()
        self._experiment_id = self._find_or_create_experiment(client)
        run = self._find_run(client) or self._create_run(client)
        run_id = run.info.run_id
        write_atomic(self._directory.mlflow_run_id, run_id + "\n")
        if mark_running and run.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        self._write_params_and_tags(client, run)
        if self._parent is not None:
            self._parent.adopt(client, self._experiment_id, run_id)
        # to_proto is the public way to the last step of every metric in one call.
        self._last_step = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        self._experiment_id = run.info.experiment_id
        self._run_id = run_id

    def send(self, points: Iterable[Point]) -> int:
        """Log the points whose step is after the last one that the store has under the same name.

        Returns:
            The number of points that the store took; the others were there before.

        Raises:
            RejectedError: The store refuses the batch for good.
        """
        last_step = dict(self._last_step)
        fresh = []
        for point in points:
            if point.step > last_step.get(point.name, -1):
                last_step[point.name] = point.step
                fresh.append(point)
        self._log(fresh)
        self._last_step = last_step
        return len(fresh)

    def send_missing(self, points: Sequence[Point]) -> int:
        """Log the points whose (name, step) the store lacks, holes included; reads every history, so it takes longer.

        Returns:
            The number of points that the store took.
        """
        client, run_id = self._ready_client(), self._ready_run_id()
        names = sorted({point.name for point in points if point.name in self._last_step})
        present = {(name, m.step) for name in names for m in client.get_metric_history(run_id, name)}
        missing: dict[tuple[str, int], Point] = {}
        for point in points:
            if (point.name, point.step) not in present:
                missing.setdefault((point.name, point.step), point)
        self._log(list(missing.values()))
        return len(missing)

    def upload(self) -> None:
        """Upload the files of the run that are new or have changed."""
        self._artifacts.upload(self._ready_client(), self._ready_run_id())

    def finish(self, status: EndStatus) -> None:
        """End the run in the store, and its sweep if it was the last that ran."""
        client, run_id = self._ready_client(), self._ready_run_id()
        client.set_terminated(run_id, status)
        if self._parent is not None:
            self._parent.update_status(client)

    def close(self) -> None:
        """Nothing is held open; `pipeline.mlflow_process.RemoteRun` has more to do."""

    def _ready_client(self) -> "MlflowClient":
        if self._client is None:
            raise RuntimeError("MLflowRun is used before prepare()")
        return self._client

    def _ready_run_id(self) -> str:
        if self._run_id is None:
            raise RuntimeError("MLflowRun is used before connect()")
        return self._run_id

    def _find_or_create_experiment(self, client: "MlflowClient") -> str:
        name, database = self._description.experiment, self._description.database
        found = client.get_experiment_by_name(name)
        if found is None:
            location = (database.parent / "mlartifacts").as_uri() if database is not None else None
            try:
                return str(client.create_experiment(name, artifact_location=location))
            except Exception:
                # Another run may have been faster; if not, the error stands.
                found = client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _find_run(self, client: "MlflowClient") -> "Run | None":
        from mlflow.exceptions import MlflowException

        if self._directory.mlflow_run_id.exists():
            run_id = self._directory.mlflow_run_id.read_text(encoding="utf-8").strip()
            try:
                run = client.get_run(run_id)
            except MlflowException as error:
                # The id belongs to another store, or its run was purged: this store gets a run of its own.
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
            else:
                if run.info.lifecycle_stage == "active":
                    return run
        # A create_run whose answer got lost left a run with our uid behind; take that one instead of a second.
        matches = client.search_runs([str(self._experiment_id)], f"tags.`qsparse.uid` = '{self._uid}'", max_results=1)
        return matches[0] if matches else None

    def _create_run(self, client: "MlflowClient") -> "Run":
        tags = {"qsparse.uid": self._uid, "qsparse.run_directory": str(self._directory.path.resolve())}
        return client.create_run(str(self._experiment_id), run_name=self._description.run_name, tags=tags)

    def _write_params_and_tags(self, client: "MlflowClient", run: "Run") -> None:
        from mlflow.entities import Param, RunTag

        known = run.data.params  # a resumed run may bring other values, which MLflow would refuse
        named = {clean_name(key): value[:MAX_VALUE] for key, value in self._description.params.items()}
        params = [Param(key, value) for key, value in named.items() if key not in known]
        tags = [RunTag(clean_name(key), value[:MAX_VALUE]) for key, value in self._description.tags.items()]
        for i in range(0, len(params), PARAM_BATCH):
            client.log_batch(run.info.run_id, params=params[i : i + PARAM_BATCH])
        for i in range(0, len(tags), PARAM_BATCH):
            client.log_batch(run.info.run_id, tags=tags[i : i + PARAM_BATCH])

    def _log(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        client, run_id = self._ready_client(), self._ready_run_id()
        for i in range(0, len(points), BATCH):
            metrics = [Metric(p.name, p.value, p.time_ms, p.step) for p in points[i : i + BATCH]]
            try:
                client.log_batch(run_id, metrics=metrics)
            except MlflowException as error:
                if error.error_code == "INVALID_PARAMETER_VALUE":
                    raise RejectedError(str(error)) from error
                raise


def make_client(uri: str) -> "MlflowClient":
    """A client whose own retries are short: ours are in a thread where waiting costs nothing."""
    for name, value in PROCESS_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # One line per outage is ours to say; these would say it at every retry.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _create_store(database: Path) -> None:
    """Make an SQLite store that has its whole schema from the moment it can be seen.

    MLflow builds the schema in some fifty steps; two processes at it at once, or a kill in between, leave a file that
    no process can open again.
    """
    temporary = database.with_name(f".{database.name}.{uuid.uuid4().hex}")
    try:
        make_client(f"sqlite:///{temporary}").search_experiments(max_results=1)
        with suppress(FileExistsError):  # where locks do not work, another process may have been faster
            os.link(temporary, database)
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """An error in one line; mlflow's own messages repeat the URI, credentials included."""
    if isinstance(error, StoreError):
        return str(error)
    return f"{type(error).__name__}: {without_password(str(error)).strip().partition(chr(10))[0][:300]}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
