"""8-bit operands of the grouped backward products: `gradients` for tokens sorted by expert.

The fast mode of a mixture's linear layer computes both backward products in e4m3,

    dX[T,D]    = a[T]      (G[T,O] W[e][O,D])             G = e4m3(dY s_w / a),  a = max|dY s_w| / 448 of each token
    dW[e][O,D] = c[e] / s_w (G^T[O,T] X[D,T]^T) over e     X = e4m3(q a s_x / c),  c = max_t(a s_x) 127 / 448 over e

dY is rounded once, and the same G serves both products: the scale of a token cannot leave a sum over tokens, so it
moves into X, whose codes have to become e4m3 anyway.  c is one number per expert, so that a quiet expert keeps its
precision beside a loud one, found in a launch of its own: an atomic maximum per token added two thirds to the rounding.
s_w multiplies dY before the rounding (of a weight in one part only a) and is divided out of dW's rows.

Both transposed operands are written in the padded columns of `grouped_wgrad` (each expert starts on a multiple of 128
and is filled up with zeros), a multiple of the transposing kernel's tile: each tile belongs to one expert.
Columns past the last expert stay unwritten, and unread.

Shapes: T tokens sorted by expert, Tp padded token columns, E experts, D input features, O output features, P parts.
"""

# mypy: disable-error-code="no-untyped-def"
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import gradients
from kernels.gradients import TILE_COLUMNS, TILE_ROWS, TILE_WARPS, in_e4m3, round_row
from kernels.grouped_wgrad import pad_offsets, padded_columns
from kernels.launch import INTERPRETED
from kernels.sparsify_triton import larger
from kernels.tile_launch import check_operand, check_same_device, check_tensor, loop_bound

_COMMON = tl.constexpr(127 / 448)
_SMALLEST_COMMON = tl.constexpr(1e-30)
_CHUNK = 4096


@triton.jit
def expert_of(offsets_E1, position, E: tl.constexpr, EXPERTS: tl.constexpr):
    """Expert whose range holds `position`; E past the last."""
    experts = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_E1 + experts + 1, mask=experts < E, other=2**31 - 1)
    return tl.sum((ends <= position).to(tl.int32), 0)


@triton.jit
def _round_kernel(
    grad_ptr, weight_scale_ptr, offsets_E1, codes_ptr, scale_T, outputs,
    E: tl.constexpr, EXPERTS: tl.constexpr, SCALED: tl.constexpr,
    WHOLE: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Codes and scale of one token; s_w is [E, O] (SCALED) or [E]."""
    token = tl.program_id(0)
    row = token.to(tl.int64) * outputs
    expert = expert_of(offsets_E1, token, E, EXPERTS)
    factors_ptr = weight_scale_ptr + expert.to(tl.int64) * outputs
    scale = round_row(grad_ptr + row, factors_ptr, codes_ptr + row, outputs, SCALED, WHOLE, LINES, COLUMNS)
    if not SCALED:
        scale *= tl.load(weight_scale_ptr + expert)
    tl.store(scale_T + token, scale)


@triton.jit
def _common_kernel(
    grad_scale_T, x_scale_T, offsets_E1, common_E, TOKENS: tl.constexpr, INTERPRET: tl.constexpr
):  # fmt: skip
    """c of one expert."""
    expert = tl.program_id(0)
    start, end = tl.load(offsets_E1 + expert), tl.load(offsets_E1 + expert + 1)
    largest = tl.full([TOKENS], _SMALLEST_COMMON, tl.float32)
    for first in range(loop_bound(start, INTERPRET), loop_bound(end, INTERPRET), TOKENS):
        token = first + tl.arange(0, TOKENS)
        scale = tl.load(grad_scale_T + token, mask=token < end, other=0.0)
        largest = larger(largest, scale * tl.load(x_scale_T + token, mask=token < end, other=0.0) * _COMMON)
    tl.store(common_E + expert, tl.reduce(largest, 0, larger))


@triton.jit
def _tokens_of_tile(offsets_E1, padded_E1, E: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr):
    """(expert of this program's columns or E, columns, their tokens, which of them are tokens)."""
    expert = expert_of(padded_E1, tl.program_id(0) * TOKENS, E, EXPERTS)
    column = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = tl.minimum(expert, E - 1)
    token = column - tl.load(padded_E1 + at) + tl.load(offsets_E1 + at)
    return expert, column, token, token < tl.load(offsets_E1 + at + 1)


@triton.jit
def _transpose_kernel(
    codes_ptr, x_scale_T, grad_scale_T, common_E, offsets_E1, padded_E1, out_ptr, features, columns,
    E: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """One tile of integers times the scales, to e4m3, or of bytes as they are."""
    expert, column, token, real = _tokens_of_tile(offsets_E1, padded_E1, E, EXPERTS, TOKENS)
    if expert < E:
        feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        inside = feature < features
        at = token.to(tl.int64)[:, None] * features + feature[None, :]
        codes = tl.load(codes_ptr + at, mask=real[:, None] & inside[None, :], other=0)
        if SCALED:
            factor = tl.load(x_scale_T + token, mask=real, other=0.0)
            factor *= tl.load(grad_scale_T + token, mask=real, other=0.0)
            codes = in_e4m3(codes, factor / tl.load(common_E + expert))
        target = out_ptr + feature.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(target, tl.trans(codes), mask=inside[:, None])


@dataclass(frozen=True)
class GroupedGradient:
    """dY in e4m3, as both grouped backward products read it."""

    codes_TO: Tensor
    """dY s_w / scale, for `grouped_dgrad_fp8`."""
    transposed_OT: Tensor
    """The same codes in padded token columns, for `grouped_wgrad_fp8`."""
    scale_T: Tensor
    """a, float32."""
    common_E: Tensor
    """c, float32."""
    wgrad_scale_EP: Tensor
    """c / s_w, float32."""
    offsets: Tensor
    """int32 [E + 1], as given."""
    padded_offsets: Tensor
    """int32 [E + 1], first column of each expert."""


def quantize_gradient(
    grad_TO: Tensor, offsets: Tensor, *, x_scale_T: Tensor, weight_scale_EP: Tensor
) -> GroupedGradient:
    """Round dY to e4m3 for both backward products, without host synchronization.

    Args:
        grad_TO: dY, bf16 or fp32, sorted by expert; O is a multiple of 16.
        offsets: int32 [E + 1], first row of each expert and T at the end, non-decreasing.
        x_scale_T: float32, the scale of the input's codes.
        weight_scale_EP: float32 scale of each expert's P equal ranges of output features; P divides O.

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_operand("grad_TO", grad_TO, dtype=(torch.bfloat16, torch.float32), shape=(None, None))
    (T, O), E = grad_TO.shape, offsets.shape[0] - 1
    check_tensor("offsets", offsets, dtype=torch.int32, shape=(None,))
    check_tensor("x_scale_T", x_scale_T, dtype=torch.float32, shape=(T,))
    check_tensor("weight_scale_EP", weight_scale_EP, dtype=torch.float32, shape=(E, None))
    parts = weight_scale_EP.shape[1]
    if parts == 0 or O % parts:
        raise ValueError(f"weight_scale_EP: {parts} parts, expected a divisor of the {O} output features")
    if O % 16:
        raise ValueError(f"grad_TO: {O} output features, expected a multiple of 16: rows of codes are aligned")
    check_same_device(grad_TO=grad_TO, offsets=offsets, x_scale_T=x_scale_T, weight_scale_EP=weight_scale_EP)
    codes = torch.empty(T, O, dtype=torch.float8_e4m3fn, device=grad_TO.device)
    scale = torch.empty(T, dtype=torch.float32, device=grad_TO.device)
    common = torch.empty(E, dtype=torch.float32, device=grad_TO.device)
    if T:
        factors = weight_scale_EP if parts == 1 else weight_scale_EP.repeat_interleave(O // parts, 1)
        _round_kernel[(T,)](
            grad_TO, factors, offsets, codes.view(torch.int8), scale, O,
            E=E, EXPERTS=triton.next_power_of_2(E), SCALED=parts > 1, **gradients.round_launch(O),
        )  # fmt: skip
    _common_kernel[(E,)](scale, x_scale_T, offsets, common, TOKENS=_CHUNK, INTERPRET=INTERPRETED, num_warps=8)
    padded = pad_offsets(offsets)
    transposed = _transposed(codes, offsets, padded)
    return GroupedGradient(codes, transposed, scale, common, common[:, None] / weight_scale_EP, offsets, padded)


def transposed_input(codes_TD: Tensor, x_scale_T: Tensor, gradient: GroupedGradient) -> Tensor:
    """X^T [D, Tp] in e4m3: the int8 codes of the input with its scale and the gradient's folded in.

    Raises:
        ValueError: a wrong dtype, shape, layout or device.
    """
    check_tensor("codes_TD", codes_TD, dtype=torch.int8, shape=(gradient.scale_T.shape[0], None))
    check_tensor("x_scale_T", x_scale_T, dtype=torch.float32, shape=(len(codes_TD),))
    check_same_device(codes_TD=codes_TD, x_scale_T=x_scale_T, gradient=gradient.scale_T)
    scales = (x_scale_T, gradient.scale_T, gradient.common_E)
    return _transposed(codes_TD, gradient.offsets, gradient.padded_offsets, *scales)


def _transposed(codes_TF: Tensor, offsets: Tensor, padded_offsets: Tensor, *scales: Tensor) -> Tensor:
    """[F, Tp] in e4m3, of integers times x_scale_T grad_scale_T / common_E, or without scales of e4m3."""
    (T, F), E = codes_TF.shape, len(offsets) - 1
    columns = padded_columns(T, E)
    out = torch.empty(F, columns, dtype=torch.float8_e4m3fn, device=codes_TF.device)
    if codes_TF.numel():
        _transpose_kernel[(columns // TILE_ROWS, triton.cdiv(F, TILE_COLUMNS))](
            codes_TF.view(torch.int8), *(scales or (None, None, None)), offsets, padded_offsets,
            out.view(torch.int8), F, columns, E=E, EXPERTS=triton.next_power_of_2(E),
            TOKENS=TILE_ROWS, FEATURES=TILE_COLUMNS, SCALED=bool(scales), num_warps=TILE_WARPS,
        )  # fmt: skip
    return out


def transposed_weight(weight_EOD: Tensor) -> Tensor:
    """[D, E, O] in e4m3, exactly, of ternary int8 codes: experts are ranges of the outputs of one tall weight.

    Raises:
        ValueError: a wrong dtype, shape or layout.
    """
    check_tensor("weight_EOD", weight_EOD, dtype=torch.int8, shape=(None, None, None))
    E, O, D = weight_EOD.shape
    if O % 16:
        raise ValueError(f"weight_EOD: {O} output features, expected a multiple of 16: rows of codes are aligned")
    return gradients.transposed_weight(weight_EOD.view(E * O, D)).view(D, E, O)
