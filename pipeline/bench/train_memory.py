"""Memory of a training step by what it holds."""

import resource
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pipeline.bench.train_categories import ACTIVATIONS, BUFFERS, GRADIENTS, OPTIMIZER, WEIGHTS
from pipeline.learner import Learner


def memory_by_category(learner: Learner) -> dict[str, int]:
    """Bytes at the peak, to be called between steps.

    What the step itself needs (`activations`: saved tensors and temporary ones) is the peak less what is allocated now;
    `codes and buffers` are allocated, and neither weights nor gradients nor optimizer state.  On a CPU the peak is that
    of the process, and all but weights, gradients and optimizer state counts as activations.
    """
    on_gpu = learner.world.device.type == "cuda"
    weights = _storages(parameter for chunk in learner.chunks for parameter in chunk.parameters())
    gradients = _storages(buffer.grad_data for buffer in _buffers(learner))
    optimizer = _storages(_optimizer_tensors(learner))
    found = {WEIGHTS: weights, GRADIENTS: gradients, OPTIMIZER: optimizer}
    known: set[int] = set()
    sizes = {}
    for name, storages in found.items():
        sizes[name] = sum(size for address, size in storages.items() if address not in known)
        known |= set(storages)
    held = sum(sizes.values())
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    allocated = torch.cuda.memory_allocated() if on_gpu else held
    return sizes | {BUFFERS: allocated - held, ACTIVATIONS: peak - allocated}


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _buffers(learner: Learner) -> Iterator[Any]:
    for chunk in learner.chunks:
        yield from (*chunk.buffers, *chunk.expert_parallel_buffers)


def _optimizer_tensors(learner: Learner) -> Iterator[Tensor]:
    """Master weights and moments."""
    for one in getattr(learner.optimizer, "chained_optimizers", [learner.optimizer]):
        for group in one.optimizer.param_groups:
            yield from group["params"]
        for state in one.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
