"""Grouped matrix products over the experts of a mixture: one launch, any token counts, no host synchronization.

Tokens are sorted by expert; expert e owns the rows offsets[e] to offsets[e + 1], and `offsets` never leaves the device.

    forward   y[t]  = x_scale[t] w_scale[e] (codes[t] ternary[e]^T)     int8, int32 sums, one rounding to bfloat16
    dgrad    dX[t] = w_scale[e] (dY[t] ternary[e])                     bfloat16 (exact), float32 sums
              dX[t] = g_scale[t] (codes[t] ternary[e])                  FP8 (fast): `grouped_gradients` makes the codes

All are one kernel: rows of `a` times the matrix of their expert.  On Hopper it is `grouped_hopper`'s, placed by hand;
the kernel below is the same product for every GPU that Triton knows, and for its interpreter.  The launch size is
fixed; each program derives the list of tiles from the offsets (a cumulative sum over experts) and walks its share.
The obvious alternatives are one GEMM per expert (E launches, and the counts must be known on the host) or padding every
expert to its capacity (wasted products).  A tile that runs over the end of its expert also multiplies rows of the next
one; they are not stored.

A fused weight has P parts with a scale each (gate and up: P = 2).  In the forward they are ranges of outputs; in dgrad
they are ranges of the sum, so the accumulator changes its unit from one part's scale to the next between the ranges.

Shapes: T token copies, E experts, D input features, O output features, P parts of a weight.
"""

# mypy: disable-error-code="no-untyped-def"

import importlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.tile_launch import (
    HOPPER_STEP_BYTES,
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

FORWARD_CONFIG = TileConfig(128, 256, 128, num_warps=8, num_stages=4)
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
    EXPERT_IN_K: tl.constexpr,
    B_K_MAJOR: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_WEIGHT_SCALE: tl.constexpr,
    INTEGER: tl.constexpr,
    EXPERTS: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """y[t] = row_scale[t] weight_scale[e] (a[t] b[e]).

    b_EX is [E * N, K]; with EXPERT_IN_K [N, E * K], or [E * K, N] unless B_K_MAJOR.
    """
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
                if not EXPERT_IN_K:
                    b = b_EX.load([expert * N + column, k]).T  # [BK, BN]
                elif B_K_MAJOR:
                    b = b_EX.load([column, expert * K + k]).T  # what lies past K meets zeros of `a`
                else:
                    b = b_EX.load([expert * K + k, column])
                acc = dot_tiles(a, b, acc, WIDEN)
            if part + 1 < PARTS_OF_K:
                acc *= tl.load(weight_scale_EP + expert * PARTS + part) / tl.load(
                    weight_scale_EP + expert * PARTS + part + 1
                )
        rows = row + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        y = acc.to(tl.float32)
        if PARTS_OF_N > 1:
            part_of_column = tl.minimum(columns // (N // PARTS_OF_N), PARTS_OF_N - 1)
            scale = tl.load(weight_scale_EP + expert * PARTS + part_of_column)[None, :]
        elif HAS_WEIGHT_SCALE:
            scale = tl.load(weight_scale_EP + expert * PARTS + PARTS_OF_K - 1)
        if HAS_ROW_SCALE:
            row_scale = tl.load(row_scale_T + rows, mask=rows < end, other=0.0)[:, None]
            if HAS_WEIGHT_SCALE:
                y = y * (row_scale * scale)  # the product of the scales first, as the reference has it
            else:
                y = y * row_scale
        elif HAS_WEIGHT_SCALE:
            y = y * scale
        mask = (rows < end)[:, None] & (columns < N)[None, :]
        tl.store(y_TN + rows.to(tl.int64)[:, None] * N + columns[None, :], y.to(y_TN.dtype.element_ty), mask=mask)


def grouped_forward(
    codes_TD: Tensor,
    weight_EOD: Tensor,
    offsets: Tensor,
    *,
    x_scale_T: Tensor,
    weight_scale_EP: Tensor,
    config: TileConfig | HopperTile | None = None,
) -> Tensor:
    """y = x_scale weight_scale (codes weight[e]^T) of each token copy with its expert's weight, bit for bit.

    Args:
        codes_TD: int8 codes, sorted by expert; D is a multiple of 16 below 131,072 (exact sums).
        weight_EOD: int8 ternary codes.
        offsets: int32 [E + 1], first row of each expert and T at the end, non-decreasing; stays on the device.
        x_scale_T: float32 scale of each row.
        weight_scale_EP: float32 scale of each expert's P equal ranges of output features; P divides O.
        config: tile shape of the portable or of the Hopper kernel; absent: a measured one of the best that runs here.

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
    check_same_device(codes_TD=codes_TD, weight_EOD=weight_EOD, offsets=offsets, x_scale_T=x_scale_T,
                      weight_scale_EP=weight_scale_EP)  # fmt: skip
    y_TO = torch.empty(T, O, dtype=torch.bfloat16, device=codes_TD.device)
    return _rows(
        codes_TD, weight_EOD, y_TO, offsets, x_scale_T, weight_scale_EP, (parts, 1),
        chosen_tile(config, FORWARD_CONFIG, O, codes_TD.device), expert_in_k=False, b_k_major=True,
    )  # fmt: skip


def grouped_dgrad(
    grad_TO: Tensor,
    weight_EOD: Tensor,
    offsets: Tensor,
    *,
    weight_scale_EP: Tensor,
    config: TileConfig | HopperTile | None = None,
) -> Tensor:
    """dX = weight_scale (dY weight[e]) in bfloat16 with float32 sums.

    Args:
        grad_TO: bfloat16 gradient of the output, sorted by expert; O is a multiple of 8.
        weight_EOD: bfloat16 ternary codes (-1, 0, 1), converted from int8 once per step; D is a multiple of 8.
        offsets: int32 [E + 1], as in `grouped_forward`.
        weight_scale_EP: float32; with P > 1, O / P is a multiple of the tile's `block_k` (64 by default).
        config: tile shape of the portable or of the Hopper kernel; absent: a measured one of the best that runs here.

    Returns:
        bfloat16 [T, D].

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_operand("grad_TO", grad_TO, dtype=torch.bfloat16, shape=(None, None))
    T, O = grad_TO.shape
    check_operand("weight_EOD", weight_EOD, dtype=torch.bfloat16, shape=(None, O, None))
    E, _, D = weight_EOD.shape
    tile = chosen_tile(config, DGRAD_CONFIG, D, grad_TO.device)
    step = tile.block_k if isinstance(tile, TileConfig) else HOPPER_STEP_BYTES // grad_TO.element_size()
    parts = _check_groups(offsets, weight_scale_EP, E, O, multiple=step)
    check_same_device(grad_TO=grad_TO, weight_EOD=weight_EOD, offsets=offsets, weight_scale_EP=weight_scale_EP)
    dx_TD = torch.empty(T, D, dtype=torch.bfloat16, device=grad_TO.device)
    return _rows(
        grad_TO, weight_EOD, dx_TD, offsets, None, weight_scale_EP, (1, parts), tile,
        expert_in_k=True, b_k_major=False,
    )  # fmt: skip


def grouped_dgrad_fp8(
    grad_TO: Tensor,
    weight_DEO: Tensor,
    offsets: Tensor,
    *,
    grad_scale_T: Tensor,
    config: TileConfig | HopperTile | None = None,
) -> Tensor:
    """dX = grad_scale (dY weight[e]) with FP8 operands; ternary codes are exact in FP8, dY is rounded.

    Hopper's 8-bit products want both operands contiguous along the sum, hence the transposed weight.  Its scales are
    in the codes of dY already.

    Args:
        grad_TO: float8_e4m3fn codes of dY times the weight's scales, from `grouped_gradients.quantize_gradient`; O is
            a multiple of 16.
        weight_DEO: float8_e4m3fn ternary codes, output features last, from `grouped_gradients.transposed_weight`.
        offsets: int32 [E + 1], as in `grouped_forward`.
        grad_scale_T: float32 scale of each row of `grad_TO`.
        config: tile shape of the portable or of the Hopper kernel; absent: a measured one of the best that runs here.

    Returns:
        bfloat16 [T, D].

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_operand("grad_TO", grad_TO, dtype=torch.float8_e4m3fn, shape=(None, None))
    T, O = grad_TO.shape
    check_operand("weight_DEO", weight_DEO, dtype=torch.float8_e4m3fn, shape=(None, None, O))
    D, E, _ = weight_DEO.shape
    check_tensor("offsets", offsets, dtype=torch.int32, shape=(E + 1,))
    check_tensor("grad_scale_T", grad_scale_T, dtype=torch.float32, shape=(T,))
    check_same_device(grad_TO=grad_TO, weight_DEO=weight_DEO, offsets=offsets, grad_scale_T=grad_scale_T)
    dx_TD = torch.empty(T, D, dtype=torch.bfloat16, device=grad_TO.device)
    return _rows(
        grad_TO, weight_DEO.flatten(1), dx_TD, offsets, grad_scale_T, None, (1, 1),
        chosen_tile(config, DGRAD_FP8_CONFIG, D, grad_TO.device), expert_in_k=True, b_k_major=True,
    )  # fmt: skip


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
    a_TK: Tensor, b: Tensor, y_TN: Tensor, offsets: Tensor, row_scale_T: Tensor | None, weight_scale_EP: Tensor | None,
    parts: tuple[int, int], config: TileConfig | HopperTile, *, expert_in_k: bool, b_k_major: bool,
) -> Tensor:  # fmt: skip
    """Fill y; `parts` of the weight over N and over K."""
    (T, K), N, E = a_TK.shape, y_TN.shape[1], offsets.shape[0] - 1
    if y_TN.numel() == 0:
        return y_TN
    if isinstance(config, HopperTile):
        importlib.import_module("kernels.grouped_hopper").hopper_rows(
            a_TK, b.reshape(-1, b.shape[-1]), y_TN, offsets, row_scale_T=row_scale_T, scale_EP=weight_scale_EP,
            parts_of="" if weight_scale_EP is None else "k" if expert_in_k else "n",
            expert_in_k=expert_in_k, b_k_major=b_k_major, tile=config,
        )  # fmt: skip
        return y_TN
    stored = y_TN.to(stored_dtype(y_TN.dtype))  # itself, but for the interpreter
    most_tiles = (T // config.block_m + min(E, T)) * triton.cdiv(N, config.block_n)
    b_tile = (config.block_n, config.block_k) if b_k_major else (config.block_k, config.block_n)
    _grouped_rows_kernel[(config.num_programs(a_TK.device, most_tiles),)](
        descriptor(a_TK, config.block_m, config.block_k), descriptor(b, *b_tile), stored, offsets,
        row_scale_T, weight_scale_EP,
        E=E, N=N, K=K, PARTS_OF_N=parts[0], PARTS_OF_K=parts[1], EXPERT_IN_K=expert_in_k, B_K_MAJOR=b_k_major,
        HAS_ROW_SCALE=row_scale_T is not None, HAS_WEIGHT_SCALE=weight_scale_EP is not None,
        INTEGER=a_TK.dtype == torch.int8, EXPERTS=triton.next_power_of_2(E), GROUP_M=config.group_m,
        **launch_options(a_TK, config),
    )  # fmt: skip
    return y_TN if stored is y_TN else y_TN.copy_(stored)
