"""What every test of a kernel has: memory that shows what was not written, and bf16 as the kernels round."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.guard import GuardedMemory


@pytest.fixture(scope="session")
def to_bf16(device: str) -> Callable[[Tensor], Tensor]:
    """float32 to bf16 as stores of the kernels round: to nearest even; the interpreter cuts off instead."""

    def cut_off(x: Tensor) -> Tensor:
        return (x.float().view(torch.int32) & -65536).view(torch.float32).bfloat16()

    return cut_off if device == "cpu" else lambda x: x.bfloat16()


@pytest.fixture(autouse=True)
def poisoned_memory(device: str) -> Iterator[None]:
    """Fresh tensors hold NaN; on the interpreter, a kernel that reads or writes behind one ends the process."""
    if device == "cpu":
        with GuardedMemory():
            yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
