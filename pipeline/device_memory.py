"""What a rank says when its GPU's memory does not suffice: where, how much there was, and what would take less."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config import Config
from pipeline.errors import DeviceMemoryError

_GIB = 2**30


@contextmanager
def explained(config: Config, rank: int, moment: str) -> Iterator[None]:
    """A block that may run out of GPU memory.

    Args:
        config: the run.
        rank: this process's.
        moment: when this is, for the message: "in step 12".

    Raises:
        DeviceMemoryError: instead of torch's error, which follows as the cause.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        held, size = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
        raise DeviceMemoryError(
            f"rank {rank} is out of GPU memory {moment}: {held / _GIB:.1f} of {size / _GIB:.1f} GiB were in tensors. "
            f"Less take {', '.join(remedies(config))}; `qsparse plan` estimates them, profile.memory=oom records what "
            "lies there"
        ) from error


def remedies(config: Config) -> list[str]:
    """Keys that would take less memory than they do now, the cheapest first."""
    training, parallel = config.training, config.parallel
    found = []
    if training.micro_batch_size > 1:
        found.append(f"a smaller training.micro_batch_size ({training.micro_batch_size})")
    if training.recompute == "none" and config.model.moe is None and not config.model.qsparse.is_dense:
        found.append("training.recompute=up_projection")
    if training.recompute != "full":
        found.append("training.recompute=full")
    if config.run.keep_bf16_weights:
        found.append("run.keep_bf16_weights=false")
    if not parallel.distributed_optimizer:
        found.append("parallel.distributed_optimizer=true with parallel.dp > 1")
    return [*found, f"a larger parallel.tp ({parallel.tp}) or parallel.pp ({parallel.pp})"]
