"""Backward of `sharded`: `fused_backward` with a norm, for rows whose features are spread over ranks.

The mean of the norm's gradient is one over all ranks:

    gradient_dots  sum(dx gain n) of this rank's features    -> summed over ranks
    gradients      da, through the activation, and dgain

The obvious chain of torch operations keeps three float32 copies of the row for it; here the input and one number per
token are kept, and the input is read once before the collective and once after it.

Shapes: T tokens, F features of this rank, R ranks; the input has 2 F columns with a gated activation.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import Before
from kernels.fused import check_gain
from kernels.fused_backward import check_gradient, check_rstd, launch_norm, norm_sums
from kernels.launch import next_power_of_2


@triton.jit
def _dots_kernel(
    grad_ptr, x_ptr, gain_ptr, rstd_ptr, dots_ptr, grad_stride, x_stride, features,
    BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad_row, x_row = grad_ptr + row * grad_stride, x_ptr + row * x_stride
    _, dot = norm_sums(grad_row, x_row, gain_ptr, tl.load(rstd_ptr + row), features, tl.arange(0, BLOCK), ACTIVATION)
    tl.store(dots_ptr + row, tl.sum(dot, axis=0))


def gradient_dots(grad: Tensor, x: Tensor, before: Before, rstd: Tensor) -> Tensor:
    """sum(dx gain n) of each row, float32 [..., 1]; arguments as for `gradients`."""
    rows, grad_rows, gain = _check(grad, x, before, rstd)
    dots = torch.empty_like(rstd)
    if x.numel():
        block = next_power_of_2(grad.shape[-1])
        _dots_kernel[(rows.shape[0],)](
            grad_rows, rows, gain, rstd, dots, grad_rows.stride(0), rows.stride(0), grad.shape[-1],
            BLOCK=block, ACTIVATION=before.activation or "", num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return dots


def gradients(
    grad: Tensor, x: Tensor, before: Before, rstd: Tensor, dots: Tensor, num_features: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the gain.

    Args:
        grad: [..., F] bf16, gradient with respect to the dequantized input of the linear layer.
        x: input of the forward pass, bf16: [..., 2 F] = [gate | up] with a gated activation, else [..., F].
        before: activation and norm, as in the forward pass.
        rstd: [..., 1] float32 from the forward pass.
        dots: [..., 1] float32, `gradient_dots` summed over ranks.
        num_features: R F, of the whole row.

    Returns:
        dx in the shape of `x`, contiguous, and dgain [F] in the gain's type.

    Raises:
        ValueError: type or shape that the kernel does not take.
    """
    rows, grad_rows, gain = _check(grad, x, before, rstd)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros_like(gain)
    return dx, launch_norm(grad_rows, rows, gain, rstd, dx, before.activation, dots=dots, num_features=num_features)


def _check(grad: Tensor, x: Tensor, before: Before, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x` and `grad` as rows without a copy, and the gain."""
    rows, grad_rows = check_gradient(grad, x, before.activation)
    if before.gain is None:
        raise ValueError("before has no gain: without a norm the gradient needs nothing of other ranks")
    check_gain(before.gain, grad_rows.shape[1])
    check_rstd(rstd, x)
    return rows, grad_rows, before.gain
