"""What launching leaves in a run's folder, for the batch script, for `qsparse status` and for people.

    <run>/launch/
        config.yaml             the configuration as submitted: editing the recipe while the job waits changes nothing
        job.sbatch  job.json    the script; the job's id and size (in a sweep's own folder for all of its runs)
        slurm-<job>.out         output of the batch script: starts, decisions
        cancelled               `qsparse cancel` was here: do not requeue
        failures                failures since the last new checkpoint, and its step
        attempts/000/           one folder per start
            node-0.log          output of the ranks of a node
            exit.0              exit code of the ranks of a node
            ended               what the batch script decided: ended, failed, again or requeue, and why

Plain text where the batch script reads or writes, so that it needs nothing but bash.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.exit_codes import FINAL, ExitCode, failure_name
from pipeline.run_directory import RunDirectory, write_atomic

ATTEMPT_VARIABLE = "QSPARSE_ATTEMPT"
"""Environment variable of the nodes' launchers: folder of the present start."""


@dataclass(frozen=True)
class JobRecord:
    """A submitted job."""

    job_id: str
    """SLURM's job id; `123_4` for a task of an array."""
    nodes: int
    """Nodes asked for."""
    ranks_per_node: int
    """Ranks on each."""
    submitted: str
    """Time of the submission, ISO 8601."""
    runs: tuple[str, ...] = ()
    """Of a sweep: its run directories, in the order of the array's tasks."""


@dataclass(frozen=True)
class LaunchFolder:
    """The `launch` folder of a run or of a sweep."""

    run: Path

    @property
    def path(self) -> Path:
        """The folder."""
        return self.run / "launch"

    @property
    def config(self) -> Path:
        """Configuration as submitted."""
        return self.path / "config.yaml"

    @property
    def script(self) -> Path:
        """The batch script."""
        return self.path / "job.sbatch"

    @property
    def cancelled(self) -> Path:
        """Marker of `qsparse cancel`."""
        return self.path / "cancelled"

    @property
    def attempts(self) -> list[Path]:
        """Folders of all starts, oldest first."""
        return sorted(path for path in (self.path / "attempts").glob("[0-9]*") if path.is_dir())

    @property
    def outputs(self) -> list[Path]:
        """Outputs of batch scripts, oldest first."""
        return sorted(self.path.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)

    def write_job(self, record: JobRecord) -> None:
        """Remember the submitted job."""
        write_atomic(self.path / "job.json", json.dumps(asdict(record), indent=2) + "\n")

    def read_job(self) -> JobRecord | None:
        """The last submitted job; None for a run that was never submitted.

        Raises:
            ValueError: job.json was edited into something else.
        """
        file = self.path / "job.json"
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            return JobRecord(**{**data, "runs": tuple(data["runs"])})
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete it and submit again") from None

    def reset(self) -> None:
        """Forget what concerned earlier jobs of the run; its attempts stay."""
        for name in ("cancelled", "failures"):
            (self.path / name).unlink(missing_ok=True)


def exit_codes(attempt: Path) -> list[int]:
    """Exit codes of the nodes of a start, those that have ended."""
    texts = (file.read_text().strip() for file in sorted(attempt.glob("exit.*")))
    return [int(text) for text in texts if text.isdecimal()]


def decisive_code(codes: list[int]) -> int | None:
    """The code that says why a start ended: one that forbids a restart, else a rank's own, else a signal's."""
    for wanted in (*FINAL, ExitCode.HANG, ExitCode.PREFLIGHT, ExitCode.OUT_OF_MEMORY, ExitCode.ERROR):
        if wanted in codes:
            return wanted
    return max(codes, default=None)


def record_end(run: RunDirectory, code: int, environ: Mapping[str, str] = os.environ) -> None:
    """After the ranks of this node ended: leave the exit code, and correct a status that they could not write.

    Ranks that were killed leave status.json at `running`.  Exit code 2 is a mistake that the ranks told; it may be
    that another process trains the run, truly.  Only the first node writes the status.
    """
    node = environ.get("SLURM_NODEID", "0")
    if attempt := environ.get(ATTEMPT_VARIABLE):
        write_atomic(Path(attempt) / f"exit.{node}", f"{code}\n")
    status = run.read_status()
    if node != "0" or code in (ExitCode.DONE, ExitCode.USER_ERROR) or status is None:
        return
    if status["state"] == "running":
        reason = f"the processes ended with exit code {code} without saying why"
    elif status["state"] == "failed" and "failure" not in status:
        reason = status["reason"]
    else:
        return
    run.write_status("failed", status["step"], reason, failure=failure_name(code))
