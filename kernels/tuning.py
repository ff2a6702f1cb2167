"""The fastest of a kernel's configurations for one problem: timed once, then kept in Triton's cache folder.

Triton's own autotuner keeps no choice between configurations with hooks, and kernels that read through tensor
descriptors need one, which sets the blocks: every process timed them anew, and might choose others than the run that it
resumed.  What is kept is for one GPU model, Triton version, kernel source and list of configurations; TRITON_CACHE_DIR
says where (`~/.triton/cache` unless set).
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.cache import get_cache_manager
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench

Timer = Callable[[Callable[[], None]], float]
FILE = "choice.json"
Config = TypeVar("Config")


class Tuner(Generic[Config]):
    """Chooses between configurations of one kernel.

    Args:
        kernel: the compiled function; another source asks for another choice.
        configs: what is tried, in this order; each with a `repr` that says all of it.
        timer: milliseconds of a call.
    """

    def __init__(self, kernel: Any, configs: Sequence[Config], timer: Timer = do_bench) -> None:
        self._kernel, self._configs, self._timer = kernel, tuple(configs), timer
        self._chosen: dict[tuple[object, ...], Config] = {}

    def choose(self, problem: tuple[object, ...], device: torch.device, launch: Callable[[Config], None]) -> Config:
        """The fastest configuration for `problem`.

        Args:
            problem: sizes, types and layouts that the speed depends on.
            device: where it runs.
            launch: runs the kernel with a configuration; called many times, so it may not add to its result.

        Raises:
            RuntimeError: no configuration runs on this GPU.
        """
        if len(self._configs) == 1:
            return self._configs[0]
        key = (*problem, device)
        if key not in self._chosen:
            self._chosen[key] = self._configs[self._kept_or_fastest(problem, device, launch)]
        return self._chosen[key]

    def _kept_or_fastest(
        self, problem: tuple[object, ...], device: torch.device, launch: Callable[[Config], None]
    ) -> int:
        gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"
        source = getattr(self._kernel, "cache_key", "")
        what = json.dumps([triton.__version__, gpu, source, list(map(repr, self._configs)), list(map(str, problem))])
        folder = get_cache_manager(hashlib.sha256(what.encode()).hexdigest())
        index = self._read(folder.get_file(FILE))
        if index is None:
            index = self._fastest(launch)
            folder.put(json.dumps({"problem": what, "choice": index}), FILE, binary=False)
        return index

    def _read(self, path: str | None) -> int | None:
        """The choice in a file; None if there is none, or it is damaged."""
        try:
            index = json.loads(Path(path).read_text())["choice"] if path else None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return index if isinstance(index, int) and 0 <= index < len(self._configs) else None

    def _fastest(self, launch: Callable[[Config], None]) -> int:
        times, error = [], None
        for config in self._configs:
            try:
                times.append(self._timer(lambda config=config: launch(config)))  # type: ignore[misc]
            except (OutOfResources, PTXASError, CompilationError) as refusal:
                times.append(math.inf)
                error = refusal
        if min(times) == math.inf:
            raise RuntimeError(f"no configuration of {self._kernel.__name__} runs on this GPU") from error
        return times.index(min(times))
