"""Processes, devices and process groups of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from pipeline.config import Config
from pipeline.cpu_backend import uses_cpu


@dataclass(frozen=True)
class World:
    """This process's place in the layout."""

    rank: int
    size: int
    device: torch.device
    dp_rank: int
    dp_size: int
    tp_rank: int
    is_first_stage: bool
    is_last_stage: bool

    @property
    def is_main(self) -> bool:
        """True on the one process that prints, tracks and writes run files."""
        return self.rank == 0


@contextmanager
def parallel_world(config: Config) -> Iterator[World]:
    """Join the process group, build megatron-core's groups, and take everything down in order at the end.

    Raises:
        ConfigError: the number of processes does not fit the layout.
    """
    cpu = uses_cpu(config.run.device)
    if not cpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        torch.set_num_threads(config.run.threads)
    torch.use_deterministic_algorithms(config.run.deterministic)
    config.check_world_size(int(os.environ["WORLD_SIZE"]))
    dist.init_process_group("gloo" if cpu else "nccl", timeout=timedelta(minutes=10))
    try:
        initialize_layout(config)
        yield current_world(config)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def initialize_layout(config: Config) -> None:
    """megatron-core's process groups and random state for the layout of `config`."""
    parallel = config.parallel
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp or parallel.tp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(config.run.seed, force_reset_rng=True)


def current_world(config: Config) -> World:
    """This process's place in the layout that is initialized."""
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=torch.device("cpu")
        if uses_cpu(config.run.device)
        else torch.device("cuda", torch.cuda.current_device()),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        is_first_stage=parallel_state.is_pipeline_first_stage(ignore_virtual=True),
        is_last_stage=parallel_state.is_pipeline_last_stage(ignore_virtual=True),
    )
