"""Which samples make a global batch, who reads them, and how the others get them.

Sample numbers are the only state of the data order: step t of a run with global batch size G uses the samples
consumed ... consumed + G - 1, whatever the layout.  Microbatch m of data-parallel rank r takes

    consumed + (m DP + r) b ... + b - 1

so the union over ranks is the same for every DP size and micro-batch size.  Only tensor-parallel rank 0 of the first
and last pipeline stages reads; the others of its group receive one broadcast per step.
"""

import time
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pipeline.data.errors import DataError
from pipeline.world import World


class Windows(Protocol):
    """What this module asks of a dataset."""

    def windows(self, samples: list[int]) -> np.ndarray:
        """int64 [len(samples), seq_length + 1] for numbers of the endless sample stream."""


def samples_of_rank(first: int, num_microbatches: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> list[int]:
    """Sample numbers of one data-parallel rank in one global batch, microbatch after microbatch."""
    return [
        first + (m * dp_size + dp_rank) * micro_batch_size + i
        for m in range(num_microbatches)
        for i in range(micro_batch_size)
    ]


class BatchReader:
    """Reads or receives the microbatches of this rank.

    Args:
        dataset: where windows come from; used on reading ranks only.
        world: this process's place in the layout.
        seq_length: s.
    """

    def __init__(self, dataset: Windows, world: World, seq_length: int) -> None:
        self.dataset, self.world, self.seq_length = dataset, world, seq_length
        self.needs_tokens = world.is_first_stage or world.is_last_stage
        self.wait_seconds = 0.0
        """Time spent reading since the last reset."""
        self.problem: DataError | OSError | None = None
        """Why `read` returned zeros: the step goes on, so that the other ranks hear of it in its all-reduce."""

    def read(self, samples: list[int], micro_batch_size: int) -> Tensor | None:
        """int64 [M, b, s + 1] on first and last pipeline stages, None between them."""
        if not self.needs_tokens:
            return None
        shape = (len(samples) // micro_batch_size, micro_batch_size, self.seq_length + 1)
        if self.world.tp_rank == 0:
            start = time.perf_counter()
            tokens = torch.from_numpy(self._windows(samples)).view(shape).to(self.world.device)
            self.wait_seconds += time.perf_counter() - start
        else:
            tokens = torch.empty(shape, dtype=torch.int64, device=self.world.device)
        group = parallel_state.get_tensor_model_parallel_group()
        if group.size() > 1:
            dist.broadcast(tokens, parallel_state.get_tensor_model_parallel_src_rank(), group=group)
        return tokens

    def _windows(self, samples: list[int]) -> np.ndarray:
        try:
            return self.dataset.windows(samples)
        except (DataError, OSError) as error:
            self.problem = error
            return np.zeros((len(samples), self.seq_length + 1), dtype=np.int64)
