"""Which samples make a global batch, who reads them, and how the others get them.

Sample numbers are the only state of the data order: a step of global batch size G uses the samples
consumed ... consumed + G - 1, whatever the layout.  Microbatch m of data-parallel rank r takes

    consumed + (m DP + r) b ... + b - 1

so the union over ranks is the same for every DP size and micro-batch size.  Tensor-parallel rank 0 of the first and
last pipeline stages reads, ahead and in threads; the others of its group receive one broadcast per step.  Attention
inside documents needs their boundaries on every stage: then the first stage alone reads, and one broadcast reaches the
whole replica.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from pipeline.config import Config
from pipeline.data.errors import DataError
from pipeline.data.phases import Phases
from pipeline.data.prefetch import Prefetcher
from pipeline.world import World


class Windows(Protocol):
    """What this module asks of a dataset."""

    def windows(self, samples: list[int]) -> np.ndarray:
        """int64 [len(samples), seq_length + 1] for numbers of the endless sample stream; called by several threads."""


@dataclass(frozen=True)
class StepSamples:
    """What this rank trains on in one step."""

    first: int
    """First sample of the global batch."""
    samples: list[int]
    """This rank's samples, microbatch after microbatch."""
    seq_length: int


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
        dataset: where windows come from; None on ranks that do not read.
        world: this process's place in the layout.
        config: the run.
        phases: batch size and sequence length over the samples.
    """

    def __init__(self, dataset: Windows | None, world: World, config: Config, phases: Phases) -> None:
        self.dataset, self.world, self.phases = dataset, world, phases
        self._micro_batch_size, self._data = config.training.micro_batch_size, config.data
        self._whole_replica = config.data.attention == "document"
        self.needs_tokens = self._whole_replica or world.is_first_stage or world.is_last_stage
        self._reads = reads_tokens(config, world)
        self._ahead: Prefetcher[StepSamples, np.ndarray | DataError | OSError] | None = None
        self._next_sample = -1
        self.wait_seconds = 0.0
        """Time spent waiting for tokens since the last reset."""
        self.problem: DataError | OSError | None = None
        """Why `read` returned zeros: the step goes on, so that the other ranks hear of it in its all-reduce."""

    def plan(self, first: int) -> StepSamples:
        """The step that begins with sample `first`."""
        phase, world = self.phases.at(first), self.world
        count = phase.global_batch_size // (self._micro_batch_size * world.dp_size)
        samples = samples_of_rank(first, count, self._micro_batch_size, world.dp_rank, world.dp_size)
        return StepSamples(first, samples, phase.seq_length)

    def step(self, plan: StepSamples) -> Tensor | None:
        """Tokens of a training step, int64 [M, b, s + 1]; None on pipeline stages that need none.

        Asked for in order, the steps are read ahead; a step elsewhere starts anew from there.
        """
        if not self._reads:
            return self._receive(plan.samples, plan.seq_length, None)
        start = time.perf_counter()
        if self._ahead is None or plan.first != self._next_sample:
            self._read_ahead_from(plan.first)
        assert self._ahead is not None
        windows = next(self._ahead)
        self._next_sample = plan.first + self.phases.at(plan.first).global_batch_size
        self.wait_seconds += time.perf_counter() - start
        return self._receive(plan.samples, plan.seq_length, windows)

    def read(self, samples: list[int], seq_length: int) -> Tensor | None:
        """Tokens of any samples, as `step` returns them, read now."""
        return self._receive(samples, seq_length, self._try_windows(samples) if self._reads else None)

    def forget_ahead(self) -> None:
        """Drop what was read ahead, because other chunks are known to be bad now."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def close(self) -> None:
        """Stop reading."""
        self.forget_ahead()

    def _read_ahead_from(self, first: int) -> None:
        self.forget_ahead()
        self._ahead = Prefetcher(
            lambda plan: self._try_windows(plan.samples),
            self._plans(first),
            threads=self._data.prefetch_threads,
            depth=self._data.prefetch_batches,
        )

    def _plans(self, first: int) -> Iterator[StepSamples]:
        while True:
            yield self.plan(first)
            first += self.phases.at(first).global_batch_size

    def _try_windows(self, samples: list[int]) -> np.ndarray | DataError | OSError:
        assert self.dataset is not None
        try:
            return self.dataset.windows(samples)
        except (DataError, OSError) as error:
            return error

    def _receive(
        self, samples: list[int], seq_length: int, windows: np.ndarray | DataError | OSError | None
    ) -> Tensor | None:
        if not self.needs_tokens:
            return None
        shape = (len(samples) // self._micro_batch_size, self._micro_batch_size, seq_length + 1)
        device = self.world.device
        if isinstance(windows, np.ndarray):
            tokens = torch.from_numpy(windows).view(shape).to(device)
        elif windows is not None:
            self.problem, tokens = windows, torch.zeros(shape, dtype=torch.int64, device=device)
        else:
            tokens = torch.empty(shape, dtype=torch.int64, device=device)
        if self._whole_replica:
            group, source = parallel_state.get_model_parallel_group(), parallel_state.get_model_parallel_src_rank()
        else:
            group = parallel_state.get_tensor_model_parallel_group()
            source = parallel_state.get_tensor_model_parallel_src_rank()
        if group.size() > 1:
            dist.broadcast(tokens, source, group=group)
        return tokens


def reads_tokens(config: Config, world: World) -> bool:
    """Whether this rank reads shards; the others are sent what they need."""
    if config.data.attention == "document":
        return world.tp_rank == 0 and world.is_first_stage
    return world.tp_rank == 0 and (world.is_first_stage or world.is_last_stage)
