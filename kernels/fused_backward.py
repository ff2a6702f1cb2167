"""Backward of `fused`: activation function, RMSNorm, or both, in one pass over the gradient and the saved input.

The gradient dx arriving here is the one with respect to the dequantized input of the linear layer, straight through
rounding and mask (arXiv 2407.10969 eq. 12-13).  With n = a rstd and D features, per token,

    dgain += dx n                                    summed over tokens
    da     = rstd (dx gain - n mean(dx gain n))      RMSNorm
    dup    = da act(gate),  dgate = da up act'(gate)

The obvious way keeps a (and x) from the forward pass, or recomputes them into memory, and takes a kernel per line.
Here a is recomputed in registers from gate and up, rounded as the forward rounded it; the rest is float32 and each
result is rounded once.

dgain is a sum over tokens in a fixed order: each program walks its rows and keeps one partial sum per feature in
registers, and the [P, D] partial sums are added afterwards.  No atomics, so two runs on the same GPU agree bit for bit;
another number of multiprocessors adds in another order.

Shapes: T tokens, D features of the layer's input, P programs; the input has 2 D columns with a gated activation.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import Activation
from kernels.fused import MAX_FEATURES, MAX_FEATURES_ALONE, activated, check_gain, check_input, gate_value
from kernels.launch import INTERPRETED, cdiv, check_dtype, check_rows, multiprocessors, next_power_of_2

_CHUNK = 2048
"""Features per program of the kernel without a reduction."""


class NormLaunch(NamedTuple):
    """How the kernel with a norm is launched."""

    num_warps: int
    programs: int
    """Per multiprocessor; they should fit on it together."""
    registers: int | None
    """Limit per thread."""


@triton.jit
def _gate_slope(gate, ACTIVATION: tl.constexpr):
    """Derivative of relu(gate)^2 or silu(gate)."""
    if ACTIVATION == "swiglu":
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        return sigmoid * (1.0 + gate * (1.0 - sigmoid))
    return 2.0 * tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load(row_ptr, column, mask):
    return tl.load(row_ptr + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_input_grad(
    da, gate, up, out_row, features, column, mask, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Gradient of one row's input from the gradient of the activation's result, rounded once."""
    if ACTIVATION == "":
        first = da
    elif ACTIVATION == "relu2":
        first = da * _gate_slope(gate, ACTIVATION)
    else:
        first = da * up * _gate_slope(gate, ACTIVATION)
        second = da * gate_value(gate, ACTIVATION)
        tl.store(out_row + features + column, second.to(out_row.dtype.element_ty), mask=mask)
    tl.store(out_row + column, first.to(out_row.dtype.element_ty), mask=mask)


@triton.jit
def _activation_kernel(
    grad_ptr, x_ptr, out_ptr, grad_stride, x_stride, features, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr
):  # fmt: skip
    """One chunk of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < features
    x_row = x_ptr + row * x_stride
    grad = _load(grad_ptr + row * grad_stride, column, mask)
    gate = _load(x_row, column, mask)
    up = gate
    halves: tl.constexpr = 1 if ACTIVATION == "relu2" else 2
    if halves == 2:
        up = _load(x_row + features, column, mask)
    _store_input_grad(grad, gate, up, out_ptr + row * features * halves, features, column, mask, ACTIVATION)


@triton.jit
def _norm_terms(
    grad_row, x_row, gain_ptr, rstd, features, column, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Of some columns of one row: gate, up, gain, dx, n."""
    mask = column < features
    gate = _load(x_row, column, mask)
    a = gate
    up = gate
    if ACTIVATION != "":
        if ACTIVATION != "relu2":
            up = _load(x_row + features, column, mask)
        a = activated(gate, up, ACTIVATION)
    return gate, up, _load(gain_ptr, column, mask), _load(grad_row, column, mask), a * rstd


@triton.jit
def norm_sums(grad_row, x_row, gain_ptr, rstd, features, column, ACTIVATION: tl.constexpr):
    """Summands of dgain, and of mean(dx gain n)."""
    _, _, gain, grad, normed = _norm_terms(grad_row, x_row, gain_ptr, rstd, features, column, ACTIVATION)
    dgain = grad * normed
    return dgain, dgain * gain


@triton.jit
def _norm_piece(
    grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column, ACTIVATION: tl.constexpr
):  # fmt: skip
    """Write the input gradient of some columns of one row, given mean(dx gain n); returns their summands of dgain."""
    gate, up, gain, grad, normed = _norm_terms(grad_row, x_row, gain_ptr, rstd, features, column, ACTIVATION)
    da = rstd * (grad * gain - normed * mean)
    _store_input_grad(da, gate, up, out_row, features, column, column < features, ACTIVATION)
    return grad * normed


@triton.jit
def norm_row(
    grad_row, x_row, gain_ptr, out_row, rstd, features, column0, column1, column2, column3,
    dgain0, dgain1, dgain2, dgain3, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Write the input gradient of one row, and return the four pieces of dgain with its part added.

    A row is read twice, the second time from the first-level cache: holding it in registers beside dgain would spill.
    """
    sum0, dot0 = norm_sums(grad_row, x_row, gain_ptr, rstd, features, column0, ACTIVATION)
    sum1, dot1 = norm_sums(grad_row, x_row, gain_ptr, rstd, features, column1, ACTIVATION)
    sum2, dot2 = norm_sums(grad_row, x_row, gain_ptr, rstd, features, column2, ACTIVATION)
    sum3, dot3 = norm_sums(grad_row, x_row, gain_ptr, rstd, features, column3, ACTIVATION)
    dgain0 += sum0
    dgain1 += sum1
    dgain2 += sum2
    dgain3 += sum3
    mean = tl.sum((dot0 + dot1) + (dot2 + dot3), axis=0) / features
    _norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column0, ACTIVATION)
    _norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column1, ACTIVATION)
    _norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column2, ACTIVATION)
    _norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column3, ACTIVATION)
    return dgain0, dgain1, dgain2, dgain3


@triton.jit
def store_pieces(
    line_ptr, features, column0, column1, column2, column3, piece0, piece1, piece2, piece3
):  # fmt: skip
    """Four pieces of columns to one line."""
    tl.store(line_ptr + column0, piece0, mask=column0 < features)
    tl.store(line_ptr + column1, piece1, mask=column1 < features)
    tl.store(line_ptr + column2, piece2, mask=column2 < features)
    tl.store(line_ptr + column3, piece3, mask=column3 < features)


@triton.jit
def _norm_kernel(
    grad_ptr, x_ptr, gain_ptr, rstd_ptr, dots_ptr, out_ptr, partial_ptr, num_rows, grad_stride, x_stride, features,
    total, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Rows p, p + P, p + 2 P, ... of program p, each in four pieces of BLOCK columns.

    SHARED: they are parts of rows of `total` features, whose sums of dx gain n are in `dots`.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    column0 = tl.arange(0, BLOCK)
    column1, column2, column3 = column0 + BLOCK, column0 + 2 * BLOCK, column0 + 3 * BLOCK
    halves: tl.constexpr = 1 if ACTIVATION == "" or ACTIVATION == "relu2" else 2
    dgain0 = tl.zeros([BLOCK], tl.float32)
    dgain1, dgain2, dgain3 = dgain0, dgain0, dgain0
    for step in range(tl.cdiv(num_rows - tl.program_id(0), programs)):
        row = program + step * programs
        grad_row, x_row = grad_ptr + row * grad_stride, x_ptr + row * x_stride
        out_row, rstd = out_ptr + row * features * halves, tl.load(rstd_ptr + row)
        if SHARED:
            mean = tl.load(dots_ptr + row) / total
            dgain0 += _norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column0, ACTIVATION)
            dgain1 += _norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column1, ACTIVATION)
            dgain2 += _norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column2, ACTIVATION)
            dgain3 += _norm_piece(grad_row, x_row, gain_ptr, out_row, rstd, mean, features, column3, ACTIVATION)
        else:
            dgain0, dgain1, dgain2, dgain3 = norm_row(
                grad_row, x_row, gain_ptr, out_row, rstd, features, column0, column1, column2, column3,
                dgain0, dgain1, dgain2, dgain3, ACTIVATION,
            )  # fmt: skip
    partial_row = partial_ptr + program * features
    store_pieces(partial_row, features, column0, column1, column2, column3, dgain0, dgain1, dgain2, dgain3)


def backward(
    grad: Tensor,
    x: Tensor,
    *,
    activation: Activation | None = None,
    gain: Tensor | None = None,
    rstd: Tensor | None = None,
    launch: NormLaunch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the input and the gain of `fused.sparsify`.

    Args:
        grad: [..., D] bf16, gradient with respect to the dequantized input of the linear layer.
        x: input of the forward pass, bf16: [..., 2 D] = [gate | up] with a gated activation, else [..., D].
        activation: as in the forward pass.
        gain: as in the forward pass.
        rstd: [..., 1] float32 that the forward pass returned; None without a norm.
        launch: of the kernel with a norm; None: `norm_launch`.

    Returns:
        dx in the shape of `x`, contiguous, and dgain [D] in the type of `gain` (None without a norm).

    Raises:
        ValueError: dtype or shape that the kernels do not take, or a gain without rstd.
    """
    most = MAX_FEATURES if activation is None or gain is not None else MAX_FEATURES_ALONE
    rows, grad_rows = check_gradient(grad, x, activation, most)
    features = grad.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if gain is None or rstd is None:
        _check_no_norm(activation, gain, rstd)
        if dx.numel():
            _launch_activation(grad_rows, rows, dx, features, activation)
        return dx, None
    check_gain(gain, features)
    check_rstd(rstd, x)
    if dx.numel() == 0:
        return dx, torch.zeros_like(gain)
    return dx, launch_norm(grad_rows, rows, gain, rstd, dx, activation, launch)


def check_gradient(
    grad: Tensor, x: Tensor, activation: Activation | None, most: int = MAX_FEATURES
) -> tuple[Tensor, Tensor]:
    """`x` and `grad` as rows of `most` features at most, without a copy.

    Raises:
        ValueError: dtype or shape that the kernels do not take.
    """
    rows, features = check_input(x, activation, most)
    grad_rows = check_rows(grad, "grad", most, (torch.bfloat16,))
    if grad.shape != (*x.shape[:-1], features):
        raise ValueError(f"grad has shape {tuple(grad.shape)}, an x of {tuple(x.shape)} takes [..., {features}]")
    return rows, grad_rows


def _launch_activation(grad: Tensor, rows: Tensor, dx: Tensor, features: int, activation: Activation | None) -> None:
    block = min(_CHUNK, next_power_of_2(features))
    _activation_kernel[(rows.shape[0], cdiv(features, block))](
        grad, rows, dx, grad.stride(0), rows.stride(0), features, BLOCK=block, ACTIVATION=activation, num_warps=8
    )


def launch_norm(
    grad: Tensor,
    rows: Tensor,
    gain: Tensor,
    rstd: Tensor,
    dx: Tensor,
    activation: Activation | None,
    launch: NormLaunch | None = None,
    *,
    dots: Tensor | None = None,
    num_features: int = 0,
) -> Tensor:
    """Fill dx and return dgain in the type of `gain`.

    Args:
        grad: [T, D].
        rows: the input, [T, D] or [T, 2 D].
        gain: [D].
        rstd: T numbers.
        dx: as `rows`, contiguous.
        activation: what precedes the norm.
        launch: None: `norm_launch`.
        dots: of rows that ranks share, sum(dx gain n) of the whole row, T numbers; None: this rank has all of it.
        num_features: of the whole row, with `dots`.
    """
    features = grad.shape[1]
    launch = launch or norm_launch(features)
    programs = min(rows.shape[0], launch.programs * multiprocessors(rows.device))
    partial = torch.empty((programs, features), dtype=torch.float32, device=rows.device)
    _norm_kernel[(programs,)](
        grad, rows, gain, rstd, rstd if dots is None else dots, dx, partial, rows.shape[0], grad.stride(0),
        rows.stride(0), features, num_features, BLOCK=row_piece(features), ACTIVATION=activation or "",
        SHARED=dots is not None, num_warps=launch.num_warps, maxnreg=None if INTERPRETED else launch.registers,
    )  # fmt: skip
    return partial.sum(0).to(gain.dtype)


def norm_launch(features: int) -> NormLaunch:
    """16 features per thread, and 32 warps on a multiprocessor, which leaves each thread 64 registers."""
    warps = max(1, min(32, row_piece(features) // 128))
    return NormLaunch(warps, 32 // warps, 64)


def row_piece(features: int) -> int:
    """A quarter of a row, rounded up to a power of two."""
    return next_power_of_2(cdiv(features, 4))


def _check_no_norm(activation: Activation | None, gain: Tensor | None, rstd: Tensor | None) -> None:
    if gain is not None or rstd is not None:
        missing = "rstd" if rstd is None else "gain"
        raise ValueError(f"{missing} is None: a norm takes its gain and the rstd that the forward pass returned")
    if activation is None:
        raise ValueError("neither activation nor gain: the gradient of x is grad itself")


def check_rstd(rstd: Tensor, x: Tensor) -> None:
    """Refuse 1/rms that do not belong to the rows of `x`.

    Raises:
        ValueError: type, shape or stride.
    """
    check_dtype(rstd, "rstd", (torch.float32,))
    if rstd.shape != (*x.shape[:-1], 1) or not rstd.is_contiguous():
        raise ValueError(
            f"rstd has shape {tuple(rstd.shape)} and strides {rstd.stride()}, "
            f"the kernel takes {(*x.shape[:-1], 1)}, contiguous"
        )
