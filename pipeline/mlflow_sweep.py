"""The runs of a sweep below one parent run, although they start at any time, on any node, and know only their sweep.

Each run finds the parent or makes it; nobody else could: the login node that submits a job array need not reach the
tracking server.  Runs that make one at the same moment settle it by a hard link in the sweep's folder, which exactly
one of them can create, on network file systems too; the others delete theirs.

The parent's status follows from its children: RUNNING while one of them runs, FAILED if one failed, KILLED if one
was, otherwise FINISHED.  Each child writes it when it starts and when it ends.  The price is that a sweep shows
FINISHED while those of its runs that are left still wait to be started.
"""

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.run_directory import write_atomic

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
SWEEP_TAG = "qsparse.sweep"


class SweepParent:
    """The parent run of the sweep `name`.

    Args:
        name: Name of the sweep, and of the parent run.
        folder: The sweep's folder, which its runs share; made if absent.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._file = folder / "mlflow_parent_id"
        self._uid = uuid.uuid4().hex
        self._experiment_id = ""
        self._run_id = ""

    def adopt(self, client: "MlflowClient", experiment_id: str, run_id: str) -> None:
        """Put the run `run_id` below the parent, which then has the status of its children."""
        self._experiment_id = experiment_id
        self._run_id = self._find(client) or self._publish(client, self._create(client))
        client.set_tag(run_id, PARENT_TAG, self._run_id)
        self.update_status(client)

    def update_status(self, client: "MlflowClient") -> None:
        """Derive the parent's status from its children.

        A sibling may end between our reading and our writing, and write before us.  So whoever writes reads again: the
        last to write has then seen every child that ended before, and one that ends later writes after it.
        """
        written = None
        while (status := self._status_of_children(client)) != written:
            if status == "RUNNING":
                client.update_run(self._run_id, status=status)
            else:
                client.set_terminated(self._run_id, status)
            written = status

    def _status_of_children(self, client: "MlflowClient") -> str:
        children = client.search_runs([self._experiment_id], f"tags.`{PARENT_TAG}` = '{self._run_id}'")
        found = {child.info.status for child in children}
        if found & {"RUNNING", "SCHEDULED"}:
            return "RUNNING"
        return next((status for status in ("FAILED", "KILLED") if status in found), "FINISHED")

    def _find(self, client: "MlflowClient") -> str:
        from mlflow.exceptions import MlflowException

        if not self._file.is_file():
            return ""
        run_id = self._file.read_text(encoding="utf-8").strip()
        try:
            if client.get_run(run_id).info.lifecycle_stage == "active":
                return run_id
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        self._file.unlink(missing_ok=True)  # deleted by somebody, or the sweep goes on with another store
        return ""

    def _create(self, client: "MlflowClient") -> str:
        # An earlier attempt may have succeeded without its answer having reached us.
        matches = client.search_runs([self._experiment_id], f"tags.`qsparse.uid` = '{self._uid}'")
        if matches:
            return str(matches[0].info.run_id)
        tags = {"qsparse.uid": self._uid, SWEEP_TAG: str(self._folder)}
        return str(client.create_run(self._experiment_id, run_name=self._name, tags=tags).info.run_id)

    def _publish(self, client: "MlflowClient", run_id: str) -> str:
        """The parent on which all runs of the sweep agree: `run_id`, or that of a run that was faster."""
        proposal = self._folder / f".mlflow_parent_id.{self._uid}"
        write_atomic(proposal, run_id + "\n")
        try:
            os.link(proposal, self._file)
            return run_id
        except FileExistsError:
            client.delete_run(run_id)
            return self._file.read_text(encoding="utf-8").strip()
        finally:
            proposal.unlink()
