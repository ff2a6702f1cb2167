"""Exit codes of ranks and of the commands that start them; a batch script decides by them whether to start again.

torchrun and srun blur codes (torchrun turns all into 1, srun reports the largest of its tasks), so `pipeline.torchrun`
passes the first failing rank's code on, and each node writes its own to `launch/attempts/<n>/exit.<node>` of the run.
No torch here: the `qsparse` command reads these on a login node.
"""

import signal
from enum import IntEnum


class ExitCode(IntEnum):
    """What became of a process of a run."""

    DONE = 0
    """Completed, or saved and stopped: status.json says which."""
    ERROR = 1
    """An error without a name of its own."""
    USER_ERROR = 2
    """A mistake in configuration, data or checkpoint; restarting does not help."""
    NOT_FINITE = 3
    """Loss, gradient or weights are not numbers; restarting does not help."""
    HANG = 4
    """The watchdog ended ranks that made no progress."""
    PREFLIGHT = 5
    """A node failed the preflight."""
    OUT_OF_MEMORY = 6
    """The device's or the process's memory did not suffice."""


FINAL = (ExitCode.USER_ERROR, ExitCode.NOT_FINITE)
"""After these a job is not started again."""

_NAMES = {
    ExitCode.USER_ERROR: "config",
    ExitCode.NOT_FINITE: "nan",
    ExitCode.HANG: "hang",
    ExitCode.PREFLIGHT: "preflight",
    ExitCode.OUT_OF_MEMORY: "oom",
    128 + signal.SIGKILL: "killed",
}


def failure_name(code: int) -> str:
    """One word for a failure: config, nan, hang, preflight, oom, killed (SIGKILL) or error."""
    return _NAMES.get(code, "error")
