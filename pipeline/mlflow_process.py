"""An `MLflowRun` in a process of its own: what MLflow computes does not hold the trainer's Python lock.

A delivery is some 70 us of Python per number, in the client of an SQLite store above all.  In a thread of the trainer
that time is taken from the thread that launches kernels, 2 % of a 100 ms step for 400 numbers a second.  Here the
writer thread only waits for answers, without the lock, and the work is another core's.

Requests and answers are pickles on a pair of pipes.  The process ends when its input does, so also when the trainer is
killed; it ignores signals that mean the trainer (Ctrl-C, SLURM's SIGTERM to the whole step), which wants to deliver the
rest first.  A process that was killed is started anew by the next `connect`; that resends nothing twice is MLflowRun's.
"""

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import IO, Any, NoReturn

from pipeline.mlflow_points import Point
from pipeline.mlflow_run import EndStatus, MLflowRun, RejectedError, RunDescription, StoreError, first_line
from pipeline.run_directory import RunDirectory

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class RemoteRun:
    """The calls of `MLflowRun` that `pipeline.mlflow_tracker` needs; each blocks, and raises StoreError.

    Args:
        description: as of MLflowRun.
        directory: as of MLflowRun.
    """

    def __init__(self, description: RunDescription, directory: RunDirectory) -> None:
        self._arguments = (description, directory)
        self._process: subprocess.Popen[bytes] | None = None
        self.url: str | None = None

    def prepare(self) -> None:
        """Start the process, which imports mlflow and brings an SQLite store to the current schema."""
        command = [sys.executable, "-m", "pipeline.mlflow_process"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._send(self._arguments)
        self._call("prepare")

    def connect(self) -> None:
        """Find or create the run, in a new process if the last one is gone."""
        if self._process is None:
            self.prepare()
        self.url = self._call("connect")

    def send(self, points: Sequence[Point]) -> None:
        """Log points.

        Raises:
            RejectedError: the store refuses them for good.
        """
        self._call("send", points)

    def upload(self) -> None:
        """Upload files that are new or have changed."""
        self._call("upload")

    def finish(self, status: EndStatus) -> None:
        """End the run in the store."""
        self._call("finish", status)

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            with suppress(OSError), process:  # closes both pipes and waits
                pass

    def _call(self, method: str, *arguments: Any) -> Any:
        self._send((method, arguments))
        kind, value = self._receive()
        if kind == "rejected":
            raise RejectedError(value)
        if kind == "failed":
            raise StoreError(value)
        return value

    def _send(self, message: Any) -> None:
        try:
            _write(self._pipe("stdin"), message)
        except OSError as error:
            self._lost(error)

    def _receive(self) -> Any:
        try:
            return pickle.load(self._pipe("stdout"))
        except (OSError, EOFError) as error:
            self._lost(error)

    def _lost(self, error: Exception) -> NoReturn:
        process = self._process
        if process is not None:
            process.kill()
        self.close()
        code = process.returncode if process is not None else None
        raise StoreError(f"the process that writes to MLflow is gone (exit code {code})") from error

    def _pipe(self, name: str) -> IO[bytes]:
        if self._process is None:
            raise StoreError("RemoteRun is used before prepare()")
        pipe: IO[bytes] = getattr(self._process, name)
        return pipe


def _write(pipe: IO[bytes], message: Any) -> None:
    pipe.write(pickle.dumps(message))
    pipe.flush()


def main() -> None:
    """Answer requests until the input ends."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not be among the answers
    run = MLflowRun(*pickle.load(requests))
    while True:
        try:
            method, arguments = pickle.load(requests)
        except EOFError:
            return
        answer: tuple[str, Any]
        try:
            getattr(run, method)(*arguments)
            answer = ("done", run.url)
        except RejectedError as error:
            answer = ("rejected", first_line(error))
        except Exception as error:
            answer = ("failed", first_line(error))
        try:
            _write(answers, answer)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
