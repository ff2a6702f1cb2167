"""One start at a time owns a run, and status.json does not outlive the truth.

Two starts of one run at once (a job requeued while its predecessor still saves, a command entered twice) would write
the same metrics and remove each other's checkpoints.  Rank 0 therefore holds a lock on `<run.root>/.locks/<run.name>`
as long as the processes live.  It is a POSIX record lock: the kernel drops it with the process, however that ends, and
forked children do not inherit it, so a killed run can be resumed at once.  On file systems without locks there is none.

What no process can do is to correct its own status after kill -9: if all ranks are killed at once, status.json goes on
saying `running` until the run is resumed.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.errors import AgreedError, UserError
from pipeline.run_directory import RunDirectory
from pipeline.world import World, agreement

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def owned(directory: RunDirectory, world: World) -> Iterator[None]:
    """Own the run while the block runs; an error that leaves the block is in status.json afterwards; collective.

    The status is corrected only if it claims a run that goes on or waits to be resumed: a mistaken command on a run
    that has ended changes nothing.  A rank other than 0 that fails alone writes the cause; rank 0, which then fails
    because a peer is gone, keeps it.

    Raises:
        UserError: another process owns the run.
    """
    lock: TextIO | None = None
    with agreement():
        if world.is_main:
            lock = _lock(directory)
    try:
        yield
    except BaseException as error:
        if world.is_main or not isinstance(error, AgreedError):
            _correct_status(directory, f"{describe(error)}" + ("" if world.is_main else f" (on rank {world.rank})"))
        raise
    finally:
        if lock is not None:
            lock.close()


def describe(error: BaseException) -> str:
    """An error as one line; errors that speak for themselves go without their class."""
    return str(error) if isinstance(error, AgreedError) else f"{type(error).__name__}: {error}"


def _correct_status(directory: RunDirectory, reason: str) -> None:
    status = directory.read_status()
    if status is not None and status["state"] in ("running", "stopped"):
        directory.write_status("failed", status["step"], reason)


def _lock(directory: RunDirectory) -> TextIO:
    path: Path = directory.path.parent / ".locks" / directory.path.name
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return file
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"run {directory.path} is being trained by {owner}; wait for it, stop it, or choose another run.name"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
