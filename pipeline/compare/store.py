"""The MLflow store of a folder of runs: which one it is, and errors of it in one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.mlflow_run import first_line, make_client, without_password
from pipeline.tracking import resolve_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


@contextmanager
def store_of(root: Path) -> Iterator["MlflowClient"]:
    """A client of MLFLOW_TRACKING_URI, or of the SQLite store that runs in `root` share.

    Raises:
        ValueError: the URI is none, there is no store in `root`, or the store refuses what is asked.
        ConnectionError: the store does not answer.
    """
    config = Config.model_validate({"run": {"root": str(root)}})
    uri = resolve_uri(config, os.environ)
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise ValueError(f"{uri} does not exist: no run has been logged there (tracking.mlflow=true)")
    client = make_client(uri)
    from mlflow.exceptions import MlflowException

    try:
        yield client
    except MlflowException as error:
        kind = ValueError if error.error_code == "INVALID_PARAMETER_VALUE" else ConnectionError
        raise kind(f"MLflow at {without_password(uri)}: {first_line(error)}") from error
