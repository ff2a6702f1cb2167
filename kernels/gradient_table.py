"""Weight gradients of the experts of one layer, wherever each lies, for kernels that add to all of them in one launch.

megatron-core gives every parameter a view of one of its float32 buffers, in the order of the backward pass; the experts
of a layer are not neighbours in it.  A kernel gets their addresses.  The table is made once and not in every launch: a
CUDA graph of a step may copy nothing from the host, and hundreds of experts take time to check.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from kernels.launch import ALIGNMENT


@dataclass(frozen=True)
class GradientTable:
    """The buffers, and where they are."""

    buffers: tuple[Tensor, ...]
    """float32 [O, D] of each expert."""
    addresses: Tensor
    """int64 [E], on their device."""

    @classmethod
    def of(cls, buffers: Sequence[Tensor]) -> "GradientTable":
        """Check the buffers and note their addresses.

        Raises:
            ValueError: one of them has another type, shape or device, or gaps.
        """
        first = buffers[0]
        for expert, buffer in enumerate(buffers):
            name = f"main_grads[{expert}]"
            if buffer.dtype != torch.float32:
                raise ValueError(f"{name}: dtype {buffer.dtype}, expected torch.float32")
            if buffer.shape != first.shape or buffer.dim() != 2:
                raise ValueError(f"{name}: shape {list(buffer.shape)}, expected [O, D] as main_grads[0] has it")
            if buffer.device != first.device:
                raise ValueError(f"{name} is on {buffer.device}, main_grads[0] on {first.device}")
            if not buffer.is_contiguous():
                raise ValueError(f"{name} is not contiguous")
        addresses = torch.tensor([buffer.data_ptr() for buffer in buffers]).to(first.device)
        return cls(tuple(buffers), addresses)

    @cached_property
    def is_aligned(self) -> bool:
        """Whether kernels can add to all of them; without the distributed optimizer megatron-core leaves no gaps."""
        return all(buffer.data_ptr() % ALIGNMENT == 0 for buffer in self.buffers)

    def addresses_for(self, num_experts: int, rows: int, columns: int) -> Tensor:
        """The addresses of `num_experts` gradients [rows, columns].

        Raises:
            ValueError: there are others, or one of them does not start at a multiple of 16 bytes.
        """
        found = (len(self.buffers), *self.buffers[0].shape)
        if found != (num_experts, rows, columns):
            raise ValueError(f"main_grads: [E, O, D] = {list(found)}, expected {[num_experts, rows, columns]}")
        if not self.is_aligned:
            raise ValueError(f"main_grads: an address is no multiple of {ALIGNMENT} bytes")
        return self.addresses
