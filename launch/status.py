"""What is the state of a run?  From its folder first, then from SLURM; neither alone knows it all.

The folder knows steps, losses, checkpoints and why ranks failed; SLURM knows that a job waits, was cancelled or lost a
node, which nobody in the job could write down.  Without SLURM, or long after it forgot the job, the folder answers.
"""

import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from launch import slurm
from launch.records import LaunchFolder, decisive_code, exit_codes
from pipeline.config_loader import load_config
from pipeline.exit_codes import failure_name
from pipeline.metrics import read_metrics
from pipeline.run_directory import RunDirectory

_FAILED_JOBS = {
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "OUT_OF_MEMORY": "oom",
    "NODE_FAIL": "node",
    "BOOT_FAIL": "node",
}


@dataclass(frozen=True)
class RunStatus:
    """One line about a run.

    Attributes:
        path: its directory.
        state: queued, running, preempted (saved, waits to go on), stopped, cancelled, completed, or `failed: WHY` with
            oom, timeout, nan, config, hang, preflight, node, killed or error.
        reason: a sentence.
        job: SLURM's job id; empty if it was started otherwise.
        nodes: nodes it runs on.
        restarts: starts after the first.
    """

    path: Path
    state: str
    reason: str = ""
    job: str = ""
    nodes: str = ""
    restarts: int = 0
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    checkpoint: str = ""
    checkpoint_age_seconds: float | None = None

    @property
    def lines(self) -> list[tuple[str, str]]:
        """(name, value) of everything that is known."""
        age = f", {duration(self.checkpoint_age_seconds)} ago" if self.checkpoint_age_seconds is not None else ""
        eta = f", {duration(self.eta_seconds)} left" if self.eta_seconds is not None else ""
        rows = [
            ("run", str(self.path)),
            ("state", self.state + (f" ({self.reason})" if self.reason else "")),
            ("job", self.job + (f" on {self.nodes}" if self.nodes else "")),
            ("starts", str(self.restarts + 1) if self.restarts else ""),
            ("step", f"{self.step} of {self.total_steps}{eta}" if self.total_steps else ""),
            ("loss", f"{self.loss:.4f}" if self.loss is not None else ""),
            ("tokens/s", f"{self.tokens_per_second:,.0f}" if self.tokens_per_second else ""),
            ("checkpoint", self.checkpoint + age if self.checkpoint else ""),
        ]
        return [(name, value) for name, value in rows if value]


def run_status(path: Path) -> RunStatus:
    """State of the run in `path`.

    Raises:
        ValueError: there is no run, or its files are damaged.
    """
    run, launch = RunDirectory(path), LaunchFolder(path)
    record = launch.read_job()
    written = run.read_status()
    if record is None and written is None and not run.config.is_file():
        raise ValueError(f"{path} is not the directory of a run: it has neither status.json nor launch/job.json")
    job = slurm.job_state(record.job_id) if record else None
    state, reason = _state(launch, written, job, submitted=record is not None)
    step = int(written["step"]) if written else 0
    return RunStatus(
        path=path,
        state=state,
        reason=reason,
        job=record.job_id if record else "",
        nodes=job.nodes if job else "",
        restarts=max(0, len(launch.attempts) - 1),
        **_progress(run, launch, step, running=state == "running"),
        **_checkpoint(run),
    )


def _state(
    launch: LaunchFolder, written: Mapping[str, Any] | None, job: slurm.JobState | None, *, submitted: bool
) -> tuple[str, str]:
    """(state, reason)."""
    status = dict(written or {})
    reason = str(status.get("reason", ""))
    if job is not None and job.state in slurm.ACTIVE and job.state != "RUNNING":
        if launch.attempts and job.restarts:
            return "preempted", f"waits to go on: {job.reason or job.state}"
        return "queued", job.reason or job.state
    if job is not None and job.state == "RUNNING":
        begun = bool(launch.attempts) and _newer(launch.path.parent / "status.json", launch.attempts[-1] / "begin")
        return "running", reason if begun else "starting"
    if status.get("state") == "completed":
        return "completed", reason
    if launch.cancelled.exists() or (job is not None and job.state == "CANCELLED"):
        return "cancelled", reason
    if job is not None and job.state in _FAILED_JOBS:
        return f"failed: {_FAILED_JOBS[job.state]}", reason
    code = decisive_code(exit_codes(launch.attempts[-1])) if launch.attempts else None
    if submitted and job is None and not launch.attempts:
        return "queued", "SLURM does not answer"
    if status.get("state") == "stopped":
        return "stopped", reason
    if status.get("state") == "running" and not submitted and _is_alive(launch.path.parent):
        return "running", reason
    failure = status.get("failure") or (failure_name(code) if code else "error")
    if code == 2 and status.get("state") != "failed":
        reason = "see `qsparse logs`"
    if status.get("state") == "running" and not code:
        reason = f"its processes are gone; last sign at step {status['step']}"
    return f"failed: {failure}", reason


def _newer(file: Path, than: Path) -> bool:
    return file.exists() and than.exists() and file.stat().st_mtime > than.stat().st_mtime


def _is_alive(run: Path) -> bool:
    """Whether the process that wrote its name into the run's lock lives, as far as this machine can tell."""
    try:
        words = (run.parent / ".locks" / run.name).read_text(encoding="utf-8").split()
        pid, host = int(words[1]), words[3]
    except (OSError, IndexError, ValueError):
        return False
    if host != socket.gethostname():
        return True  # on another machine: nobody here knows better than status.json
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _progress(run: RunDirectory, launch: LaunchFolder, step: int, *, running: bool) -> dict[str, Any]:
    file = run.config if run.config.is_file() else launch.config
    total = load_config(file).training.steps if file.is_file() else 0
    records = [record for record in read_metrics(run.metrics) if "train/loss" in record] if run.metrics.exists() else []
    if not records:
        return {"step": step, "total_steps": total}
    last = records[-1]
    recent = [float(record["perf/step_seconds"]) for record in records[-10:] if "perf/step_seconds" in record]
    step = max(step, int(last["step"]))
    eta = sorted(recent)[len(recent) // 2] * (total - step) if recent and running and total > step else None
    return {
        "step": step,
        "total_steps": total,
        "loss": float(last["train/loss"]),
        "tokens_per_second": last.get("perf/tokens_per_second"),
        "eta_seconds": eta,
    }


def _checkpoint(run: RunDirectory) -> dict[str, Any]:
    metas = sorted(run.checkpoints.glob("step-*/meta.json"))
    if not metas:
        return {}
    newest = metas[-1]
    return {"checkpoint": newest.parent.name, "checkpoint_age_seconds": max(0.0, time.time() - newest.stat().st_mtime)}


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    minutes, hours, days = seconds / 60, seconds / 3600, seconds / 86400
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes:.0f} min"
    if hours < 48:
        return f"{int(hours)} h {int(minutes) % 60} min"
    return f"{int(days)} d {int(hours) % 24} h"


def as_json(status: RunStatus) -> str:
    """One JSON object, for scripts."""
    return json.dumps({**vars(status), "path": str(status.path), "time": datetime.now().astimezone().isoformat()})
