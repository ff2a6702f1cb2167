"""Recording some steps of a run: a trace, a snapshot of GPU memory, ranges for Nsight Systems.

    <run>/profile/trace-rank0-steps11-13.json.gz      open in https://ui.perfetto.dev or chrome://tracing
    <run>/profile/memory-rank0-steps11-13.pickle      open in https://pytorch.org/memory_viz
    <run>/profile/memory-rank0-oom.pickle             what lay in memory when it did not suffice

Nothing is recorded unless `profile` says so.  Memory history is recorded from the start, since what a step finds in
memory was allocated before it.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config import ProfileConfig
from pipeline.errors import UserError

_MEMORY_EVENTS = 200_000


class Profiler:
    """Records the steps of one rank; of others nothing.

    Args:
        config: what to record.
        folder: where to.
        rank: this process's.
        world_size: number of ranks.
        device: this rank's.

    Raises:
        UserError: a recording that needs a GPU, or a rank that does not exist.
    """

    def __init__(
        self, config: ProfileConfig, folder: Path, *, rank: int, world_size: int, device: torch.device
    ) -> None:
        if wrong := [number for number in config.ranks if number >= world_size]:
            raise UserError(f"profile.ranks={wrong}: this run has ranks 0 to {world_size - 1}")
        if device.type != "cuda" and (config.nsys or config.memory != "off"):
            key = "profile.nsys" if config.nsys else "profile.memory"
            raise UserError(f"{key} records a GPU, this run is on {device.type}; profile.trace works everywhere")
        self._config, self._folder, self._rank, self._device = config, folder, rank, device
        self._is_mine = rank in config.ranks
        self._recording: ExitStack | None = None
        if self._is_mine and config.memory != "off":
            torch.cuda.memory._record_memory_history(max_entries=_MEMORY_EVENTS)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around step `step`, counted from 1; out of memory, the snapshot is written."""
        first, last = self._config.steps or (0, 0)
        if self._is_mine and step == first:
            self._start(f"steps{first}-{last}")
        try:
            yield
        except torch.OutOfMemoryError:
            if self._is_mine and self._config.memory != "off":
                self._write_memory("oom")
            raise
        if step == last:
            self.close()

    def close(self) -> None:
        """End a recording that is under way, also of a run that stops within it, and write it."""
        recording, self._recording = self._recording, None
        if recording is not None:
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            recording.close()

    def _start(self, name: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._recording = recording = ExitStack()
        if self._config.memory == "steps":
            recording.callback(self._write_memory, name)
        if self._config.nsys:
            recording.enter_context(torch.cuda.profiler.profile())
            recording.enter_context(torch.autograd.profiler.emit_nvtx())
        elif self._config.trace:
            recording.enter_context(self._trace(name))

    def _trace(self, name: str) -> profile:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        path = self._folder / f"trace-rank{self._rank}-{name}.json.gz"
        return profile(activities=activities, on_trace_ready=lambda found: found.export_chrome_trace(str(path)))

    def _write_memory(self, name: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-rank{self._rank}-{name}.pickle"))
