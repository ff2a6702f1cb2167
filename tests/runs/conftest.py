"""A store that is there already: MLflow takes longer to make one than most tests take."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store of the present schema without runs; copied, never written."""
    mlflow = pytest.importorskip("mlflow")
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store_exists(tmp_path: Path, empty_store: Path) -> None:
    """The store of the runs in `tmp_path`, as the second run in a folder finds it."""
    shutil.copy(empty_store, tmp_path / "mlflow.db")
