"""Weight gradients of a mixture's experts: dW[e] = sum of dY[t]^T x[t] over the tokens of expert e, in one launch.

    exact   dY and x bfloat16 as they are, [T, O] and [T, D], float32 sums
    fast    FP8 codes stored transposed, [O, Tp] and [D, Tp], with one scale per expert and feature

The sum runs over tokens, so an expert's boundary lies inside the summed axis and the last tile of an expert must not
see the next one.  Exact: whole tiles run unmasked through the copy engine, and one masked tile ends each sum.  Fast:
each expert's range of the transposed buffers starts on a multiple of 128 tokens and is filled up with zeros, so every
tile is whole.  128 is one tile of the sum, so this costs no products beyond those that a masked tile would waste, only
memory: at most 127 columns per expert.  A scale per token cannot leave a sum over tokens; one per expert and feature
can.

Each tile of dW is a program of its own: its cost varies with the expert's token count, and the hardware hands out
programs as others end, which balances better than a fixed share per multiprocessor.

Shapes: T token copies, Tp padded token columns, E experts, O output features, D input features.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102 - O is a dimension; compile-time branches stay statements
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tile_launch import (
    TileConfig,
    check_operand,
    check_same_device,
    check_tensor,
    descriptor,
    dot_tiles,
    launch_options,
    loop_bound,
    stored_dtype,
    swizzle,
)

TOKEN_PAD = 128
"""Each expert's range in a transposed buffer is padded to a multiple of this many tokens."""

WGRAD_CONFIG = TileConfig(128, 256, 64, num_warps=8, num_stages=3, persistent=False)
WGRAD_FP8_CONFIG = TileConfig(128, 256, 128, num_warps=8, num_stages=3, persistent=False)
_E4M3_MAX = 448.0


@triton.jit
def _grouped_wgrad_kernel(
    a_desc,
    b_desc,
    dw_EMN,
    offsets_E1,
    a_scale_EM,
    b_scale_EN,
    M: tl.constexpr,
    N: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dw[e] (+)= a[e] b[e]; operands [tokens, features], or [features, tokens] when K_CONTIGUOUS (padded experts)."""
    ROW_TILES: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M
    COLUMN_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0)
    expert = tile // (ROW_TILES * COLUMN_TILES)
    start = tl.load(offsets_E1 + expert)
    end = tl.load(offsets_E1 + expert + 1)
    m, n = swizzle(tile % (ROW_TILES * COLUMN_TILES), ROW_TILES, COLUMN_TILES, GROUP_M)
    row = m * BLOCK_M
    column = n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)  # [BM, BN]
    whole = start + (end - start) // BLOCK_K * BLOCK_K
    for token in range(loop_bound(start, INTERPRET), loop_bound(whole, INTERPRET), BLOCK_K):
        if K_CONTIGUOUS:
            a = a_desc.load([row, token])  # [BM, BK]
            b = b_desc.load([column, token]).T
        else:
            a = a_desc.load([token, row]).T
            b = b_desc.load([token, column])  # [BK, BN]
        acc = dot_tiles(a, b, acc, WIDEN)
    if not K_CONTIGUOUS:
        if whole < end:
            own = whole + tl.arange(0, BLOCK_K) < end
            a = a_desc.load([whole, row])
            b = b_desc.load([whole, column])
            a = tl.where(own[:, None], a, tl.zeros_like(a))
            b = tl.where(own[:, None], b, tl.zeros_like(b))  # both: zero times a neighbour's infinity is no zero
            acc = dot_tiles(a.T, b, acc, WIDEN)
    rows = row + tl.arange(0, BLOCK_M)
    columns = column + tl.arange(0, BLOCK_N)
    if HAS_SCALES:
        a_scale = tl.load(a_scale_EM + expert * M + rows, mask=rows < M, other=0.0)
        b_scale = tl.load(b_scale_EN + expert * N + columns, mask=columns < N, other=0.0)
        acc = acc * a_scale[:, None] * b_scale[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    at = dw_EMN + expert.to(tl.int64) * M * N + rows.to(tl.int64)[:, None] * N + columns[None, :]
    if ACCUMULATE:
        acc += tl.load(at, mask=mask, other=0.0).to(tl.float32)
    tl.store(at, acc.to(dw_EMN.dtype.element_ty), mask=mask)


def grouped_wgrad(
    grad_TO: Tensor,
    x_TD: Tensor,
    offsets: Tensor,
    *,
    main_grad_EOD: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    config: TileConfig = WGRAD_CONFIG,
) -> Tensor:
    """dW[e] = dY^T x over the tokens of each expert, float32 sums.

    Args:
        grad_TO: bfloat16 gradient of the output, sorted by expert; O is a multiple of 8.
        x_TD: bfloat16 input that the forward multiplied, its row scale folded in; D is a multiple of 8.
        offsets: int32 [E + 1], first row of each expert and T at the end, non-decreasing; stays on the device.
        main_grad_EOD: float32 or bfloat16 buffer that the gradient is added to, in place; absent: a new tensor.
        dtype: type of the new tensor, float32 or bfloat16.
        config: tile shape.

    Returns:
        [E, O, D]; an expert without tokens contributes zeros.

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_operand("grad_TO", grad_TO, dtype=torch.bfloat16, shape=(None, None))
    check_operand("x_TD", x_TD, dtype=torch.bfloat16, shape=(grad_TO.shape[0], None))
    check_tensor("offsets", offsets, dtype=torch.int32, shape=(None,))
    return _wgrad(grad_TO, x_TD, offsets, None, None, main_grad_EOD, dtype, config, k_contiguous=False)


def grouped_wgrad_fp8(
    grad_OT: Tensor,
    x_DT: Tensor,
    padded_offsets: Tensor,
    *,
    grad_scale_EO: Tensor,
    x_scale_ED: Tensor,
    main_grad_EOD: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    config: TileConfig = WGRAD_FP8_CONFIG,
) -> Tensor:
    """dW[e] = (grad_scale dY)^T (x_scale x) from transposed FP8 codes, as `pack_transposed` writes them.

    Args:
        grad_OT: float8_e4m3fn [O, Tp], each expert's range zero-filled to a multiple of 128 tokens.
        x_DT: float8_e4m3fn [D, Tp], padded alike.
        padded_offsets: int32 [E + 1], first column of each expert, multiples of 128.
        grad_scale_EO: float32, true value per code of each expert and output feature.
        x_scale_ED: float32, the same for input features.
        main_grad_EOD: float32 or bfloat16 buffer that the gradient is added to, in place; absent: a new tensor.
        dtype: type of the new tensor, float32 or bfloat16.
        config: tile shape; `block_k` divides 128.

    Returns:
        [E, O, D].

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_operand("grad_OT", grad_OT, dtype=torch.float8_e4m3fn, shape=(None, None))
    O, columns = grad_OT.shape
    check_operand("x_DT", x_DT, dtype=torch.float8_e4m3fn, shape=(None, columns))
    check_tensor("padded_offsets", padded_offsets, dtype=torch.int32, shape=(None,))
    E = padded_offsets.shape[0] - 1
    check_tensor("grad_scale_EO", grad_scale_EO, dtype=torch.float32, shape=(E, O))
    check_tensor("x_scale_ED", x_scale_ED, dtype=torch.float32, shape=(E, x_DT.shape[0]))
    if TOKEN_PAD % config.block_k:
        raise ValueError(f"block_k={config.block_k}: expected a divisor of the token padding, {TOKEN_PAD}")
    return _wgrad(
        grad_OT, x_DT, padded_offsets, grad_scale_EO, x_scale_ED, main_grad_EOD, dtype, config, k_contiguous=True
    )


def _wgrad(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    grad_scale: Tensor | None,
    x_scale: Tensor | None,
    main_grad: Tensor | None,
    dtype: torch.dtype,
    config: TileConfig,
    *,
    k_contiguous: bool,
) -> Tensor:
    check_same_device(grad=grad, x=x, offsets=offsets, grad_scale=grad_scale, x_scale=x_scale, main_grad=main_grad)
    feature_dim, token_dim = (0, 1) if k_contiguous else (1, 0)
    E, O, D = offsets.shape[0] - 1, grad.shape[feature_dim], x.shape[feature_dim]
    floats = (torch.float32, torch.bfloat16)
    if E < 1:
        raise ValueError(f"offsets: {E + 1} elements, expected one more than there are experts")
    if dtype not in floats:
        raise ValueError(f"dtype: {dtype}, expected torch.float32 or torch.bfloat16")
    if main_grad is not None:
        check_tensor("main_grad_EOD", main_grad, dtype=floats, shape=(E, O, D))
    if grad.shape[token_dim] == 0:
        return grad.new_zeros(E, O, D, dtype=dtype) if main_grad is None else main_grad
    result = torch.empty(E, O, D, dtype=dtype, device=grad.device) if main_grad is None else main_grad
    stored = result.to(stored_dtype(result.dtype))  # itself, but for bfloat16 in the interpreter

    def tile(features: int) -> tuple[int, int]:
        return (features, config.block_k) if k_contiguous else (config.block_k, features)

    _grouped_wgrad_kernel[(E * triton.cdiv(O, config.block_m) * triton.cdiv(D, config.block_n),)](
        descriptor(grad, *tile(config.block_m)),
        descriptor(x, *tile(config.block_n)),
        stored,
        offsets,
        grad_scale,
        x_scale,
        M=O,
        N=D,
        K_CONTIGUOUS=k_contiguous,
        HAS_SCALES=grad_scale is not None,
        ACCUMULATE=main_grad is not None,
        GROUP_M=config.group_m,
        **launch_options(grad, config),
    )
    return result if stored is result else result.copy_(stored)


def padded_columns(num_tokens: int, num_experts: int) -> int:
    """Columns of a transposed buffer that suffice whatever the token counts: known without reading the offsets."""
    return triton.cdiv(num_tokens + num_experts * (TOKEN_PAD - 1), TOKEN_PAD) * TOKEN_PAD


def pad_offsets(offsets: Tensor) -> Tensor:
    """int32 [E + 1]: the same experts with every token count rounded up to a multiple of 128, on the device."""
    counts = (offsets.diff() + TOKEN_PAD - 1) // TOKEN_PAD * TOKEN_PAD
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)


def pack_transposed(x_TD: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 codes of `x`, transposed, with one absmax scale per expert and feature, for `grouped_wgrad_fp8`.

    PyTorch operations on the device of `x`, without host synchronization.

    Args:
        x_TD: floats, sorted by expert.
        offsets: int32 [E + 1].

    Returns:
        (float8_e4m3fn [D, Tp], float32 scale [E, D], int32 padded offsets [E + 1]).
    """
    (T, D), E = x_TD.shape, offsets.shape[0] - 1
    tokens = torch.arange(T, device=x_TD.device)
    expert_T = torch.searchsorted(offsets[1:].contiguous(), tokens, right=True)
    magnitude = x_TD.float().abs()
    absmax_ED = magnitude.new_zeros(E, D).scatter_reduce(0, expert_T.unsqueeze(1).expand(T, D), magnitude, "amax")
    scale_ED = torch.where(absmax_ED > 0, absmax_ED / _E4M3_MAX, 1.0)
    codes_TD = (x_TD.float() / scale_ED[expert_T]).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    padded = pad_offsets(offsets)
    columns_T = tokens - offsets[expert_T] + padded[expert_T]
    packed_DT = torch.zeros(D, padded_columns(T, E), dtype=torch.uint8, device=x_TD.device)
    packed_DT[:, columns_T] = codes_TD.view(torch.uint8).t()
    return packed_DT.view(torch.float8_e4m3fn), scale_ED, padded
