"""What stands in front of a quantized linear layer, fused with the quantization: activation function, RMSNorm, or both.

Per token (arXiv 2407.10969 eq. 5 and 11; SubLN as in arXiv 2504.12285 sec. 2), each optional, in this order:

    a = relu(g)^2 u | silu(g) u | relu(u)^2       feed-forward activation of [gate | up] or of up
    x = a gain / sqrt(mean(a^2) + eps)            RMSNorm (SubLN)
    codes, scale                                  as `sparsify.sparsify`: absmax int8 and exact top-K

The obvious way writes a and x to memory and reads them back, each in bf16.  Here each input element is read from
memory once and one byte per feature is written; the backward (`fused_backward`) recomputes a and x from the
input and 1/rms, so nothing else is kept.

The price of equality with the unfused layers: values are rounded to bf16 wherever a chain of torch operations would
round them (after relu^2 or silu, after the product, after the norm).  Without a norm and without silu the codes are
bit for bit those of the chain.  The mean square is summed in another order than torch's, which moves 1/rms by an ulp of
float32 and with it, rarely, the rounding of x.

Shapes: T tokens, F features of the layer's input; the input has 2 F columns with a gated activation, else F.
"""

from typing import NamedTuple, get_args

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import Activation
from kernels.launch import check_dtype, check_rows
from kernels.sparsify import Launches, check_kept, launch_options, quarters
from kernels.sparsify_triton import load_quarter, quarter_tile, row_gamma, store_codes
from kernels.words import nearest, widened

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
MAX_FEATURES = 16384
MAX_FEATURES_ALONE = 2**26
"""Of an activation function without norm and quantization, which looks at one feature."""
LAUNCHES: Launches = {512: (1, 64), 1024: (2, 64), 2048: (4, 64), 4096: (8, 64)}
NORM_LAUNCHES: Launches = {512: (1, 96), 1024: (2, 96), 2048: (4, 96), 4096: (8, 80)}
"""Also of a gated squared ReLU."""
SWIGLU_LAUNCHES: Launches = {512: (2, None), 1024: (4, None), 2048: (8, None), 4096: (16, 64)}
"""The exponential wants 8 words per thread, everything else 16.  Measured on an H200."""
GAINS = (torch.bfloat16, torch.float32)


class Sparsified(NamedTuple):
    """Input of a quantized linear layer, and what the backward needs beside the original input."""

    codes: Tensor
    """[..., F] int8."""
    scale: Tensor
    """[..., 1] float32."""
    rstd: Tensor | None
    """[..., 1] float32, 1 / sqrt(mean(a^2) + eps); None without a norm."""


@triton.jit
def rounded(x):
    """To bf16 and back."""
    return widened(nearest(x))


@triton.jit
def gate_value(gate, ACTIVATION: tl.constexpr):
    """relu(gate)^2 or silu(gate), not rounded; NaN stays NaN."""
    if ACTIVATION == "swiglu":
        return gate / (1.0 + tl.exp(-gate))
    positive = tl.maximum(gate, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return positive * positive


@triton.jit
def _activation(gate, up, ACTIVATION: tl.constexpr):
    value = gate_value(gate, ACTIVATION)
    return value if ACTIVATION == "relu2" else rounded(value) * up


@triton.jit
def activated(gate, up, ACTIVATION: tl.constexpr):
    """The activation with torch's roundings; `up` is used by the gated ones only."""
    return rounded(_activation(gate, up, ACTIVATION))


@triton.jit
def _input_quarter(
    row_ptr, index, quarter, features, part: tl.constexpr, mask, ACTIVATION: tl.constexpr
):  # fmt: skip
    """One quarter of a: the activation of a row's gate and up halves, or the row itself."""
    value = load_quarter(row_ptr, index, quarter, features, part, mask)
    if ACTIVATION != "":
        up = value
        if ACTIVATION != "relu2":
            up = load_quarter(row_ptr + features, index, quarter, features, part, mask)
        value = nearest(_activation(widened(value), widened(up), ACTIVATION))
    return value


@triton.jit
def input_row(row_ptr, index, quarter, features, mask, ACTIVATION: tl.constexpr):
    """The four quarters of a."""
    a0 = _input_quarter(row_ptr, index, quarter, features, 0, mask, ACTIVATION)
    a1 = _input_quarter(row_ptr, index, quarter, features, 1, mask, ACTIVATION)
    a2 = _input_quarter(row_ptr, index, quarter, features, 2, mask, ACTIVATION)
    a3 = _input_quarter(row_ptr, index, quarter, features, 3, mask, ACTIVATION)
    return a0, a1, a2, a3


@triton.jit
def gained(a, gain_ptr, index, quarter, features, part: tl.constexpr, mask):
    """One quarter of a gain, float32."""
    return widened(a) * widened(load_quarter(gain_ptr, index, quarter, features, part, mask))


@triton.jit
def normalized_row(a0, a1, a2, a3, rstd, gain_ptr, index, quarter, features, mask):
    """The four quarters of x; the gain comes first, so that max|x| is max|a gain| rstd, rounded (`sharded`)."""
    x0 = nearest(gained(a0, gain_ptr, index, quarter, features, 0, mask) * rstd)
    x1 = nearest(gained(a1, gain_ptr, index, quarter, features, 1, mask) * rstd)
    x2 = nearest(gained(a2, gain_ptr, index, quarter, features, 2, mask) * rstd)
    x3 = nearest(gained(a3, gain_ptr, index, quarter, features, 3, mask) * rstd)
    return x0, x1, x2, x3


@triton.jit
def sum_of_squares(a0, a1, a2, a3):
    """Of a row's four quarters, in float32."""
    a0, a1, a2, a3 = widened(a0), widened(a1), widened(a2), widened(a3)
    return tl.sum(tl.sum(a0 * a0 + a1 * a1 + a2 * a2 + a3 * a3, axis=1), axis=0)


@triton.jit
def fuse_row(
    x_row, gain_ptr, codes_ptr, scale_ptr, rstd_ptr, row, features, quarter, kept, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPARSE: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One token: its input at `x_row`, its results in row `row`; tiles as in `sparsify._sparsify_kernel`."""
    index, mask = quarter_tile(quarter, ROWS, COLUMNS, BLOCK)
    a0, a1, a2, a3 = input_row(x_row, index, quarter, features, mask, ACTIVATION)
    if NORM:
        rstd = tl.rsqrt(sum_of_squares(a0, a1, a2, a3) / features + eps)
        tl.store(rstd_ptr + row, rstd)
        a0, a1, a2, a3 = normalized_row(a0, a1, a2, a3, rstd, gain_ptr, index, quarter, features, mask)
    store_codes(
        a0, a1, a2, a3, row_gamma(a0, a1, a2, a3), codes_ptr, scale_ptr, row, index, quarter, features, mask, kept,
        SPARSE, BLOCK, True,
    )  # fmt: skip


@triton.jit
def _fused_kernel(
    x_ptr, gain_ptr, codes_ptr, scale_ptr, rstd_ptr, row_stride, features, quarter, kept, eps,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPARSE: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    fuse_row(
        x_ptr + row * row_stride, gain_ptr, codes_ptr, scale_ptr, rstd_ptr, row, features, quarter, kept, eps,
        ROWS, COLUMNS, BLOCK, SPARSE, ACTIVATION, NORM,
    )  # fmt: skip


def sparsify(
    x: Tensor,
    kept: int | None,
    block: int | None = None,
    *,
    activation: Activation | None = None,
    gain: Tensor | None = None,
    eps: float = 1e-5,
    launch: dict[str, int] | None = None,
) -> Sparsified:
    """Activation, RMSNorm, int8 codes and top-K of each token in one pass.

    Args:
        x: bf16, rows contiguous: [..., 2 F] = [gate | up] with a gated activation, else [..., F].
        kept: K, features kept of every token (of every block with `block`); None keeps all.
        block: M, features per block; None: the whole row.
        activation: what precedes the norm; None: nothing.
        gain: [F] gain of the RMSNorm, bf16 or float32; None: no norm.
        eps: added to the mean square.
        launch: `num_warps` and `maxnreg` of the kernel; None: chosen by the row's size.

    Returns:
        codes [..., F] int8, scale [..., 1] float32, and 1/rms [..., 1] float32 (None without a norm).

    Raises:
        ValueError: dtype, shape, K or M that the kernel does not take, or nothing to fuse.
    """
    if activation is None and gain is None:
        raise ValueError("neither activation nor gain: that is sparsify.sparsify")
    rows, features = check_input(x, activation)
    check_kept(kept, block, features)
    if gain is not None:
        check_gain(gain, features)
    leading = x.shape[:-1]
    codes = torch.empty((*leading, features), dtype=torch.int8, device=x.device)
    scale = torch.empty((*leading, 1), dtype=torch.float32, device=x.device)
    rstd = None if gain is None else torch.empty_like(scale)
    if codes.numel() == 0:
        return Sparsified(codes, scale, rstd)
    quarter, lines, columns = quarters(features, block if kept is not None else None)
    _fused_kernel[(rows.shape[0],)](
        rows, rows if gain is None else gain, codes, scale, scale if rstd is None else rstd,
        rows.stride(0), features, quarter, kept or 0, eps,
        ROWS=lines, COLUMNS=columns, BLOCK=block if block and kept is not None else 0,
        SPARSE=kept is not None and kept < (block or features),
        ACTIVATION=activation or "", NORM=gain is not None,
        **(launch or fused_options(lines * columns, activation, norm=gain is not None)),
    )  # fmt: skip
    return Sparsified(codes, scale, rstd)


def fused_options(words: int, activation: Activation | None, *, norm: bool) -> dict[str, int]:
    """Launch options for a row of `words` words of four codes."""
    if activation == "swiglu":
        return launch_options(SWIGLU_LAUNCHES, words)
    return launch_options(NORM_LAUNCHES if norm or activation == "relu2_glu" else LAUNCHES, words)


def check_input(x: Tensor, activation: Activation | None, most: int = MAX_FEATURES) -> tuple[Tensor, int]:
    """`x` as rows without a copy, and F, which is `most` at most.

    Raises:
        ValueError: unknown activation, or an `x` that the kernels do not take.
    """
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}, or None")
    halves = 1 if activation in (None, "relu2") else 2
    rows = check_rows(x, "x", halves * most, (torch.bfloat16,))
    if rows.shape[1] % halves:
        raise ValueError(f"x has {rows.shape[1]} columns, {activation} takes an even number: gate and up")
    return rows, rows.shape[1] // halves


def check_gain(gain: Tensor, features: int) -> None:
    """Refuse a gain that does not belong to rows of `features` features.

    Raises:
        ValueError: type, shape or stride.
    """
    check_dtype(gain, "gain", GAINS)
    if gain.shape != (features,) or (features > 1 and gain.stride(0) != 1):
        raise ValueError(
            f"gain has shape {tuple(gain.shape)} and strides {gain.stride()}, "
            f"the kernel takes {features} contiguous features"
        )
