"""RMSNorm of rows whose features are spread over ranks (SubLN in front of a row-parallel layer), in Triton.

With n = x rstd and F features over all ranks, per token,

    rstd   = 1 / sqrt(sum(x^2) / F + eps)             sum over ranks between `sum_squares` and `normalize`
    y      = n gain
    dx     = rstd (dy gain - n sum(dy gain n) / F)    sum over ranks between `gradient_dots` and `gradients`
    dgain += dy n                                     of this rank's features, summed over tokens

The obvious chain of torch operations keeps three float32 copies of the row for its backward pass; here the bf16 row and
one number per token are kept.  The two halves of each pass read the row again, since a collective lies between them.

dgain is summed in a fixed order, as in `fused_backward`.

Shapes: T tokens, D features of this rank, P programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fused import check_gain
from kernels.launch import check_rows, multiprocessors, next_power_of_2

MAX_FEATURES = 8192
_PROGRAMS = 2
"""Of the kernel with dgain, per multiprocessor."""


@triton.jit
def _load(ptr, column, mask):
    return tl.load(ptr + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _squares_kernel(x_ptr, squares_ptr, row_stride, features, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    x = _load(x_ptr + row * row_stride, column, column < features)
    tl.store(squares_ptr + row, tl.sum(x * x, axis=0))


@triton.jit
def _normalize_kernel(
    x_ptr, squares_ptr, gain_ptr, y_ptr, rstd_ptr, row_stride, features, total, eps, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < features
    rstd = tl.rsqrt(tl.load(squares_ptr + row) / total + eps)
    tl.store(rstd_ptr + row, rstd)
    y = _load(x_ptr + row * row_stride, column, mask) * rstd * _load(gain_ptr, column, mask)
    tl.store(y_ptr + row * features + column, y.to(tl.bfloat16), mask=mask)


@triton.jit
def _dots_kernel(
    grad_ptr, x_ptr, gain_ptr, rstd_ptr, dots_ptr, grad_stride, x_stride, features, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < features
    normed = _load(x_ptr + row * x_stride, column, mask) * tl.load(rstd_ptr + row)
    product = _load(grad_ptr + row * grad_stride, column, mask) * normed * _load(gain_ptr, column, mask)
    tl.store(dots_ptr + row, tl.sum(product, axis=0))


@triton.jit
def _gradients_kernel(
    grad_ptr, x_ptr, gain_ptr, rstd_ptr, dots_ptr, dx_ptr, partial_ptr, num_rows, grad_stride, x_stride, features,
    total, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows p, p + P, p + 2 P, ... of program p."""
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    mask = column < features
    gain = _load(gain_ptr, column, mask)
    dgain = tl.zeros([BLOCK], tl.float32)
    for step in range(tl.cdiv(num_rows - tl.program_id(0), programs)):
        row = program + step * programs
        rstd = tl.load(rstd_ptr + row)
        normed = _load(x_ptr + row * x_stride, column, mask) * rstd
        grad = _load(grad_ptr + row * grad_stride, column, mask)
        dgain += grad * normed
        dx = rstd * (grad * gain - normed * (tl.load(dots_ptr + row) / total))
        tl.store(dx_ptr + row * features + column, dx.to(tl.bfloat16), mask=mask)
    tl.store(partial_ptr + program * features + column, dgain, mask=mask)


def sum_squares(x: Tensor) -> Tensor:
    """Sum of squares of each row, float32 [..., 1].

    Args:
        x: [..., D] bf16, rows contiguous.

    Raises:
        ValueError: type or shape that the kernel does not take.
    """
    rows = _rows(x, "x")
    squares = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        _squares_kernel[(rows.shape[0],)](rows, squares, rows.stride(0), rows.shape[1], **_options(rows.shape[1]))
    return squares


def normalize(x: Tensor, squares: Tensor, gain: Tensor, num_features: int, eps: float) -> tuple[Tensor, Tensor]:
    """Normalized rows and 1/rms.

    Args:
        x: [..., D] bf16, rows contiguous.
        squares: [..., 1] float32, sum of squares of the whole row.
        gain: [D] bf16 or float32.
        num_features: F, features of the whole row.
        eps: added to the mean square.

    Returns:
        y [..., D] bf16 and 1/rms [..., 1] float32.

    Raises:
        ValueError: type or shape that the kernel does not take.
    """
    rows = _rows(x, "x")
    check_gain(gain, rows.shape[1])
    y, rstd = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(squares)
    if x.numel():
        _normalize_kernel[(rows.shape[0],)](
            rows, squares, gain, y, rstd, rows.stride(0), rows.shape[1], num_features, eps, **_options(rows.shape[1])
        )
    return y, rstd


def gradient_dots(grad: Tensor, x: Tensor, gain: Tensor, rstd: Tensor) -> Tensor:
    """sum(dy gain n) of each row, float32 [..., 1]; arguments as for `gradients`."""
    grad_rows, rows = _rows(grad, "grad"), _rows(x, "x")
    dots = torch.empty_like(rstd)
    if x.numel():
        _dots_kernel[(rows.shape[0],)](
            grad_rows, rows, gain, rstd, dots, grad_rows.stride(0), rows.stride(0), rows.shape[1],
            **_options(rows.shape[1]),
        )  # fmt: skip
    return dots


def gradients(
    grad: Tensor, x: Tensor, gain: Tensor, rstd: Tensor, dots: Tensor, num_features: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the row and of the gain.

    Args:
        grad: dy [..., D] bf16, rows contiguous.
        x: [..., D] bf16, rows contiguous.
        gain: [D] bf16 or float32.
        rstd: [..., 1] float32 from `normalize`.
        dots: [..., 1] float32, sum(dy gain n) of the whole row.
        num_features: F.

    Returns:
        dx [..., D] bf16 and dgain [D] in the type of `gain`.

    Raises:
        ValueError: type or shape that the kernel does not take.
    """
    grad_rows, rows = _rows(grad, "grad"), _rows(x, "x")
    features = rows.shape[1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros_like(gain)
    programs = min(rows.shape[0], _PROGRAMS * multiprocessors(x.device))
    partial = torch.empty((programs, features), dtype=torch.float32, device=x.device)
    _gradients_kernel[(programs,)](
        grad_rows, rows, gain, rstd, dots, dx, partial, rows.shape[0], grad_rows.stride(0), rows.stride(0), features,
        num_features, **_options(features),
    )  # fmt: skip
    return dx, partial.sum(0).to(gain.dtype)


def _rows(x: Tensor, name: str) -> Tensor:
    return check_rows(x, name, MAX_FEATURES, (torch.bfloat16,))


def _options(features: int) -> dict[str, int]:
    """One row per program, 16 features per thread."""
    block = max(32, next_power_of_2(features))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}
