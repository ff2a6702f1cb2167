"""Kernels of rows whose features are spread over ranks; what they are for is told in `sharded`.

Tiles are those of `sparsify_triton`, one row per program.  Magnitudes are counted, and the largest codes masked, as bit
planes (`bit_planes`); 128 bins at once, `tl.histogram`, take 48 instructions per code, both rounds here together 12.

Shapes: T tokens, F features of this rank, R ranks; x has 2 F columns with a gated activation, else F.
"""

import triton
import triton.language as tl

from kernels.bit_planes import keep_above, store_coarse_counts, store_fine_counts
from kernels.fused import gained, input_row, normalized_row, sum_of_squares
from kernels.sparsify_triton import (
    larger,
    load_quarter,
    pack_codes,
    quarter_tile,
    row_gamma,
    row_scale,
    store_codes,
    store_largest,
)
from kernels.words import low_bytes


@triton.jit
def sums_kernel(
    x_ptr, gain_ptr, sums_ptr, row_stride, features, quarter,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """One row; the sum of squares is that of a norm only."""
    row = tl.program_id(0).to(tl.int64)
    index, mask = quarter_tile(quarter, ROWS, COLUMNS, 0)
    a0, a1, a2, a3 = input_row(x_ptr + row * row_stride, index, quarter, features, mask, ACTIVATION)
    if NORM:
        tl.store(sums_ptr + 2 * row, sum_of_squares(a0, a1, a2, a3))
        g0 = gained(a0, gain_ptr, index, quarter, features, 0, mask)
        g1 = gained(a1, gain_ptr, index, quarter, features, 1, mask)
        g2 = gained(a2, gain_ptr, index, quarter, features, 2, mask)
        g3 = gained(a3, gain_ptr, index, quarter, features, 3, mask)
        largest = row_gamma(g0, g1, g2, g3)
    else:
        tl.store(sums_ptr + 2 * row, 0.0)
        largest = row_gamma(a0, a1, a2, a3)
    tl.store(sums_ptr + 2 * row + 1, largest)


@triton.jit
def _whole_row(
    sums_ptr, row, num_rows, ranks, total, eps, RANKS: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """1/rms (of a norm) and max|x| of a row from what its ranks found."""
    rank = tl.arange(0, RANKS)
    place = sums_ptr + 2 * (rank.to(tl.int64) * num_rows + row)
    gamma = tl.reduce(tl.load(place + 1, mask=rank < ranks, other=0.0), 0, larger)
    rstd = gamma  # not used
    if NORM:
        squares = tl.sum(tl.load(place, mask=rank < ranks, other=0.0), axis=0)
        rstd = tl.rsqrt(squares / total + eps)
        gamma = (gamma * rstd).to(tl.bfloat16).to(tl.float32)
    return rstd, gamma


@triton.jit
def _row(
    x_ptr, gain_ptr, sums_ptr, rstd_ptr, row, row_stride, num_rows, ranks, total, eps, features, quarter, index, mask,
    RANKS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """The four quarters of x and the largest magnitude of the whole row."""
    x0, x1, x2, x3 = input_row(x_ptr + row * row_stride, index, quarter, features, mask, ACTIVATION)
    rstd, gamma = _whole_row(sums_ptr, row, num_rows, ranks, total, eps, RANKS, NORM)
    if NORM:
        tl.store(rstd_ptr + row, rstd)
        x0, x1, x2, x3 = normalized_row(x0, x1, x2, x3, rstd, gain_ptr, index, quarter, features, mask)
    return x0, x1, x2, x3, gamma


@triton.jit
def count_kernel(
    x_ptr, gain_ptr, sums_ptr, codes_ptr, scale_ptr, rstd_ptr, counts_ptr,
    row_stride, num_rows, ranks, total, eps, features, quarter,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr, ACTIVATION: tl.constexpr, NORM: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    """One row: its codes, and how many have each of the upper four bits of a magnitude."""
    row = tl.program_id(0).to(tl.int64)
    index, mask = quarter_tile(quarter, ROWS, COLUMNS, 0)
    x0, x1, x2, x3, gamma = _row(
        x_ptr, gain_ptr, sums_ptr, rstd_ptr, row, row_stride, num_rows, ranks, total, eps, features, quarter, index,
        mask, RANKS, ACTIVATION, NORM,
    )  # fmt: skip
    scale = row_scale(gamma)
    tl.store(scale_ptr + row, scale)
    codes = pack_codes(x0, x1, x2, x3, gamma, scale, FACTOR)
    store_largest(codes, codes_ptr + row * features, index, quarter, features, mask, 0, False, 0)
    store_coarse_counts(codes, counts_ptr + row * 8, ROWS * COLUMNS * 4 - features)


@triton.jit
def _kth_entry(counts_ptr, row, kept, ranks, rank, rank_stride, ENTRIES: tl.constexpr, RANKS: tl.constexpr):
    """Of tables of counts, one per rank: the entry of the `kept`-th largest, how many are above it, and tied lower."""
    entry = tl.arange(0, ENTRIES)[None, :]
    holder = tl.arange(0, RANKS)[:, None]
    place = counts_ptr + holder.to(tl.int64) * rank_stride + row * ENTRIES + entry
    counts = tl.load(place, mask=holder < ranks, other=0).to(tl.int32)
    total = tl.sum(counts, axis=0)
    found = tl.sum((tl.cumsum(total, axis=0, reverse=True) >= kept).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(tl.arange(0, ENTRIES) > found, total, 0), axis=0)
    lower = tl.sum(tl.sum(tl.where((entry == found) & (holder < rank), counts, 0), axis=1), axis=0)
    return found, above, lower


@triton.jit
def _load_codes(codes_row, index, quarter, features, mask):
    c0 = load_quarter(codes_row, index, quarter, features, 0, mask).to(tl.int32)
    c1 = load_quarter(codes_row, index, quarter, features, 1, mask).to(tl.int32)
    c2 = load_quarter(codes_row, index, quarter, features, 2, mask).to(tl.int32)
    c3 = load_quarter(codes_row, index, quarter, features, 3, mask).to(tl.int32)
    return low_bytes(c0, c1, c2, c3)


@triton.jit
def fine_kernel(
    codes_ptr, coarse_ptr, fine_ptr, features, quarter, kept, ranks, coarse_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One row: how many of its codes have each magnitude around the threshold."""
    row = tl.program_id(0).to(tl.int64)
    index, mask = quarter_tile(quarter, ROWS, COLUMNS, 0)
    codes = _load_codes(codes_ptr + row * features, index, quarter, features, mask)
    prefix, _, _ = _kth_entry(coarse_ptr, row, kept, ranks, 0, coarse_stride, 16, RANKS)
    store_fine_counts(codes, prefix, fine_ptr + row * 4, ROWS * COLUMNS * 4 - features)


@triton.jit
def keep_kernel(
    codes_ptr, coarse_ptr, fine_ptr, features, quarter, kept, rank, ranks, coarse_stride, fine_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One row: its codes, masked in place."""
    row = tl.program_id(0).to(tl.int64)
    index, mask = quarter_tile(quarter, ROWS, COLUMNS, 0)
    codes_row = codes_ptr + row * features
    codes = _load_codes(codes_row, index, quarter, features, mask)
    prefix, above, _ = _kth_entry(coarse_ptr, row, kept, ranks, rank, coarse_stride, 16, RANKS)
    low, above_low, lower = _kth_entry(fine_ptr, row, kept - above, ranks, rank, fine_stride, 8, RANKS)
    codes = keep_above(codes, prefix * 8 + low, kept - above - above_low - lower)
    store_largest(codes, codes_row, index, quarter, features, mask, 0, False, 0)


@triton.jit
def local_kernel(
    x_ptr, gain_ptr, sums_ptr, codes_ptr, scale_ptr, rstd_ptr,
    row_stride, num_rows, ranks, total, eps, features, quarter, kept,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPARSE: tl.constexpr, RANKS: tl.constexpr,
    ACTIVATION: tl.constexpr, NORM: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """One row, as `fused.fuse_row` under the given norm and scale."""
    row = tl.program_id(0).to(tl.int64)
    index, mask = quarter_tile(quarter, ROWS, COLUMNS, BLOCK)
    x0, x1, x2, x3, gamma = _row(
        x_ptr, gain_ptr, sums_ptr, rstd_ptr, row, row_stride, num_rows, ranks, total, eps, features, quarter, index,
        mask, RANKS, ACTIVATION, NORM,
    )  # fmt: skip
    store_codes(
        x0, x1, x2, x3, gamma, codes_ptr, scale_ptr, row, index, quarter, features, mask, kept, SPARSE, BLOCK, FACTOR
    )


@triton.jit
def normalize_kernel(
    x_ptr, sums_ptr, gain_ptr, y_ptr, rstd_ptr, row_stride, num_rows, ranks, total, eps, features,
    BLOCK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One row, as `norm` under the given mean square."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    mask = column < features
    rstd, _ = _whole_row(sums_ptr, row, num_rows, ranks, total, eps, RANKS, True)
    tl.store(rstd_ptr + row, rstd)
    x = tl.load(x_ptr + row * row_stride + column, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(gain_ptr + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * features + column, (x * gain * rstd).to(tl.bfloat16), mask=mask)
