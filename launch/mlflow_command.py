"""`qsparse mlflow`: the MLflow user interface on the store embedded in a folder of runs.

MLflow's own default is a database in the current directory, which is a new and empty one wherever it is started;
here both the database and the artifacts are named by absolute paths.
"""

import argparse
import os
import socket
import sys
from pathlib import Path
from typing import Any

from launch.arguments import add_command
from pipeline.tracking_uri import STORE_NAME

_EPILOG = """\
example:
  qsparse mlflow --root runs --port 5000        then open http://127.0.0.1:5000
"""


def add_mlflow_parser(commands: Any) -> None:
    """Add `mlflow` to the subparsers of `qsparse`."""
    parser = add_command(commands, "mlflow", "browse and compare runs in the MLflow user interface", _EPILOG)
    parser.add_argument(
        "--root", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs (default: runs)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=5000, help="port to listen on (default: 5000)")
    parser.set_defaults(run=_mlflow)


def mlflow_command(root: Path, host: str, port: int) -> list[str]:
    """Command line of the server.

    Raises:
        ValueError: There is no store in `root`.
    """
    database = root.resolve() / STORE_NAME
    if not database.is_file():
        raise ValueError(f"--root {root} has no {STORE_NAME}: no run has been logged there (tracking.mlflow=true)")
    store = ["--backend-store-uri", f"sqlite:///{database}"]
    artifacts = ["--artifacts-destination", (database.parent / "mlartifacts").as_uri()]
    network = ["--host", host, "--port", str(port), "--workers", "1"]
    return [sys.executable, "-m", "mlflow", "server", *store, *artifacts, *network]


def _check_free(host: str, port: int) -> None:
    """The server itself ends with 0 when it cannot listen.

    Raises:
        ValueError: nothing can listen there.
    """
    if not 1 <= port <= 65535:
        raise ValueError(f"--port {port}: 1 to 65535 is expected")
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error


def _mlflow(arguments: argparse.Namespace) -> int:
    command = mlflow_command(arguments.root, arguments.host, arguments.port)
    _check_free(arguments.host, arguments.port)
    print(f"MLflow on http://{arguments.host}:{arguments.port}", flush=True)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Eight processes that evaluate language models; without them the server is there in a quarter of the time.
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    os.execv(command[0], command)
