"""8-bit operands of the backward products: gradients in e4m3, and the transposed copies that tensor cores want.

The fast mode of a linear layer computes both backward products in e4m3,

    dX[T,D] = a[T] s_w  (G[T,O] W[O,D])           G = e4m3(dY / a),  a = max|dY| / 448 of each token
    dW[O,D] = c         (G^T[O,T] X[D,T]^T)       X = e4m3(q a s_x / c),  c = max_t(a s_x) 127 / 448

W holds -1, 0 and 1, which e4m3 has exactly.  dY is rounded once, and the same G serves both products: the scale of a
token cannot stay outside a sum over tokens, so it moves into X, whose codes have to become e4m3 anyway.  With several
scales in one weight (q, k and v), s_w[o] multiplies dY before the rounding and is divided out of dW's rows.

8-bit tensor core instructions of Hopper read both operands along the summed dimension, hence G^T and X^T.

The obvious rounding finds the scales in one pass and writes both forms of the codes in another: 6 bytes of traffic per
element of a bf16 dY.  Here a row waits in registers for its scale, and its codes are transposed as bytes: 5, and the
codes can be gathered from other ranks in between.

The trade-off: e4m3 keeps 4 significant bits, a relative error of up to 1/16 per element, unbiased over a sum; the exact
mode multiplies dY in bf16.

Shapes: T tokens, D input features, O output features.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.dispatch import Gather
from kernels.launch import ALIGNMENT, cdiv, check_dtype, check_rows, next_power_of_2
from kernels.sparsify_triton import larger

_E4M3_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1e-30)
_COMMON = 127 / 448
TILE_ROWS, TILE_COLUMNS, TILE_WARPS = 64, 128, 4
"""Tile of the transposing kernels; 128 by 64 took 25% longer, 128 by 128 3% (H200)."""
_COLUMNS = 8
_LONGEST_HELD = 16384
"""Output features of a row that one program keeps in registers."""


@triton.jit
def _load_gradients(row_ptr, weight_scale_ptr, output, outputs, SCALED: tl.constexpr):
    grad = tl.load(row_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
    if SCALED:
        grad *= tl.load(weight_scale_ptr + output, mask=output < outputs, other=0.0)
    return grad


@triton.jit
def _gradient_scale(amax):
    largest = tl.reduce(amax, None, larger)
    return tl.where(largest < _TINY, _TINY, largest) / _E4M3_MAX


@triton.jit
def _store_codes(grad, scale, row_ptr, output, outputs):
    code = (grad * (1.0 / scale)).to(tl.float8e4nv).to(tl.int8, bitcast=True)
    tl.store(row_ptr + output, code, mask=output < outputs)


@triton.jit
def round_row(
    row_ptr, weight_scale_ptr, codes_ptr, outputs,
    SCALED: tl.constexpr, WHOLE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Write the codes of one token's dY; returns their scale.

    A tile [LINES, COLUMNS] holds the row (WHOLE), which waits in registers for its scale, or its beginning: the rest is
    read twice.  COLUMNS is what a thread loads at once: types of 1, 2 and 4 bytes then need no exchange of layouts, and
    neighbouring threads read neighbouring sectors.
    """
    CHUNK: tl.constexpr = LINES * COLUMNS
    output = tl.arange(0, LINES)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    grad = _load_gradients(row_ptr, weight_scale_ptr, output, outputs, SCALED)
    amax = tl.abs(grad)
    if not WHOLE:
        for start in range(CHUNK, outputs, CHUNK):
            amax = larger(amax, tl.abs(_load_gradients(row_ptr, weight_scale_ptr, start + output, outputs, SCALED)))
    scale = _gradient_scale(amax)
    _store_codes(grad, scale, codes_ptr, output, outputs)
    if not WHOLE:
        for start in range(CHUNK, outputs, CHUNK):
            grad = _load_gradients(row_ptr, weight_scale_ptr, start + output, outputs, SCALED)
            _store_codes(grad, scale, codes_ptr, start + output, outputs)
    return scale


@triton.jit
def _round_gradient_kernel(
    grad_ptr, weight_scale_ptr, scale_ptr, codes_ptr, outputs, grad_stride,
    SCALED: tl.constexpr, WHOLE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    scale = round_row(
        grad_ptr + token * grad_stride, weight_scale_ptr, codes_ptr + token * outputs, outputs,
        SCALED, WHOLE, LINES, COLUMNS,
    )  # fmt: skip
    tl.store(scale_ptr + token, scale)


@triton.jit
def in_e4m3(codes, factor):
    """Codes of some tokens times a factor for each, as bytes."""
    return (codes.to(tl.float32) * factor[:, None]).to(tl.float8e4nv).to(tl.int8, bitcast=True)


@triton.jit
def _transpose_codes_kernel(
    codes_ptr, out_ptr, x_scale_ptr, grad_scale_ptr, common_ptr, rows, columns, codes_stride, out_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SCALED: tl.constexpr, IN_E4M3: tl.constexpr,
):  # fmt: skip
    """One tile of integers, times the scales or not, to e4m3; bytes that are e4m3 stay as they are."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    codes = tl.load(codes_ptr + row.to(tl.int64)[:, None] * codes_stride + column[None, :], mask=mask, other=0)
    if not IN_E4M3:
        factor = tl.full([ROWS], 1.0, tl.float32)
        if SCALED:
            factor = tl.load(x_scale_ptr + row, mask=row < rows, other=0.0)
            factor *= tl.load(grad_scale_ptr + row, mask=row < rows, other=0.0)
            factor /= tl.load(common_ptr)
        codes = in_e4m3(codes, factor)
    target = out_ptr + column.to(tl.int64)[:, None] * out_stride + row[None, :]
    tl.store(target, tl.trans(codes), mask=tl.trans(mask))


@triton.jit
def _dequantize_kernel(
    codes_ptr, scale_ptr, out_ptr, features, codes_stride, SCALE: tl.constexpr, FEATURES: tl.constexpr
):
    """One row; SCALE: 0 none, 1 one per row."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    mask = feature < features
    values = tl.load(codes_ptr + row * codes_stride + feature, mask=mask, other=0).to(tl.float32)
    if SCALE:
        values *= tl.load(scale_ptr + row)
    tl.store(out_ptr + row * features + feature, values, mask=mask)


@dataclass(frozen=True)
class QuantizedGradient:
    """dY in e4m3, as both backward products read it."""

    codes_TO: Tensor
    """dY s_w / scale; s_w only where each output feature has its own."""
    transposed_OT: Tensor
    """The same codes, tokens contiguous."""
    scale_T1: Tensor
    """a, float32."""
    common: Tensor
    """c, one float32."""


def quantize_gradient(
    grad: Tensor, x_scale: Tensor, weight_scale: Tensor | None, gather: Gather | None = None
) -> QuantizedGradient:
    """Round dY to e4m3 for both backward products.

    Args:
        grad: dY [T,O], bf16, fp16 or fp32, of all tokens or of those that `gather` makes all of.
        x_scale: s_x [T,1] float32 of all tokens, the scale of the input's codes.
        weight_scale: [O] float32 scale of each output feature, or None if the weight has a single one.
        gather: from the rows of this rank to those of all ranks; None: they are here.

    Raises:
        ValueError: types or shapes that the kernel does not take.
    """
    codes, scale = round_gradient(grad, weight_scale)
    if gather is not None:
        codes, scale = gather(codes), gather(scale)
    return gathered_gradient(codes, scale, x_scale)


def round_gradient(
    grad: Tensor, weight_scale: Tensor | None, *, launch: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """What of a `QuantizedGradient` concerns each token alone, to be sent: codes [T,O] and scales [T,1].

    Args:
        grad: dY [T,O], bf16, fp16 or fp32, of some of the tokens.
        weight_scale: as in `quantize_gradient`.
        launch: of the kernel, as `round_launch`; None: that of O.

    Raises:
        ValueError: types or shapes that the kernel does not take.
    """
    grad = check_rows(grad, "grad", 2**31 - 1)
    tokens, outputs = grad.shape
    if weight_scale is not None and weight_scale.numel() != outputs:
        raise ValueError(f"weight_scale has {weight_scale.numel()} numbers for {outputs} output features")
    codes = torch.empty(tokens, outputs, dtype=torch.float8_e4m3fn, device=grad.device)
    scale = torch.empty(tokens, 1, dtype=torch.float32, device=grad.device)
    if tokens:
        _round_gradient_kernel[(tokens,)](
            grad, weight_scale, scale, codes.view(torch.int8), outputs, grad.stride(0),
            SCALED=weight_scale is not None, **(launch or round_launch(outputs)),
        )  # fmt: skip
    return codes, scale


def round_launch(outputs: int) -> dict[str, int]:
    """Tile and warps of `round_row`: 32 or 64 elements for each thread.

    Several rows per program, to read s_w once, were no faster.
    """
    whole = outputs <= _LONGEST_HELD
    lines = next_power_of_2(cdiv(outputs, _COLUMNS)) if whole else 512
    return {"WHOLE": whole, "LINES": lines, "COLUMNS": _COLUMNS, "num_warps": max(1, min(8, lines // 128))}


def gathered_gradient(codes: Tensor, scale: Tensor, x_scale: Tensor) -> QuantizedGradient:
    """`quantize_gradient` of all tokens, from their `round_gradient`: codes e4m3 [T,O], scale and x_scale [T,1].

    Raises:
        ValueError: types or shapes that the kernel does not take.
    """
    codes = check_rows(codes, "codes", 2**31 - 1, (torch.float8_e4m3fn,))
    tokens = len(codes)
    check_dtype(x_scale, "x_scale", (torch.float32,))
    if x_scale.numel() != tokens:
        raise ValueError(f"x_scale has {x_scale.numel()} numbers for {tokens} tokens")
    common = scale.new_zeros(1)
    if tokens:
        common = (scale.flatten() * x_scale.flatten() * _COMMON).amax().view(1)
    return QuantizedGradient(codes, _transpose(codes, None, None), scale, common)


def transposed_input(codes: Tensor, x_scale: Tensor, gradient: QuantizedGradient) -> Tensor:
    """X^T [D,T] in e4m3: the codes of the input with its scale and the gradient's folded in."""
    return _transpose(check_rows(codes, "codes", 2**31 - 1, (torch.int8,)), x_scale, gradient)


def transposed_weight(codes: Tensor) -> Tensor:
    """W^T [D,O] in e4m3, exactly: ternary codes int8 [O,D] with the summed dimension contiguous."""
    return _transpose(check_rows(codes, "codes", 2**31 - 1, (torch.int8,)), None, None)


def _transpose(codes: Tensor, x_scale: Tensor | None, gradient: QuantizedGradient | None) -> Tensor:
    rows, columns = codes.shape
    out = _token_contiguous(columns, rows, codes.device)
    if codes.numel():
        _transpose_codes_kernel[(cdiv(rows, TILE_ROWS), cdiv(columns, TILE_COLUMNS))](
            codes.view(torch.int8), out.view(torch.int8), x_scale,
            None if gradient is None else gradient.scale_T1, None if gradient is None else gradient.common,
            rows, columns, codes.stride(0), out.stride(0), ROWS=TILE_ROWS, COLUMNS=TILE_COLUMNS,
            SCALED=gradient is not None, IN_E4M3=codes.dtype == torch.float8_e4m3fn, num_warps=TILE_WARPS,
        )  # fmt: skip
    return out


def _token_contiguous(rows: int, tokens: int, device: torch.device) -> Tensor:
    padded = cdiv(tokens, ALIGNMENT) * ALIGNMENT
    return torch.empty(rows, padded, dtype=torch.float8_e4m3fn, device=device)[:, :tokens]


def dequantize(codes: Tensor, scale: Tensor | None, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """codes * scale, rounded once: int8 [R,D] and one float32 per row (or None for 1) to `dtype` [R,D]."""
    rows, features = check_rows(codes, "codes", 2**31 - 1, (torch.int8,)).shape
    out = torch.empty(rows, features, dtype=dtype, device=codes.device)
    if out.numel():
        width = min(4096, next_power_of_2(features))
        _dequantize_kernel[(rows, cdiv(features, width))](
            codes, scale, out, features, codes.stride(0),
            SCALE=0 if scale is None else 1, FEATURES=width, num_warps=max(1, min(8, width // 512)),
        )  # fmt: skip
    return out
