"""Starts `qsparse train` as a user does, and does to its processes what clusters do."""

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil

from tests.testing import ROOT, rank_environment

MARK = "QSPARSE_TEST_PROCESS"
POLL_SECONDS = 0.01
TIMEOUT_SECONDS = 120.0


class Training:
    """A running `python -m launch train`; `output` is what it printed so far."""

    def __init__(self, config: Path, *overrides: str, log: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "launch", "train", str(config), *overrides],
                cwd=ROOT,
                env={**rank_environment(), MARK: self._mark},
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self, seconds: float = TIMEOUT_SECONDS) -> int:
        return self._process.wait(seconds)

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that happens while the processes run."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert self._process.poll() is None, f"ended with {self._process.returncode}:\n{self.output[-4000:]}"
            assert time.monotonic() < deadline, f"never happened:\n{self.output[-4000:]}"
            time.sleep(POLL_SECONDS)

    def kill_all(self, while_: Callable[[], bool] = lambda: True) -> bool:
        """kill -9 of all processes if the condition holds while all of them stand still; else let them go on."""
        processes = list(self._stopped())
        holds = while_()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill() if holds else process.resume()
        if holds:
            self.wait()
            _, alive = psutil.wait_procs(processes, timeout=TIMEOUT_SECONDS)  # a killed process takes a moment to go
            assert not alive, alive
        return holds

    def kill_rank(self, rank: int) -> None:
        """kill -9 of one rank; the helpers that it forked, the other ranks and the launcher are left alone."""
        (found,) = [process for process in self.processes() if _is_rank(process, rank)]
        found.kill()

    def processes(self) -> list[psutil.Process]:
        """All living processes of this start, orphans included."""
        return [process for process in psutil.process_iter() if _environ(process).get(MARK) == self._mark]

    def _stopped(self) -> Iterator[psutil.Process]:
        seen: set[psutil.Process] = set()
        while new := set(self.processes()) - seen:  # a process may fork before it is its turn
            for process in new:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
                    yield process
            seen |= new


def _environ(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except psutil.Error:
        return {}


def _is_rank(process: psutil.Process, rank: int) -> bool:
    parent = process.parent()
    return _environ(process).get("RANK") == str(rank) and parent is not None and "RANK" not in _environ(parent)
