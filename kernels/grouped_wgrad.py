"""Weight gradients of a mixture's experts: dW[e] = sum of dY[t]^T x[t] over the tokens of expert e, in one launch.

    exact   dY and x bfloat16 as they are, [T, O] and [T, D], float32 sums
    fast    FP8 codes stored transposed, [O, Tp] and [D, Tp], with one scale per expert (and part of its weight)

The sum runs over tokens, so an expert's boundary lies inside the summed axis and the last tile of an expert must not
see the next one.  Exact: whole tiles run unmasked through the copy engine, and one masked tile ends each sum.  Fast:
each expert's range of the transposed buffers starts on a multiple of 128 tokens and is filled up with zeros, so every
tile is whole.  128 is one tile of the sum, so this costs no products beyond those that a masked tile would waste, only
memory: at most 127 columns per expert.  A scale per token cannot leave a sum over tokens; `grouped_gradients` moves it
into the codes of x.  FP8 sums of Hopper's tensor cores keep 13 bits below the largest term of each 32: over t tokens
they lose about t / 32 * 2^-14 of the result, less than the rounding of the codes (3%) up to 16,000 tokens per expert.

Each tile of dW is a program of its own: its cost varies with the expert's token count, and the hardware hands out
programs as others end, which balances better than a fixed share per multiprocessor.  On Hopper the fast form is
`grouped_hopper`'s, whose loads of the next tile run during the stores of this one.

Shapes: T token copies, Tp padded token columns, E experts, O output features, D input features, P parts of a weight.
"""

# mypy: disable-error-code="no-untyped-def"
# ruff: noqa: SIM102 - O is a dimension; compile-time branches stay statements
import importlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gradient_table import GradientTable
from kernels.tile_launch import (
    HopperTile,
    TileConfig,
    check_operand,
    check_same_device,
    check_tensor,
    chosen_tile,
    descriptor,
    dot_tiles,
    launch_options,
    loop_bound,
    stored_dtype,
    swizzle,
)

TOKEN_PAD = 128
"""Each expert's range in a transposed buffer is padded to a multiple of this many tokens."""

WGRAD_CONFIG = TileConfig(128, 256, 64, num_warps=8, num_stages=4, persistent=False)
WGRAD_FP8_CONFIG = TileConfig(128, 256, 128, num_warps=8, num_stages=4, persistent=False)


@triton.jit
def _grouped_wgrad_kernel(
    a_desc,
    b_desc,
    dw_EMN,
    offsets_E1,
    scale_EP,
    M: tl.constexpr,
    N: tl.constexpr,
    K_CONTIGUOUS: tl.constexpr,
    PARTS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """dw[e] = scale[e] a[e] b[e]; PARTS scales over the rows, 0: none.

    Operands [tokens, features], or [features, tokens] when K_CONTIGUOUS (padded experts).  With ACCUMULATE `dw_EMN`
    holds the address of each expert's float32 gradient, to which the product is added.
    """
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
    if PARTS == 1:
        acc = acc * tl.load(scale_EP + expert)
    elif PARTS > 1:
        acc = acc * tl.load(scale_EP + expert * PARTS + tl.minimum(rows // (M // PARTS), PARTS - 1))[:, None]
    if ACCUMULATE:
        target = tl.multiple_of(tl.load(dw_EMN + expert).to(tl.pointer_type(tl.float32)), 16)
        # A quarter at a time: registers do not hold the sum and all of what it is added to.
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _add_halves(left, target, rows, column, M, N, HALF)
        _add_halves(right, target, rows, column + HALF, M, N, HALF)
    else:
        columns = column + tl.arange(0, BLOCK_N)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        target = dw_EMN + expert.to(tl.int64) * M * N + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(target, acc.to(dw_EMN.dtype.element_ty), mask=mask)


@triton.jit
def _add_halves(values, target, rows, column, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    """target[rows, column...] += values [BM, WIDTH], one half after the other."""
    HALF: tl.constexpr = WIDTH // 2
    left, right = tl.split(tl.permute(tl.reshape(values, (values.shape[0], 2, HALF)), (0, 2, 1)))
    _add(left, target, rows, column, M, N, HALF)
    _add(right, target, rows, column + HALF, M, N, HALF)


@triton.jit
def _add(values, target, rows, column, M: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr):
    columns = column + tl.arange(0, WIDTH)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    at = target + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, values + tl.load(at, mask=mask, other=0.0), mask=mask)


def grouped_wgrad(
    grad_TO: Tensor,
    x_TD: Tensor,
    offsets: Tensor,
    *,
    main_grads: GradientTable | None = None,
    dtype: torch.dtype = torch.float32,
    config: TileConfig = WGRAD_CONFIG,
) -> Tensor | None:
    """dW[e] = dY^T x over the tokens of each expert, float32 sums.

    Args:
        grad_TO: bfloat16 gradient of the output, sorted by expert; O is a multiple of 8.
        x_TD: bfloat16 input that the forward multiplied, its row scale folded in; D is a multiple of 8.
        offsets: int32 [E + 1], first row of each expert and T at the end, non-decreasing; stays on the device.
        main_grads: float32 [O, D] of each expert that the gradient is added to; absent: a new tensor.
        dtype: type of the new tensor, float32 or bfloat16.
        config: tile shape.

    Returns:
        [E, O, D], zeros for an expert without tokens; None if it was added to `main_grads`.

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_operand("grad_TO", grad_TO, dtype=torch.bfloat16, shape=(None, None))
    check_operand("x_TD", x_TD, dtype=torch.bfloat16, shape=(grad_TO.shape[0], None))
    check_tensor("offsets", offsets, dtype=torch.int32, shape=(None,))
    return _wgrad(grad_TO, x_TD, offsets, None, main_grads, dtype, config, k_contiguous=False)


def grouped_wgrad_fp8(
    grad_OT: Tensor,
    x_DT: Tensor,
    padded_offsets: Tensor,
    *,
    scale_EP: Tensor,
    main_grads: GradientTable | None = None,
    dtype: torch.dtype = torch.float32,
    config: TileConfig | HopperTile | None = None,
) -> Tensor | None:
    """dW[e] = scale[e] dY^T x from transposed FP8 codes, as `grouped_gradients` writes them.

    Args:
        grad_OT: float8_e4m3fn [O, Tp], each expert's range zero-filled to a multiple of 128 tokens.
        x_DT: float8_e4m3fn [D, Tp], padded alike.
        padded_offsets: int32 [E + 1], first column of each expert, multiples of 128.
        scale_EP: float32 scale of each expert's P equal ranges of output features; P divides O.
        main_grads: float32 [O, D] of each expert that the gradient is added to; absent: a new tensor.
        dtype: type of the new tensor, float32 or bfloat16.
        config: tile shape of the portable or of the Hopper kernel; absent: a measured one of the best that runs here.

    Returns:
        [E, O, D], zeros for an expert without tokens; None if it was added to `main_grads`.

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_operand("grad_OT", grad_OT, dtype=torch.float8_e4m3fn, shape=(None, None))
    O, columns = grad_OT.shape
    check_operand("x_DT", x_DT, dtype=torch.float8_e4m3fn, shape=(None, columns))
    check_tensor("padded_offsets", padded_offsets, dtype=torch.int32, shape=(None,))
    check_tensor("scale_EP", scale_EP, dtype=torch.float32, shape=(padded_offsets.shape[0] - 1, None))
    if not scale_EP.shape[1] or O % scale_EP.shape[1]:
        raise ValueError(f"scale_EP: {scale_EP.shape[1]} parts, expected a divisor of the {O} output features")
    tile = chosen_tile(config, WGRAD_FP8_CONFIG, x_DT.shape[0], grad_OT.device)
    if isinstance(tile, TileConfig) and TOKEN_PAD % tile.block_k:
        raise ValueError(f"block_k={tile.block_k}: expected a divisor of the token padding, {TOKEN_PAD}")
    return _wgrad(grad_OT, x_DT, padded_offsets, scale_EP, main_grads, dtype, tile, k_contiguous=True)


def _wgrad(
    grad: Tensor, x: Tensor, offsets: Tensor, scale_EP: Tensor | None, main_grads: GradientTable | None,
    dtype: torch.dtype, config: TileConfig | HopperTile, *, k_contiguous: bool,
) -> Tensor | None:  # fmt: skip
    check_same_device(
        grad=grad, x=x, offsets=offsets, scale_EP=scale_EP,
        main_grads=None if main_grads is None else main_grads.addresses,
    )  # fmt: skip
    feature_dim, token_dim = (0, 1) if k_contiguous else (1, 0)
    E, O, D = offsets.shape[0] - 1, grad.shape[feature_dim], x.shape[feature_dim]
    if E < 1:
        raise ValueError(f"offsets: {E + 1} elements, expected one more than there are experts")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype: {dtype}, expected torch.float32 or torch.bfloat16")
    target = None if main_grads is None else main_grads.addresses_for(E, O, D)
    if grad.shape[token_dim] == 0:
        return grad.new_zeros(E, O, D, dtype=dtype) if target is None else None
    result = torch.empty(E, O, D, dtype=dtype, device=grad.device) if target is None else None
    if isinstance(config, HopperTile):
        importlib.import_module("kernels.grouped_hopper").hopper_sums(
            grad, x, offsets, result if target is None else target, (E, O, D), scale_EP=scale_EP, tile=config
        )
        return result
    stored = target if result is None else result.to(stored_dtype(dtype))  # itself, but for bf16 in the interpreter

    def tile(features: int) -> tuple[int, int]:
        return (features, config.block_k) if k_contiguous else (config.block_k, features)

    _grouped_wgrad_kernel[(E * triton.cdiv(O, config.block_m) * triton.cdiv(D, config.block_n),)](
        descriptor(grad, *tile(config.block_m)), descriptor(x, *tile(config.block_n)), stored, offsets, scale_EP,
        M=O, N=D, K_CONTIGUOUS=k_contiguous, PARTS=0 if scale_EP is None else scale_EP.shape[1],
        ACCUMULATE=target is not None, GROUP_M=config.group_m, **launch_options(grad, config),
    )  # fmt: skip
    return result if result is None or stored is result or stored is None else result.copy_(stored)


def padded_columns(num_tokens: int, num_experts: int) -> int:
    """Columns of a transposed buffer that suffice whatever the token counts: known without reading the offsets."""
    return triton.cdiv(num_tokens + num_experts * (TOKEN_PAD - 1), TOKEN_PAD) * TOKEN_PAD


def pad_offsets(offsets: Tensor) -> Tensor:
    """int32 [E + 1]: the same experts with every token count rounded up to a multiple of 128, on the device."""
    counts = (offsets.diff() + TOKEN_PAD - 1) // TOKEN_PAD * TOKEN_PAD
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
