"""The float32 gradient buffers of megatron-core's data parallelism, which products on GPUs add to as they write.

A parameter's hooks, which start the reduction over ranks, run when autograd gives it a gradient.  One whose gradient is
in the buffer already gets a place holder and a mark, and its hooks leave the buffer alone.
"""

import torch
from torch import Tensor


def main_grad_of(weight: Tensor) -> Tensor | None:
    """The buffer that a product adds dW to; None: it returns dW."""
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    if buffer is None or not weight.is_cuda or buffer.dtype != torch.float32:
        return None
    return buffer


def place_holder(weight: Tensor) -> Tensor:
    """What a backward pass returns for a weight whose gradient is in its buffer; nobody reads it."""
    setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010 - megatron-core's mark on a parameter
    return torch.empty_like(weight)
