"""Where a run's numbers go: which tracker a process has, at which store, with which names, params and tags.

The trainer sees the `Tracker` protocol only.  No method of it raises or waits, except as documented, so tracking can
neither stop a run nor slow it down; how that is done is `pipeline.mlflow_tracker`'s.  The order of the stores is
`tracking.uri`, `MLFLOW_TRACKING_URI`, and an SQLite file beside the runs, which needs no server and no setting.
"""

import importlib.util
import json
import os
from collections.abc import Mapping
from typing import Any, Protocol

from pipeline.config import Config
from pipeline.config_loader import differences
from pipeline.mlflow_run import EndStatus, RunDescription
from pipeline.mlflow_tracker import MLflowTracker
from pipeline.run_directory import RunDirectory
from pipeline.tracking_uri import resolve_uri

STATUS_OF_STATE: dict[str, EndStatus] = {"completed": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""MLflow's word for each final state of status.json."""


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
    return MLflowTracker(
        describe_run(config, tags or {}, os.environ if environment is None else environment), directory
    )


def describe_run(config: Config, tags: Mapping[str, str], environment: Mapping[str, str]) -> RunDescription:
    """Store, names, params and tags of the MLflow run of a configuration.

    Raises:
        ValueError: tracking.uri or MLFLOW_TRACKING_URI is unusable.
    """
    changed = {f"changed.{key}": _text(value) for key, _, value in differences(config)}
    return RunDescription(
        uri=resolve_uri(config, environment),
        experiment=config.tracking.experiment,
        run_name=config.run.name,
        params=flatten_config(config),
        tags={**changed, **tags},
        parent=config.tracking.parent,
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
