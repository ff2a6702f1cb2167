"""Grouped matrix products over the experts of a mixture: one launch, any token counts, no host synchronization.

Tokens are sorted by expert; expert e owns the rows offsets[e] to offsets[e + 1], and `offsets` never leaves the device.

    forward   y[t]  = x_scale[t] w_scale[e] (codes[t] ternary[e]^T)     int8, int32 sums, one rounding to bfloat16
    dgrad     dX[t] = w_scale[e] (dY[t] ternary[e])                     bfloat16 (exact) or FP8 (fast), float32 sums

Both are one kernel: rows of `a` times the matrix of their expert.  The launch size is fixed; each program derives the
list of tiles from the offsets (a cumulative sum over experts) and walks its share.  The obvious alternatives are one
GEMM per expert (E launches, and the counts must be known on the host) or padding every expert to its capacity (wasted
products).  A tile that runs over the end of its expert also multiplies rows of the next one; they are not stored.

A fused weight has P parts with a scale each (gate and up: P = 2).  In the forward they are ranges of outputs; in dgrad
they are ranges of the sum, so the accumulator changes its unit from one part's scale to the next between the ranges.

Shapes: T token copies, E experts, D input features, O output features, P parts of a weight.
"""

# mypy: disable-error-code="no-untyped-def"

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

FORWARD_CONFIG = TileConfig(128, 256, 128, num_warps=8, num_stages=3)
DGRAD_CONFIG = TileConfig(128, 256, 64, num_warps=8, num_stages=3)
DGRAD_FP8_CONFIG = TileConfig(128, 256, 128, num_warps=8, num_stages=3)


@triton.jit
def _grouped_rows_kernel(
    a_TK,
    b_EX,
    y_TN,
    offsets_E1,
    row_scale_T,
    weight_scale_EP,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PARTS_OF_N: tl.constexpr,
    PARTS_OF_K: tl.constexpr,
    B_IS_EKN: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    INTEGER: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """y[t] = row_scale[t] weight_scale[e] (a[t] b[e]); b_EX is [E * N, K], or [E * K, N] when B_IS_EKN."""
    COLUMN_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    PARTS: tl.constexpr = PARTS_OF_N * PARTS_OF_K
    PART_K: tl.constexpr = K // PARTS_OF_K
    experts = tl.arange(0, EXPERTS)
    starts = tl.load(offsets_E1 + experts, mask=experts < E, other=0)
    ends = tl.load(offsets_E1 + experts + 1, mask=experts < E, other=0)
    row_tiles_E = (ends - starts + BLOCK_M - 1) // BLOCK_M
    last_tile_E = tl.cumsum(row_tiles_E, 0) * COLUMN_TILES
    num_tiles = tl.sum(row_tiles_E, 0) * COLUMN_TILES
    first, step = tl.program_id(0), tl.num_programs(0)
    for tile in range(loop_bound(first, INTERPRET), loop_bound(num_tiles, INTERPRET), loop_bound(step, INTERPRET)):
        expert = tl.sum((last_tile_E <= tile).to(tl.int32), 0)
        first_tile = tl.sum(tl.where(experts < expert, row_tiles_E, 0), 0) * COLUMN_TILES
        start = tl.load(offsets_E1 + expert)
        end = tl.load(offsets_E1 + expert + 1)
        m, n = swizzle(tile - first_tile, (end - start + BLOCK_M - 1) // BLOCK_M, COLUMN_TILES, GROUP_M)
        row = start + m * BLOCK_M
        column = n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)  # [BM, BN]
        for part in tl.static_range(PARTS_OF_K):
            for k in range(part * PART_K, (part + 1) * PART_K, BLOCK_K):
                a = a_TK.load([row, k])  # [BM, BK]
                if B_IS_EKN:
                    b = b_EX.load([expert * K + k, column])  # [BK, BN]; rows past K meet zeros of `a`
                else:
                    b = b_EX.load([expert * N + column, k]).T
                acc = dot_tiles(a, b, acc, WIDEN)
            if part + 1 < PARTS_OF_K:
                acc *= tl.load(weight_scale_EP + expert * PARTS + part) / tl.load(
                    weight_scale_EP + expert * PARTS + part + 1
                )
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        if PARTS_OF_N > 1:
            part_of_column = tl.minimum(columns // (N // PARTS_OF_N), PARTS_OF_N - 1)
            scale = tl.load(weight_scale_EP + expert * PARTS + part_of_column)[None, :]
        else:
            scale = tl.load(weight_scale_EP + expert * PARTS + PARTS_OF_K - 1)
        if HAS_ROW_SCALE:
            scale = tl.load(row_scale_T + rows, mask=rows < end, other=0.0)[:, None] * scale
        y = (acc.to(tl.float32) * scale).to(y_TN.dtype.element_ty)
        mask = (rows < end)[:, None] & (columns < N)[None, :]
        tl.store(y_TN + rows.to(tl.int64)[:, None] * N + columns[None, :], y, mask=mask)


def grouped_forward(
    codes_TD: Tensor,
    weight_EOD: Tensor,
    offsets: Tensor,
    *,
    x_scale_T: Tensor,
    weight_scale_EP: Tensor,
    config: TileConfig = FORWARD_CONFIG,
) -> Tensor:
    """y = x_scale weight_scale (codes weight[e]^T) of each token copy with its expert's weight, bit for bit.

    Args:
        codes_TD: int8 codes, sorted by expert; D is a multiple of 16 below 131,072 (exact sums).
        weight_EOD: int8 ternary codes.
        offsets: int32 [E + 1], first row of each expert and T at the end, non-decreasing; stays on the device.
        x_scale_T: float32 scale of each row.
        weight_scale_EP: float32 scale of each expert's P equal ranges of output features; P divides O.
        config: tile shape.

    Returns:
        bfloat16 [T, O]: integer sums times float32(x_scale weight_scale), rounded once.

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_operand("codes_TD", codes_TD, dtype=torch.int8, shape=(None, None))
    T, D = codes_TD.shape
    check_operand("weight_EOD", weight_EOD, dtype=torch.int8, shape=(None, None, D))
    if D >= 2**17:
        raise ValueError(f"codes_TD: {D} features, expected fewer than {2**17}: float32 could not hold the sums")
    E, O, _ = weight_EOD.shape
    check_tensor("x_scale_T", x_scale_T, dtype=torch.float32, shape=(T,))
    parts = _check_groups(offsets, weight_scale_EP, E, O)
    return _rows(codes_TD, weight_EOD, offsets, x_scale_T, weight_scale_EP, O, (parts, 1), config)


def grouped_dgrad(
    grad_TO: Tensor, weight_EOD: Tensor, offsets: Tensor, *, weight_scale_EP: Tensor, config: TileConfig = DGRAD_CONFIG
) -> Tensor:
    """dX = weight_scale (dY weight[e]) in bfloat16 with float32 sums.

    Args:
        grad_TO: bfloat16 gradient of the output, sorted by expert; O is a multiple of 8.
        weight_EOD: bfloat16 ternary codes (-1, 0, 1), converted from int8 once per step; D is a multiple of 8.
        offsets: int32 [E + 1], as in `grouped_forward`.
        weight_scale_EP: float32; with P > 1, O / P is a multiple of the tile's `block_k`.
        config: tile shape.

    Returns:
        bfloat16 [T, D].

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_operand("grad_TO", grad_TO, dtype=torch.bfloat16, shape=(None, None))
    O = grad_TO.shape[1]
    check_operand("weight_EOD", weight_EOD, dtype=torch.bfloat16, shape=(None, O, None))
    E, _, D = weight_EOD.shape
    parts = _check_groups(offsets, weight_scale_EP, E, O, multiple=config.block_k)
    return _rows(grad_TO, weight_EOD, offsets, None, weight_scale_EP, D, (1, parts), config, b_is_ekn=True)


def grouped_dgrad_fp8(
    grad_TO: Tensor,
    weight_EDO: Tensor,
    offsets: Tensor,
    *,
    grad_scale_T: Tensor,
    weight_scale_EP: Tensor,
    config: TileConfig = DGRAD_FP8_CONFIG,
) -> Tensor:
    """dX = grad_scale weight_scale (dY weight[e]) with FP8 operands; ternary codes are exact in FP8, dY is rounded.

    Hopper's 8-bit products want both operands contiguous along the sum, hence the transposed weight.

    Args:
        grad_TO: float8_e4m3fn gradient, true value times 1 / grad_scale; O is a multiple of 16.
        weight_EDO: float8_e4m3fn ternary codes, output features last.
        offsets: int32 [E + 1], as in `grouped_forward`.
        grad_scale_T: float32 scale of each row of `grad_TO`.
        weight_scale_EP: float32; with P > 1, O / P is a multiple of the tile's `block_k`.
        config: tile shape.

    Returns:
        bfloat16 [T, D].

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_operand("grad_TO", grad_TO, dtype=torch.float8_e4m3fn, shape=(None, None))
    T, O = grad_TO.shape
    check_operand("weight_EDO", weight_EDO, dtype=torch.float8_e4m3fn, shape=(None, None, O))
    E, D, _ = weight_EDO.shape
    check_tensor("grad_scale_T", grad_scale_T, dtype=torch.float32, shape=(T,))
    parts = _check_groups(offsets, weight_scale_EP, E, O, multiple=config.block_k)
    return _rows(grad_TO, weight_EDO, offsets, grad_scale_T, weight_scale_EP, D, (1, parts), config)


def _check_groups(offsets: Tensor, weight_scale_EP: Tensor, E: int, O: int, *, multiple: int = 1) -> int:
    """Number of parts per weight, after checking the per-expert arguments."""
    check_tensor("offsets", offsets, dtype=torch.int32, shape=(E + 1,))
    check_tensor("weight_scale_EP", weight_scale_EP, dtype=torch.float32, shape=(E, None))
    parts = weight_scale_EP.shape[1]
    if parts == 0 or O % parts:
        raise ValueError(f"weight_scale_EP: {parts} parts, expected a divisor of the {O} output features")
    if parts > 1 and (O // parts) % multiple:
        raise ValueError(f"weight_scale_EP: parts of {O // parts} features, expected a multiple of block_k={multiple}")
    return parts


def _rows(
    a_TK: Tensor,
    b: Tensor,
    offsets: Tensor,
    row_scale_T: Tensor | None,
    weight_scale_EP: Tensor,
    N: int,
    parts: tuple[int, int],
    config: TileConfig,
    *,
    b_is_ekn: bool = False,
) -> Tensor:
    check_same_device(a=a_TK, weight=b, offsets=offsets, row_scale=row_scale_T, weight_scale=weight_scale_EP)
    (T, K), E = a_TK.shape, b.shape[0]
    y_TN = torch.empty(T, N, dtype=stored_dtype(torch.bfloat16), device=a_TK.device)
    if T == 0:
        return y_TN.to(torch.bfloat16)
    b_tile = (config.block_k, config.block_n) if b_is_ekn else (config.block_n, config.block_k)
    most_tiles = (T // config.block_m + min(E, T)) * triton.cdiv(N, config.block_n)
    _grouped_rows_kernel[(config.num_programs(a_TK.device, most_tiles),)](
        descriptor(a_TK, config.block_m, config.block_k),
        descriptor(b, *b_tile),
        y_TN,
        offsets,
        row_scale_T,
        weight_scale_EP,
        E=E,
        N=N,
        K=K,
        PARTS_OF_N=parts[0],
        PARTS_OF_K=parts[1],
        B_IS_EKN=b_is_ekn,
        HAS_ROW_SCALE=row_scale_T is not None,
        INTEGER=a_TK.dtype == torch.int8,
        EXPERTS=triton.next_power_of_2(E),
        GROUP_M=config.group_m,
        **launch_options(a_TK, config),
    )
    return y_TN.to(torch.bfloat16)
