"""One folder per run: everything a run reads about itself and leaves behind, and the only writer of its paths.

    <run.root>/<run.name>/
        config.yaml             the resolved configuration; config.1.yaml, config.2.yaml ... are those of earlier starts
        environment.json        versions, commit, host and command line of the last start
        metrics.jsonl           every logged number (pipeline.metrics); the truth that MLflow is a copy of
        status.json             running, completed, stopped or failed; the batch script requeues by it
        mlflow_run_id           MLflow's id of this run, so that a resumed run continues it
        checkpoints/  figures/  samples/  profile/  logs/rank-00000.log

Files that others read while the run goes on (status, config, environment) are written to a temporary name and
renamed, so a reader, or a kill at any moment, sees the old text or the new one and never a part.  Nothing here
knows about ranks: rank 0 calls `create` and writes, the other ranks use the paths only.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

RunState = Literal["running", "completed", "stopped", "failed"]


@dataclass(frozen=True)
class RunDirectory:
    """The folder of one run.

    Attributes:
        path: The folder; it need not exist before `create`.
    """

    path: Path

    @property
    def config(self) -> Path:
        """Resolved configuration of the latest start (YAML)."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, host and command line of the latest start (JSON)."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """Every logged number (JSON lines)."""
        return self.path / "metrics.jsonl"

    @property
    def profile(self) -> Path:
        """Recordings of single steps (`pipeline.profiling`)."""
        return self.path / "profile"

    @property
    def status(self) -> Path:
        """State of the run (JSON)."""
        return self.path / "status.json"

    @property
    def mlflow_run_id(self) -> Path:
        """The id under which MLflow knows the run, as plain text."""
        return self.path / "mlflow_run_id"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """Folder of the plots."""
        return self.path / "figures"

    @property
    def samples(self) -> Path:
        """Folder of generated text."""
        return self.path / "samples"

    def log(self, rank: int) -> Path:
        """Log file of one rank."""
        return self.path / "logs" / f"rank-{rank:05d}.log"

    def sample(self, step: int) -> Path:
        """File of the text generated at an optimizer step."""
        return self.samples / f"step-{step:08d}.txt"

    def create(self, config_yaml: str, environment: Mapping[str, Any] | None = None) -> None:
        """Make the folders and write what this start runs with; called by rank 0 alone, also on a resume.

        Args:
            config_yaml: The resolved configuration.  If an earlier start left another one, that one is kept as
                `config.<n>.yaml` with the first free n.
            environment: JSON-able facts about the process (versions, commit, host, command line).

        Raises:
            ValueError: The path is taken by something that is not a folder.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run directory {self.path} is a file; choose another run.name or run.root")
        for folder in (self.checkpoints, self.figures, self.samples, self.log(0).parent):
            folder.mkdir(parents=True, exist_ok=True)
        _replace_keeping_old(self.config, config_yaml)
        if environment is not None:
            _replace_keeping_old(self.environment, json.dumps(environment, indent=2, default=str) + "\n")

    def write_status(self, state: RunState, step: int, reason: str, **extra: Any) -> None:
        """Replace status.json in one step.

        Args:
            state: `running`; `completed` (all steps done); `stopped` (saved, wants to be requeued); `failed`.
            step: Optimizer steps done.
            reason: One sentence for people, e.g. "SIGTERM" or "loss is nan at step 120 on rank 3".
            **extra: Further JSON-able facts, e.g. the checkpoint's path.

        Raises:
            ValueError: The state is none of the four.
        """
        if state not in get_args(RunState):
            raise ValueError(f"run state {state!r} is none of {', '.join(get_args(RunState))}")
        record = {"state": state, "step": step, "reason": reason, "time": datetime.now(UTC).isoformat(), **extra}
        write_atomic(self.status, json.dumps(record, indent=2, default=str) + "\n")

    def read_status(self) -> dict[str, Any] | None:
        """The last `write_status`; None for a run that never wrote one.

        Raises:
            ValueError: status.json is not JSON (edited by hand: we only ever rename whole files into place).
        """
        try:
            text = self.status.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            status: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.status} is not JSON ({error}); delete it and resume") from None
        return status


def write_atomic(path: Path, text: str) -> None:
    """Write `text` so that a reader, or a kill at any moment, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())  # without it a power cut may leave the new name with no bytes
    os.replace(temporary, path)


def _replace_keeping_old(path: Path, text: str) -> None:
    if path.exists():
        old = path.read_text(encoding="utf-8")
        if old == text:
            return
        n = 1
        while (kept := path.with_name(f"{path.stem}.{n}{path.suffix}")).exists():
            n += 1
        write_atomic(kept, old)
    write_atomic(path, text)
