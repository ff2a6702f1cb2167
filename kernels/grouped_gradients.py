"""8-bit operands of the grouped backward products: `gradients` for tokens sorted by expert.

The fast mode of a mixture's linear layer computes both backward products in e4m3,

    dX[T,D]    = a[T]      (G[T,O] W[e][O,D])             G = e4m3(dY s_w / a),  a = max|dY s_w| / 448 of each token
    dW[e][O,D] = c[e] / s_w (G^T[O,T] X[D,T]^T) over e     X = e4m3(q a s_x / c),  c = max_t(a s_x) 127 / 448 over e

dY is rounded once, and the same G serves both products: the scale of a token cannot leave a sum over tokens, so it
moves into X, whose codes have to become e4m3 anyway.  c is one number per expert, found by an atomic maximum, so that a
quiet expert keeps its precision beside a loud one.  s_w multiplies dY before the rounding, whatever the number of parts
of the weight, and is divided out of dW's rows.

Both transposed operands are written in the padded columns of `grouped_wgrad` (each expert starts on a multiple of 128
and is filled up with zeros); 128 is also the tile of the transposing kernels, so each tile belongs to one expert.
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
from kernels.grouped_wgrad import TOKEN_PAD, pad_offsets, padded_columns
from kernels.sparsify_triton import larger
from kernels.tile_launch import check_operand, check_same_device, check_tensor

_E4M3_MAX = tl.constexpr(448.0)
_TINY = tl.constexpr(1e-30)
_SMALLEST_COMMON = 1e-30
TILE_FEATURES, TILE_WARPS = 64, 4


@triton.jit
def expert_of(offsets_E1, position, E: tl.constexpr, EXPERTS: tl.constexpr):
    """Expert whose range holds `position`; E past the last."""
    experts = tl.arange(0, EXPERTS)
    ends = tl.load(offsets_E1 + experts + 1, mask=experts < E, other=2**31 - 1)
    return tl.sum((ends <= position).to(tl.int32), 0)


@triton.jit
def _scaled(grad, weight_scale_EP, expert, output, mask, outputs, PARTS: tl.constexpr):
    """grad times the scale of its expert's part; [..., outputs]."""
    if PARTS == 1:
        return grad * tl.load(weight_scale_EP + expert)
    else:
        return grad * tl.load(weight_scale_EP + expert * PARTS + output // (outputs // PARTS), mask=mask, other=0.0)


@triton.jit
def _scale_kernel(
    grad_ptr, weight_scale_EP, x_scale_T, offsets_E1, scale_T, common_E, outputs,
    E: tl.constexpr, EXPERTS: tl.constexpr, PARTS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Scale of one token, and its part in the common scale of its expert."""
    token = tl.program_id(0)
    expert = expert_of(offsets_E1, token, E, EXPERTS)
    row_ptr = grad_ptr + token.to(tl.int64) * outputs
    amax = tl.zeros([CHUNK], tl.float32)
    for start in range(0, outputs, CHUNK):
        output = start + tl.arange(0, CHUNK)
        inside = output < outputs
        grad = tl.load(row_ptr + output, mask=inside, other=0.0).to(tl.float32)
        amax = larger(amax, tl.abs(_scaled(grad, weight_scale_EP, expert, output, inside, outputs, PARTS)))
    largest = tl.reduce(amax, 0, larger)
    scale = tl.where(largest < _TINY, _TINY, largest) / _E4M3_MAX
    tl.store(scale_T + token, scale)
    tl.atomic_max(common_E + expert, scale * tl.load(x_scale_T + token) * (127.0 / _E4M3_MAX))


@triton.jit
def _tokens_of_tile(offsets_E1, padded_E1, E: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr):
    """(expert of this program's columns or E, columns, their tokens, which of them are tokens)."""
    expert = expert_of(padded_E1, tl.program_id(0) * TOKENS, E, EXPERTS)
    column = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    at = tl.minimum(expert, E - 1)
    token = column - tl.load(padded_E1 + at) + tl.load(offsets_E1 + at)
    return expert, column, token, token < tl.load(offsets_E1 + at + 1)


@triton.jit
def _quantize_kernel(
    grad_ptr, weight_scale_EP, scale_T, offsets_E1, padded_E1, codes_ptr, transposed_ptr, outputs, columns,
    E: tl.constexpr, EXPERTS: tl.constexpr, PARTS: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    """One tile, written as it is and transposed."""
    expert, column, token, real = _tokens_of_tile(offsets_E1, padded_E1, E, EXPERTS, TOKENS)
    if expert < E:
        output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
        inside = output < outputs
        mask = real[:, None] & inside[None, :]
        at = token.to(tl.int64)[:, None] * outputs + output[None, :]
        grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        grad = _scaled(grad, weight_scale_EP, expert, output[None, :], inside[None, :], outputs, PARTS)
        scale = tl.load(scale_T + token, mask=real, other=1.0)
        code = (grad * (1.0 / scale)[:, None]).to(tl.float8e4nv).to(tl.int8, bitcast=True)
        tl.store(codes_ptr + at, code, mask=mask)
        target = transposed_ptr + output.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(target, tl.trans(code), mask=inside[:, None])


@triton.jit
def _transpose_input_kernel(
    codes_ptr, x_scale_T, grad_scale_T, common_E, offsets_E1, padded_E1, out_ptr, features, columns,
    E: tl.constexpr, EXPERTS: tl.constexpr, TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    expert, column, token, real = _tokens_of_tile(offsets_E1, padded_E1, E, EXPERTS, TOKENS)
    if expert < E:
        feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
        inside = feature < features
        at = token.to(tl.int64)[:, None] * features + feature[None, :]
        codes = tl.load(codes_ptr + at, mask=real[:, None] & inside[None, :], other=0).to(tl.float32)
        factor = tl.load(x_scale_T + token, mask=real, other=0.0) * tl.load(grad_scale_T + token, mask=real, other=0.0)
        codes *= (factor / tl.load(common_E + expert))[:, None]
        target = out_ptr + feature.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(target, tl.trans(codes.to(tl.float8e4nv).to(tl.int8, bitcast=True)), mask=inside[:, None])


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
    columns, padded = padded_columns(T, E), pad_offsets(offsets)
    codes = torch.empty(T, O, dtype=torch.float8_e4m3fn, device=grad_TO.device)
    transposed = torch.empty(O, columns, dtype=torch.float8_e4m3fn, device=grad_TO.device)
    scale = torch.empty(T, dtype=torch.float32, device=grad_TO.device)
    common = torch.full((E,), _SMALLEST_COMMON, dtype=torch.float32, device=grad_TO.device)
    if T:
        experts = {"E": E, "EXPERTS": triton.next_power_of_2(E)}
        chunk = min(4096, triton.next_power_of_2(O))
        _scale_kernel[(T,)](
            grad_TO, weight_scale_EP, x_scale_T, offsets, scale, common, O,
            PARTS=parts, CHUNK=chunk, num_warps=max(1, chunk // 1024), **experts,
        )  # fmt: skip
        _quantize_kernel[(columns // TOKEN_PAD, triton.cdiv(O, TILE_FEATURES))](
            grad_TO, weight_scale_EP, scale, offsets, padded, codes.view(torch.int8), transposed.view(torch.int8),
            O, columns, PARTS=parts, TOKENS=TOKEN_PAD, OUTPUTS=TILE_FEATURES, num_warps=TILE_WARPS, **experts,
        )  # fmt: skip
    return GroupedGradient(codes, transposed, scale, common, common[:, None] / weight_scale_EP, offsets, padded)


def transposed_input(codes_TD: Tensor, x_scale_T: Tensor, gradient: GroupedGradient) -> Tensor:
    """X^T [D, Tp] in e4m3: the int8 codes of the input with its scale and the gradient's folded in.

    Raises:
        ValueError: a wrong dtype, shape, layout or device.
    """
    check_tensor("codes_TD", codes_TD, dtype=torch.int8, shape=(gradient.scale_T.shape[0], None))
    (T, D), E = codes_TD.shape, gradient.common_E.shape[0]
    check_tensor("x_scale_T", x_scale_T, dtype=torch.float32, shape=(T,))
    check_same_device(codes_TD=codes_TD, x_scale_T=x_scale_T, gradient=gradient.scale_T)
    columns = padded_columns(T, E)
    out = torch.empty(D, columns, dtype=torch.float8_e4m3fn, device=codes_TD.device)
    if codes_TD.numel():
        _transpose_input_kernel[(columns // TOKEN_PAD, triton.cdiv(D, TILE_FEATURES))](
            codes_TD, x_scale_T, gradient.scale_T, gradient.common_E, gradient.offsets, gradient.padded_offsets,
            out.view(torch.int8), D, columns, E=E, EXPERTS=triton.next_power_of_2(E),
            TOKENS=TOKEN_PAD, FEATURES=TILE_FEATURES, num_warps=TILE_WARPS,
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
