"""Processes, devices and process groups of a run."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from pipeline.config import Config
from pipeline.cpu_backend import uses_cpu
from pipeline.errors import AgreedError, UserError

T = TypeVar("T")


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
    """Join the process group, build megatron-core's groups, and take everything down in order at the end."""
    cpu = uses_cpu(config.run.device)
    if cpu and config.run.cuda_graph:
        found = f"run.device={config.run.device} found none"
        raise UserError(f"run.cuda_graph=true needs a GPU, and {found}: set run.cuda_graph=false")
    if not cpu:
        local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local_rank >= gpus:
            raise UserError(
                f"run.device={config.run.device}: process {local_rank} of this machine has no GPU, torch finds {gpus}; "
                "start one process per GPU (--nproc, parallel.*), or use run.device=cpu"
            )
        torch.cuda.set_device(local_rank)
    else:
        torch.set_num_threads(config.run.threads)
    torch.use_deterministic_algorithms(config.run.deterministic)
    dist.init_process_group("gloo" if cpu else "nccl", timeout=timedelta(minutes=10))
    try:
        initialize_layout(config)
        yield current_world(config)
    except AgreedError:
        dist.barrier()  # torchrun ends the others when one rank is gone: rank 0 must have written its records
        raise
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
    if config.run.cuda_graph:
        # Autograd brings a parameter's gradient home to the stream that its hooks were made on: nothing of a captured
        # step may wait for the default stream, so the whole process leaves it.
        torch.cuda.set_stream(torch.cuda.Stream())
    tensor_parallel.model_parallel_cuda_manual_seed(
        config.run.seed, use_cudagraphable_rng=config.run.cuda_graph, force_reset_rng=True
    )


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


@contextmanager
def agreement() -> Iterator[None]:
    """A block in which some ranks may find a mistake: if any does, all ranks raise.

    The block itself must not hold collectives that a failing rank would leave out.  Its end is a barrier.

    Raises:
        UserError: what was found (ValueError or OSError), and by whom if not by everyone.
    """
    problem: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = error
    raise_together(problem)


def on_main(work: Callable[[], T]) -> T:
    """The result of `work`, which runs on rank 0 alone; collective.

    Raises:
        UserError: what `work` found (ValueError or OSError).
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome, 0)
    result, problem = outcome
    if problem is not None:
        raise UserError(problem)
    return cast(T, result)


def raise_together(problem: Exception | None) -> None:
    """Raise on all ranks if any rank has a problem; collective.

    Raises:
        UserError: the problems, and the ranks that have them if not all do.
    """
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, None if problem is None else str(problem))
    ranks_of: dict[str, list[int]] = {}
    for rank, message in enumerate(everyone):
        if message is not None:
            ranks_of.setdefault(message, []).append(rank)
    if ranks_of:
        raise UserError("; ".join(_told_by(ranks, message, len(everyone)) for message, ranks in ranks_of.items()))


def _told_by(ranks: list[int], message: str, size: int) -> str:
    if len(ranks) == size:
        return message
    return f"{message} (on rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))})"
