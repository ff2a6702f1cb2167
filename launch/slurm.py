"""SLURM's commands as functions: submit, look, cancel.  Each is a process; nothing is kept.

Where a command is missing or SLURM does not answer, questions get None (the run's own files must do) and orders
raise.  `scontrol show job` knows jobs that ended minutes ago, `sacct` (only with slurmdbd) all, so both are asked.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 60

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING", "STAGE_OUT")
"""States of a job that will run, or runs."""


class SlurmError(ValueError):
    """SLURM refused, or is not there; the message has SLURM's own words."""


@dataclass(frozen=True)
class JobState:
    """What SLURM says of a job.

    Attributes:
        state: PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, TIMEOUT, NODE_FAIL, PREEMPTED, CANCELLED,
            OUT_OF_MEMORY ...
        reason: why it waits, or how it ended; empty if SLURM says nothing.
        nodes: its nodes, as SLURM abbreviates them.
        restarts: times it was requeued.
    """

    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0


def require_commands() -> None:
    """Refuse a machine without SLURM.

    Raises:
        SlurmError: sbatch is not on PATH.
    """
    if shutil.which("sbatch") is None:
        raise SlurmError(
            "sbatch is not on PATH: run this on a login node of the cluster, look at the script with --dry-run, or use "
            "`qsparse launch torchrun` where there is no SLURM"
        )


def test_submission(script: Path, options: Sequence[str], environ: Mapping[str, str]) -> str:
    """SLURM's answer to the question whether it could run the script, e.g. the expected start.

    Raises:
        SlurmError: it could not.
    """
    result = _run(["sbatch", "--test-only", *options, str(script)], environ)
    if result.returncode:
        raise SlurmError(f"SLURM refuses {script}: {_message(result)}")
    return _message(result)


def submit(script: Path, options: Sequence[str], environ: Mapping[str, str]) -> str:
    """Queue the script; returns the job id.

    Raises:
        SlurmError: SLURM refused.
    """
    result = _run(["sbatch", "--parsable", *options, str(script)], environ)
    if result.returncode:
        raise SlurmError(f"sbatch refused {script}: {_message(result)}")
    return result.stdout.strip().splitlines()[-1].partition(";")[0]


def job_state(job_id: str) -> JobState | None:
    """What SLURM knows of a job; None if it knows nothing or is not there."""
    return _from_scontrol(job_id) or _from_sacct(job_id)


def signal_batch(job_id: str, signal_name: str) -> None:
    """Send a signal to the batch script alone.

    Raises:
        SlurmError: there is no such job, or it is not running.
    """
    _order(["scancel", "--batch", f"--signal={signal_name}", job_id])


def cancel(job_id: str) -> None:
    """End a job, waiting or running, at once (SIGTERM, and SIGKILL after SLURM's KillWait).

    Raises:
        SlurmError: SLURM refused.
    """
    _order(["scancel", job_id])


def head_node() -> str:
    """Address of the first node of the job that this process is part of.

    Raises:
        SlurmError: this is no SLURM job.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise SlurmError("this is not inside a SLURM job (SLURM_JOB_NODELIST is not set)")
    first = _order(["scontrol", "show", "hostnames", nodes]).split()[0]
    found = re.search(r"NodeAddr=(\S+)", _order(["scontrol", "show", "node", first]))
    return found.group(1) if found else first


def _from_scontrol(job_id: str) -> JobState | None:
    result = _ask(["scontrol", "show", "job", job_id, "-o"])
    if result is None:
        return None
    fields = dict(re.findall(r"(\w+)=(\S*)", result.splitlines()[0]))
    if "JobState" not in fields:
        return None
    reason, nodes = fields.get("Reason", ""), fields.get("NodeList", "")
    empty = ("None", "(null)")
    return JobState(
        fields["JobState"],
        "" if reason in empty else reason,
        "" if nodes in empty else nodes,
        int(fields.get("Restarts", "0") or 0),
    )


def _from_sacct(job_id: str) -> JobState | None:
    result = _ask(["sacct", "-X", "-n", "-P", "-j", job_id, "-o", "State,Reason,NodeList,Restarts"])
    if result is None:
        return None
    state, reason, nodes, restarts = (result.splitlines()[-1].split("|") + [""] * 4)[:4]
    return JobState(
        state.split()[0],  # "CANCELLED by 1000"
        "" if reason == "None" else reason,
        "" if nodes.startswith("None") else nodes,
        int(restarts) if restarts.isdecimal() else 0,
    )


def _ask(command: list[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        result = _run(command)
    except SlurmError:
        return None
    return result.stdout if result.returncode == 0 and result.stdout.strip() else None


def _order(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not on PATH: run this on a machine of the cluster")
    result = _run(command)
    if result.returncode:
        raise SlurmError(f"{' '.join(command)}: {_message(result)}")
    return result.stdout


def _run(command: list[str], environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            env=None if environ is None else dict(environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer within {_TIMEOUT_S} s: is slurmctld up?") from None


def _message(result: "subprocess.CompletedProcess[str]") -> str:
    text = (result.stderr.strip() or result.stdout.strip()).splitlines()
    return "; ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in text) or "no reason given"
