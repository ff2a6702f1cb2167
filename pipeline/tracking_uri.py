"""Which MLflow store a run belongs to; nothing of MLflow, so the command line can refuse a wrong address at once."""

import re
from collections.abc import Mapping
from pathlib import Path

from pipeline.config import Config

STORE_NAME = "mlflow.db"  # the embedded store of a folder of runs; `qsparse mlflow` looks for it


def resolve_uri(config: Config, environment: Mapping[str, str]) -> str:
    """The tracking URI: `tracking.uri`, else MLFLOW_TRACKING_URI, else an SQLite store in `run.root`.

    SQLite paths are made absolute, because MLflow takes them relative to wherever a job was started.

    Raises:
        ValueError: The URI is a plain path, of a kind that MLflow does not take for tracking, or a configuration key
            with a password in it, which would be saved and uploaded with the configuration.
    """
    uri, source = config.tracking.uri, "tracking.uri"
    if uri is not None and without_password(uri) != uri:
        raise ValueError(
            f"tracking.uri={without_password(uri)!r} holds credentials; set MLFLOW_TRACKING_USERNAME and "
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


def without_password(uri: str) -> str:
    """`uri` as it may be shown."""
    return re.sub(r"//[^/@]*@", "//", uri)
