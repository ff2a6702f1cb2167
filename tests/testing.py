"""Helpers of the tests: real processes through torchrun, and real text as tokens."""

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent


class TextWindows:
    """Bytes of text as an endless stream of windows; the vocabulary is 256.

    Args:
        seq_length: tokens per window, less one.
        text: file to read; absent: the first modules of the standard library.
    """

    def __init__(self, seq_length: int, text: Path | None = None) -> None:
        files = [text] if text else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
        self._bytes = np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8)
        self._seq_length = seq_length

    def windows(self, samples: Sequence[int]) -> np.ndarray:
        """int64 [len(samples), seq_length + 1]."""
        count = (len(self._bytes) - 1) // self._seq_length
        starts = np.array([(sample * 7919) % count * self._seq_length for sample in samples])
        return self._bytes[starts[:, None] + np.arange(self._seq_length + 1)].astype(np.int64)


def rank_environment() -> dict[str, str]:
    """This process's environment with one thread per rank and the source tree in front of the search path."""
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path}


def torchrun(module: str, *arguments: str, nproc: int, timeout: float = 300) -> str:
    """Run `python -m module` in `nproc` processes; returns the output, raises with it if a process fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    result = subprocess.run(
        [*command, "--module", module, *arguments],
        cwd=ROOT,
        env={**rank_environment(), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if result.returncode:
        ranks = result.stdout.split("torch.distributed.elastic")[0]  # what follows is torchrun's own traceback
        raise AssertionError(f"{module} failed with {result.returncode}:\n{ranks[-6000:]}")
    return result.stdout
