"""What every Triton launch here needs: argument checks before the launch, and launch sizes."""

import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs on the CPU, operation by operation: without fused multiply-add."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
ALIGNMENT = 16
"""Bytes: the tensor memory accelerator wants a matrix and each of its rows to start at multiples of it."""


def check_dtype(tensor: Tensor, name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Refuse a type that the kernel does not take.

    Raises:
        ValueError: `tensor` is of none of `dtypes`.
    """
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, the kernel takes {' or '.join(str(dtype) for dtype in dtypes)}")


def check_rows(x: Tensor, name: str, max_features: int, dtypes: tuple[torch.dtype, ...] = FLOATS) -> Tensor:
    """`x` as [rows, features] with contiguous features, without a copy.

    Raises:
        ValueError: wrong type, no features or too many, or rows that no single stride reaches.
    """
    check_dtype(x, name, dtypes)
    features = x.shape[-1] if x.dim() else 0
    if not 0 < features <= max_features:
        raise ValueError(f"{name} has {features} features per row, the kernel takes 1 to {max_features}")
    if x.numel() and x.stride(-1) != 1:
        raise ValueError(f"{name} has stride {x.stride(-1)} between features, the kernel takes 1: call .contiguous()")
    try:
        return x.view(-1, features)
    except RuntimeError:
        raise ValueError(f"{name} of strides {x.stride()} is not a matrix of rows: call .contiguous()") from None


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU, 1 under the interpreter."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; Triton's own takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << (n - 1).bit_length()
