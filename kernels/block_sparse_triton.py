"""The portable programs of the block-sparse products; `kernels/block_sparse.py` launches them.

A program owns one output tile.  In sdd that is a tile of the topology; in dsd and dds it walks the nonzero tiles of its
row (or column).
"""

# mypy: disable-error-code="no-untyped-def"
import triton
import triton.language as tl

from kernels.tile_launch import dot_tiles, loop_bound, swizzle


@triton.jit
def sdd_kernel(
    a_MK,
    b_desc,
    values_NRC,
    rows_N,
    columns_N,
    num_tiles_1,
    a_scale_M,
    b_scale_N,
    M,
    N,
    K: tl.constexpr,
    B_IS_NK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    INTEGER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """values[i] = tile (rows[i], columns[i]) of a b."""
    first, step = tl.program_id(0), tl.num_programs(0)
    count = tl.load(num_tiles_1)
    for tile in range(loop_bound(first, INTERPRET), loop_bound(count, INTERPRET), loop_bound(step, INTERPRET)):
        row = tl.load(rows_N + tile) * BLOCK_M
        column = tl.load(columns_N + tile) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)  # [BM, BN]
        for k in range(0, K, BLOCK_K):
            a = a_MK.load([row, k])  # [BM, BK]
            if B_IS_NK:
                b = b_desc.load([column, k]).T
            else:
                b = b_desc.load([k, column])  # [BK, BN]
            acc = dot_tiles(a, b, acc, WIDEN)
        y = acc.to(tl.float32)
        in_row = tl.arange(0, BLOCK_M)
        in_column = tl.arange(0, BLOCK_N)
        if HAS_SCALES:
            a_scale = tl.load(a_scale_M + row + in_row, mask=row + in_row < M, other=0.0)
            b_scale = tl.load(b_scale_N + column + in_column, mask=column + in_column < N, other=0.0)
            y = y * (a_scale[:, None] * b_scale[None, :])
        at = values_NRC + (tile * BLOCK_M + in_row).to(tl.int64)[:, None] * BLOCK_N + in_column[None, :]
        tl.store(at, y.to(values_NRC.dtype.element_ty))


@triton.jit
def sparse_dense_kernel(
    values_desc,
    dense_desc,
    out_MN,
    offsets,
    sum_blocks_N,
    order_N,
    row_scale_M,
    column_scale_N,
    M,
    N,
    SPARSE_LEFT: tl.constexpr,
    SUM_OVER_ROWS: tl.constexpr,
    DENSE_IS_NK: tl.constexpr,
    VALUE_ROWS: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    INTEGER: tl.constexpr,
    GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    INTERPRET: tl.constexpr,
):
    """out = S dense (SPARSE_LEFT) or dense S; the sum walks the rows or the columns of the stored tiles."""
    STEPS: tl.constexpr = SUM_BLOCK // BLOCK_K
    m, n = swizzle(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    line = m if SPARSE_LEFT else n
    dense_start = n * BLOCK_N if SPARSE_LEFT else m * BLOCK_M
    first = tl.load(offsets + line)
    last = tl.load(offsets + line + 1)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)  # [BM, BN]
    for step in range(0, loop_bound((last - first) * STEPS, INTERPRET)):
        entry = first + step // STEPS
        within = step % STEPS * BLOCK_K
        k = tl.load(sum_blocks_N + entry) * SUM_BLOCK + within
        if SUM_OVER_ROWS:
            s = values_desc.load([tl.load(order_N + entry) * VALUE_ROWS + within, 0])  # [BK, block columns]
        else:
            s = values_desc.load([entry * VALUE_ROWS, within]).T  # [BK, block rows]
        if SPARSE_LEFT:
            if DENSE_IS_NK:
                dense = dense_desc.load([dense_start, k]).T
            else:
                dense = dense_desc.load([k, dense_start])  # [BK, BN]
            acc = dot_tiles(s.T, dense, acc, WIDEN)
        else:
            acc = dot_tiles(dense_desc.load([dense_start, k]), s, acc, WIDEN)
    y = acc.to(tl.float32)
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_SCALES:
        row_scale = tl.load(row_scale_M + rows, mask=rows < M, other=0.0)
        column_scale = tl.load(column_scale_N + columns, mask=columns < N, other=0.0)
        y = y * (row_scale[:, None] * column_scale[None, :])
    at = out_MN + rows.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(at, y.to(out_MN.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])
