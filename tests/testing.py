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
    """Bytes of the standard library's source as an endless stream of windows; the vocabulary is 256."""

    def __init__(self, seq_length: int, num_files: int = 40) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:num_files]
        self._bytes = np.frombuffer(b"".join(file.read_bytes() for file in files), dtype=np.uint8)
        self._seq_length = seq_length

    def windows(self, samples: Sequence[int]) -> np.ndarray:
        """int64 [len(samples), seq_length + 1]."""
        count = (len(self._bytes) - 1) // self._seq_length
        starts = np.array([(sample * 7919) % count * self._seq_length for sample in samples])
        return self._bytes[starts[:, None] + np.arange(self._seq_length + 1)].astype(np.int64)


def torchrun(module: str, *arguments: str, nproc: int, timeout: float = 300) -> str:
    """Run `python -m module` in `nproc` processes; returns the output, raises with it if a process fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)]
    result = subprocess.run(
        [*command, "--module", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if result.returncode:
        raise AssertionError(
            f"{module} {' '.join(arguments)} failed with {result.returncode}:\n{result.stdout[-6000:]}"
        )
    return result.stdout
