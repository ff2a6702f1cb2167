"""The files of a run as MLflow artifacts: configuration, environment, figures, samples, and where checkpoints are.

Checkpoints themselves stay where they are: a copy of terabytes in the artifact store helps nobody, their paths do.
A file that has not changed since it was uploaded is not uploaded again.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.run_directory import RunDirectory

if TYPE_CHECKING:
    from mlflow import MlflowClient


class Artifacts:
    """What of one run directory has been uploaded to one MLflow run."""

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._uploaded: dict[Path, tuple[int, int]] = {}
        self._references = ""

    def upload(self, client: "MlflowClient", run_id: str) -> None:
        """Upload what is new or has changed; files of the same name are replaced."""
        for file, folder in self._files():
            status = file.stat()
            version = (status.st_mtime_ns, status.st_size)
            if self._uploaded.get(file) != version:
                client.log_artifact(run_id, str(file), folder)
                self._uploaded[file] = version
        references = json.dumps(checkpoint_references(self._directory), indent=2) + "\n"
        if references != self._references:
            client.log_text(run_id, references, "checkpoints.json")
            self._references = references

    def _files(self) -> Iterator[tuple[Path, str | None]]:
        path = self._directory.path
        for file in sorted([*path.glob("config*.yaml"), *path.glob("environment*.json")]):
            yield file, None
        for folder in (self._directory.figures, self._directory.samples):
            for file in sorted(folder.glob("*.*")):
                yield file, folder.name


def checkpoint_references(directory: RunDirectory) -> list[dict[str, Any]]:
    """Step, absolute path and size of every complete checkpoint of a run, oldest first."""
    references = []
    for meta in sorted(directory.checkpoints.glob("step-*/meta.json")):
        folder = meta.parent.resolve()
        with suppress(FileNotFoundError):  # the run removes an old checkpoint while we look at it
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            references.append({"step": int(folder.name.removeprefix("step-")), "path": str(folder), "bytes": size})
    return references
