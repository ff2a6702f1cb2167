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
from kernels.fused_backward import (
    check_gradient,
    check_rstd,
    norm_launch,
    norm_piece,
    norm_sums,
    row_piece,
    store_pieces,
)
from kernels.launch import INTERPRETED, multiprocessors, next_power_of_2


@triton.jit
def _dots_kernel(
    grad_ptr, x_ptr, gain_ptr, rstd_ptr, dots_ptr, grad_stride, x_stride, features,
    BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad_row, x_row = grad_ptr + row * grad_stride, x_ptr + row * x_stride
    _, dot = norm_sums(grad_row, x_row, gain_ptr, tl.load(rstd_ptr + row), features, tl.arange(0, BLOCK), ACTIVATION)
    tl.store(dots_ptr + row, tl.sum(dot, axis=0))


@triton.jit
def _gradients_kernel(
    grad_ptr, x_ptr, gain_ptr, rstd_ptr, dots_ptr, out_ptr, partial_ptr, num_rows, grad_stride, x_stride, features,
    total, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Rows p, p + P, p + 2 P, ... of program p, each in four pieces of BLOCK columns."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    column0 = tl.arange(0, BLOCK)
    column1, column2, column3 = column0 + BLOCK, column0 + 2 * BLOCK, column0 + 3 * BLOCK
    halves: tl.constexpr = 1 if ACTIVATION == "" or ACTIVATION == "relu2" else 2
    dgain0 = tl.zeros([BLOCK], tl.float32)
    dgain1, dgain2, dgain3 = dgain0, dgain0, dgain0
    for step in range(tl.cdiv(num_rows - tl.program_id(0), programs)):
        row = program + step * programs
        grad_row, x_row, out_row = (
            grad_ptr + row * grad_stride,
            x_ptr + row * x_stride,
            out_ptr + row * features * halves,
        )
        rstd, mean = tl.load(rstd_ptr + row), tl.load(dots_ptr + row) / total
        dgain0 += norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column0, ACTIVATION)
        dgain1 += norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column1, ACTIVATION)
        dgain2 += norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column2, ACTIVATION)
        dgain3 += norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column3, ACTIVATION)
    partial_row = partial_ptr + program * features
    store_pieces(partial_row, features, column0, column1, column2, column3, dgain0, dgain1, dgain2, dgain3)


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
    features = grad.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros_like(gain)
    launch = norm_launch(features)
    programs = min(rows.shape[0], launch.programs * multiprocessors(x.device))
    partial = torch.empty((programs, features), dtype=torch.float32, device=x.device)
    _gradients_kernel[(programs,)](
        grad_rows, rows, gain, rstd, dots, dx, partial, rows.shape[0], grad_rows.stride(0), rows.stride(0), features,
        num_features, BLOCK=row_piece(features), ACTIVATION=before.activation or "",
        num_warps=launch.num_warps, maxnreg=None if INTERPRETED else launch.registers,
    )  # fmt: skip
    return dx, partial.sum(0).to(gain.dtype)


def _check(grad: Tensor, x: Tensor, before: Before, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`x` and `grad` as rows without a copy, and the gain."""
    rows, grad_rows = check_gradient(grad, x, before.activation)
    if before.gain is None:
        raise ValueError("before has no gain: without a norm the gradient needs nothing of other ranks")
    check_gain(before.gain, grad_rows.shape[1])
    check_rstd(rstd, x)
    return rows, grad_rows, before.gain
