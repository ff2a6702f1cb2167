"""What is recorded of which steps; traces are read back."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from pipeline.config import ProfileConfig
from pipeline.errors import UserError
from pipeline.profiling import Profiler


def record(config: ProfileConfig, folder: Path, steps: int, *, rank: int = 0, device: str = "cpu") -> None:
    """Run steps whose number is the size of the product in them."""
    profiler = Profiler(config, folder, rank=rank, world_size=2, device=torch.device(device))
    for step in range(1, steps + 1):
        with profiler.step(step):
            torch.mm(torch.ones(step, step), torch.ones(step, step))
    profiler.close()


def products(path: Path) -> int:
    """Matrix products in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return sum(event.get("name") == "aten::mm" for event in events)


def test_a_trace_holds_the_steps_asked_for(tmp_path: Path) -> None:
    record(ProfileConfig(steps=(3, 5)), tmp_path / "profile", 8)
    assert [path.name for path in tmp_path.rglob("*.gz")] == ["trace-rank0-steps3-5.json.gz"]
    assert products(tmp_path / "profile/trace-rank0-steps3-5.json.gz") == 3


def test_a_run_that_stops_within_the_steps_leaves_a_trace(tmp_path: Path) -> None:
    record(ProfileConfig(steps=(3, 50)), tmp_path, 4)
    assert products(tmp_path / "trace-rank0-steps3-50.json.gz") == 2


def test_nothing_is_recorded_by_default_and_on_other_ranks(tmp_path: Path) -> None:
    record(ProfileConfig(), tmp_path / "profile", 3)
    record(ProfileConfig(steps=(1, 2)), tmp_path / "profile", 3, rank=1)
    assert not (tmp_path / "profile").exists()


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile.steps=\[5, 3\]: the first step comes after the last one"):
        ProfileConfig(steps=(5, 3))
    with pytest.raises(ValueError, match=r"profile.memory=steps needs profile.steps"):
        ProfileConfig(memory="steps")
    with pytest.raises(UserError, match=r"profile.ranks=\[2\]: this run has ranks 0 to 1"):
        record(ProfileConfig(steps=(1, 2), ranks=(0, 2)), tmp_path, 1)
    with pytest.raises(UserError, match=r"profile.memory records a GPU, this run is on cpu"):
        record(ProfileConfig(memory="oom"), tmp_path, 1)
