"""Ends a run in which a rank stands still, and says which rank, where, and in which collective the others wait.

A rank that is stuck (a dead network link, a file system that does not answer, a process that was stopped) leaves the
others in their next collective until the process group's time-out, ten minutes later, with an error that names neither
the rank nor the reason.  So each rank has a thread that expects a sign of life per step.  When none came for
`watchdog.step_seconds`, all ranks are in the same situation, and each writes into `<run>/hang/<start>/`

    rank-00001.json      its `pipeline.hang_report.Position`: step, line of code, collective, calls per process group
    rank-00001.stacks    the stacks of all its threads
    rank-00001.recorder  torch's flight recorder, the last collectives (for `torch.distributed.flight_recorder`)

The lowest rank that reports compares them, writes report.txt and status.json, and all exit with code 4, by `os._exit`
since the main thread does not return.  Files are the channel because the network may be what fails.

Time counts only while this process runs: a suspended job (SIGSTOP of all ranks, `scontrol suspend`) is no hang.
"""

import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Self, TextIO

from pipeline.config import WatchdogConfig
from pipeline.exit_codes import ExitCode, failure_name
from pipeline.hang_report import Position, Verdict, judge
from pipeline.run_directory import RunDirectory, write_atomic

Phase = Literal["start", "step", "evaluation", "checkpoint", "end"]

_POLL_SECONDS = 1.0
_GATHER_SECONDS = 15.0
"""How long a rank waits at most for the reports of the others, whose watches run a little differently."""
_ROOT = Path(__file__).parent.parent


class Watchdog:
    """Watches the main thread of one rank while the context lasts.

    Args:
        directory: the run.
        settings: time limits.
        rank: this process.
        world_size: number of ranks.
        host: name of this node.
        start: name of this start of the run, the same on all ranks and different from earlier starts.
    """

    def __init__(
        self, directory: RunDirectory, settings: WatchdogConfig, *, rank: int, world_size: int, host: str, start: str
    ) -> None:
        self.folder = directory.path / "hang" / start
        self._directory, self._settings = directory, settings
        self._rank, self._world_size, self._host = rank, world_size, host
        self._main_thread = threading.main_thread().ident
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._phase: Phase = "start"
        self._step = 0
        self._idle = 0.0

    def beat(self, phase: Phase, step: int) -> None:
        """A sign of life: `phase` of optimizer step `step` begins."""
        self._phase, self._step, self._idle = phase, step, 0.0

    @property
    def limit(self) -> float:
        """Seconds that the present phase may take."""
        return self._settings.step_seconds if self._phase == "step" else self._settings.other_seconds

    def __enter__(self) -> Self:
        if self._settings.step_seconds:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(min(_POLL_SECONDS, self.limit / 4)):
            now = time.monotonic()
            self._idle += min(now - last, 2 * _POLL_SECONDS)  # a longer gap: this process did not run either
            last = now
            if self._idle > self.limit:
                self._end()

    def _end(self) -> None:
        try:
            self._write_own()
            verdict = self._await_verdict()
            print(f"error: rank {self._rank}: {verdict}", file=sys.stderr, flush=True)
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(ExitCode.HANG)

    def _write_own(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._file("stacks").open("w", encoding="utf-8") as file:
            _dump_stacks(file)
        entries = self._record()
        frame = sys._current_frames().get(self._main_thread or 0)
        collective, called = read_recorder(entries)
        position = Position(
            *(self._rank, self._host, self._phase, self._step, round(self._idle, 1), place_of(frame)),
            collective=collective or collective_of(frame),
            called=called,
        )
        write_atomic(self._file("json"), json.dumps(position.to_json(), indent=2) + "\n")

    def _record(self) -> list[dict[str, Any]]:
        """Entries of torch's flight recorder, after writing all of it; empty where torch has none."""
        from torch._C import _distributed_c10d as c10d

        name = next((n for n in ("_dump_fr_trace", "_dump_nccl_trace") if hasattr(c10d, f"{n}_json")), None)
        if name is None:
            return []
        self._file("recorder").write_bytes(getattr(c10d, name)())
        entries: list[dict[str, Any]] = json.loads(getattr(c10d, f"{name}_json")()).get("entries", [])
        return entries

    def _await_verdict(self) -> str:
        report = self.folder / "report.txt"
        patience = min(_GATHER_SECONDS, 2 * self.limit)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and len(self._found()) < self._world_size:
            time.sleep(0.2)
        found = self._found()
        if min(found) == self._rank:
            self._publish(judge([found.get(rank) for rank in range(self._world_size)]), report)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and not report.exists():
            time.sleep(0.2)
        return report.read_text(encoding="utf-8").splitlines()[0] if report.exists() else "hang"

    def _found(self) -> dict[int, Position]:
        positions = (Position(**json.loads(file.read_text())) for file in self.folder.glob("rank-*.json"))
        return {position.rank: position for position in positions}

    def _publish(self, verdict: Verdict, report: Path) -> None:
        key = "step_seconds" if self._phase == "step" else "other_seconds"
        reason = f"no progress for {self.limit:g} s (watchdog.{key}) in {self._phase} {self._step}: {verdict.summary}"
        print(f"error: {reason}\n{verdict.text}", file=sys.stderr, flush=True)
        status = self._directory.read_status() or {"step": self._step}
        details = {"failure": failure_name(ExitCode.HANG), "report": str(report)}
        self._directory.write_status("failed", status["step"], reason, **details)
        write_atomic(report, f"{reason}\n{verdict.text}\nstacks and flight recorder: {self.folder}\n")

    def _file(self, suffix: str) -> Path:
        return self.folder / f"rank-{self._rank:05d}.{suffix}"


def _dump_stacks(file: TextIO) -> None:
    faulthandler.dump_traceback(file=file, all_threads=True)


def place_of(frame: FrameType | None) -> str:
    """The innermost line of our own code on a stack, or of any code if there is none."""
    first = frame
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_ours = path.is_relative_to(_ROOT) and "site-packages" not in path.parts
        if is_ours and frame.f_code.co_name != "__torch_function__":  # of cpu_backend: around every operation
            return f"{path.relative_to(_ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    if first is None:
        return "an unknown place"
    return f"{Path(first.f_code.co_filename).name}:{first.f_lineno} {first.f_code.co_name}"


def collective_of(frame: FrameType | None) -> str | None:
    """Name of the torch.distributed operation on a stack, outermost of its module; None if there is none."""
    found = None
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.distributed.distributed_c10d":
            found = frame.f_code.co_name
        frame = frame.f_back
    return found


def read_recorder(entries: list[dict[str, Any]]) -> tuple[str | None, dict[str, int]]:
    """(the oldest operation that has not ended, operations called per process group) of flight-recorder entries."""
    called: dict[str, int] = {}
    pending = None
    for entry in entries:
        group = entry["process_group"][1] + " " + entry["process_group"][0]
        if not entry.get("is_p2p"):
            called[group] = max(called.get(group, 0), int(entry["collective_seq_id"]))
        if pending is None and not entry.get("retired") and entry.get("state") != "completed":
            name = str(entry["profiling_name"]).partition(":")[2] or str(entry["profiling_name"])
            pending = f"{name} {entry['collective_seq_id']} of group {group}"
    return pending, called
