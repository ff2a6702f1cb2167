"""Choices between configurations: timed once, kept for the next process, made again when the file is damaged."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from triton.runtime.errors import OutOfResources

from kernels.tuning import Tuner

CPU = torch.device("cpu")
PROBLEM = (64, 32, torch.bfloat16)


class Kernel:
    """What is asked of a kernel: a name, and a hash of its source."""

    def __init__(self, source: str = "") -> None:
        self.__name__, self.cache_key = "kernel", source


class Watch:
    """Seconds of each configuration, and which were timed; what is negative does not fit the GPU."""

    def __init__(self, **milliseconds: float) -> None:
        self.milliseconds, self.timed = milliseconds, list[str]()

    def launch(self, config: str) -> None:
        self.timed.append(config)
        if self.milliseconds[config] < 0:
            raise OutOfResources(1, 0, "shared memory")

    def __call__(self, call: Callable[[], None]) -> float:
        call()
        return self.milliseconds[self.timed[-1]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def choose(watch: Watch, problem: tuple[object, ...] = PROBLEM, source: str = "") -> str:
    """As a new process does."""
    return Tuner(Kernel(source), list(watch.milliseconds), watch).choose(problem, CPU, watch.launch)


def test_the_fastest_is_kept_for_the_next_process() -> None:
    assert choose(Watch(small=2, large=1)) == "large"
    later = Watch(small=0, large=9)
    assert choose(later) == "large"
    assert not later.timed


def test_one_process_times_once() -> None:
    watch = Watch(small=1, large=2)
    tuner = Tuner(Kernel(), ["small", "large"], watch)
    assert [tuner.choose(PROBLEM, CPU, watch.launch) for _ in range(3)] == ["small"] * 3
    assert watch.timed == ["small", "large"]


@pytest.mark.parametrize(
    ("problem", "source"), [((64, 33, torch.bfloat16), ""), ((64, 32, torch.int8), ""), (PROBLEM, "changed")]
)
def test_another_problem_or_source_is_timed_anew(problem: tuple[object, ...], source: str) -> None:
    choose(Watch(small=1, large=2))
    assert choose(Watch(small=2, large=1), problem, source) == "large"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"choice": 2}', '{"choice": "small"}', '{"choice": -1}'])
def test_a_damaged_file_is_replaced(text: str, folder: Path) -> None:
    choose(Watch(small=1, large=2))
    (file,) = folder.rglob("choice.json")
    file.write_text(text)
    assert choose(Watch(small=2, large=1)) == "large"
    assert choose(Watch(small=1, large=2)) == "large"


def test_what_does_not_fit_the_gpu_is_passed_over() -> None:
    assert choose(Watch(small=2, large=-1)) == "small"


def test_nothing_fits() -> None:
    with pytest.raises(RuntimeError, match="no configuration of kernel runs on this GPU"):
        choose(Watch(small=-1, large=-1))


def test_a_single_configuration_is_never_timed() -> None:
    watch = Watch(only=-1)
    assert choose(watch) == "only"
    assert not watch.timed
