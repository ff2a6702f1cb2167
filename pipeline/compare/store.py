"""The MLflow store of a folder of runs: which one it is, and errors of it in one line and as exit codes."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.mlflow_run import first_line, make_client
from pipeline.tracking_uri import resolve_uri, without_password

if TYPE_CHECKING:
    from mlflow import MlflowClient


def work_on_store(root: Path, work: Callable[["MlflowClient"], str], *, complaint: str = "") -> int:
    """Print what `work` returns for the store of `root`, as the body of a command.

    Returns:
        0; 1 if the store does not answer; 2 if there is none, or the question is wrong.
    """
    try:
        with store_of(root) as client:
            print(work(client))
    except (ConnectionError, ValueError) as error:
        print(f"qsparse: {complaint}{error}", file=sys.stderr)
        return 1 if isinstance(error, ConnectionError) else 2
    return 0


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
