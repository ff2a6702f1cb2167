"""The block-sparse products for Hopper (sm_90a), with the tensor core instructions placed by hand (Gluon).

    sdd         S = a_scale b_scale (A B) at the tiles of a topology
    dsd, dds    C = row_scale column_scale (S B), S^T B, A S or A S^T

The engine is `gemm_hopper`'s: one step of the products is always in flight, and the ring of shared-memory slots runs on
across output tiles.  What the topology adds are the corners from which slots are filled, a few integers per step that
are read one step ahead.

A tile of 128 x 128 reads too much for what it multiplies, so a program of sdd computes two tiles of one row of tiles,
wherever their columns are, from one copy of A; a row with an odd number of tiles computes its last one twice.  dsd and
dds join 256 columns or rows of the dense operand.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.gemm_hopper import GROUP_M, STAGES, STEP_BYTES, WARPS, hopper_descriptor, open_ring, tile_origin
from kernels.launch import multiprocessors
from kernels.topology import Topology

LINE = 128
"""Rows (columns) of the sparse operand's tiles along the result."""
WIDE = 256
"""Columns (rows) of the result that a program of dsd (dds) computes."""


@gluon.jit
def _pair(task, tasks, used, pairs_ptr, rows_ptr, columns_ptr, COLUMNS: gl.constexpr):
    """(first tile, row, two columns of 128, whether the second counts) of a task of sdd."""
    at = gl.maximum(gl.minimum(task, tasks - 1), 0)
    if COLUMNS == 128:
        tile = gl.load(pairs_ptr + at)
        row = gl.load(rows_ptr + tile)
        other = gl.maximum(gl.minimum(tile + 1, used - 1), 0)
        both = (other > tile) & (gl.load(rows_ptr + other) == row)
        left = gl.load(columns_ptr + tile) * COLUMNS
        right = gl.where(both, gl.load(columns_ptr + other) * COLUMNS, left)
    else:
        tile = at
        row = gl.load(rows_ptr + tile)
        both = tile >= 0
        left = gl.load(columns_ptr + tile) * COLUMNS
        right = left + 128
    return tile, row * 128, left, right, both


@gluon.jit
def _load_pair(
    a_desc, b_desc, row, left, right, k, a_slot, left_slot, right_slot, ready, wanted, B_K_MAJOR: gl.constexpr
):  # fmt: skip
    mbarrier.expect(ready, a_desc.block_type.nbytes + 2 * b_desc.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(a_desc, [row, k], ready, a_slot, pred=wanted)
    if B_K_MAJOR:
        tma.async_copy_global_to_shared(b_desc, [left, k], ready, left_slot, pred=wanted)
        tma.async_copy_global_to_shared(b_desc, [right, k], ready, right_slot, pred=wanted)
    else:
        tma.async_copy_global_to_shared(b_desc, [k, left], ready, left_slot, pred=wanted)
        tma.async_copy_global_to_shared(b_desc, [k, right], ready, right_slot, pred=wanted)


@gluon.jit
def _scaled(acc, row_scale_ptr, column_scale_ptr, row, column, m, n, SCALES: gl.constexpr, layout: gl.constexpr):
    """The sums [BM, BN] as float32, times both scales."""
    values = acc.to(gl.float32)
    if SCALES:
        rows = row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, layout))
        row_scale = gl.load(row_scale_ptr + rows, mask=rows < m, other=0.0).expand_dims(1)
        column_scale = gl.load(column_scale_ptr + columns, mask=columns < n, other=0.0).expand_dims(0)
        values *= row_scale * column_scale
    return values


@gluon.jit
def _send(values, c_desc, c_tile, row, column):
    """Through shared memory to the result."""
    tma.store_wait(0)
    c_tile.store(values.to(c_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(c_desc, [row, column], c_tile)


@gluon.jit
def _sdd_kernel(
    a_desc, b_desc, values_desc, used_ptr, num_pairs_ptr, pairs_ptr, rows_ptr, columns_ptr,
    a_scale_ptr, b_scale_ptr, m, n, k,
    BLOCK_K: gl.constexpr, COLUMNS: gl.constexpr, B_K_MAJOR: gl.constexpr, SCALES: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Two tiles [128, 128] per task, or with COLUMNS = 256 the halves of one; results go to rows of `values_desc`."""
    ACC: gl.constexpr = gl.int32 if a_desc.dtype == gl.int8 else gl.float32
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, 128, 256 // a_desc.dtype.primitive_bitwidth]
    )
    a_ring, left_ring, ready = open_ring(a_desc, b_desc, STAGES)
    right_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_type.shape, b_desc.layout)
    c_tile = gl.allocate_shared_memory(values_desc.dtype, values_desc.block_type.shape, values_desc.layout)

    first = gl.program_id(0)
    used = gl.load(used_ptr)
    tasks = gl.load(num_pairs_ptr) if COLUMNS == 128 else used
    steps = gl.cdiv(k, BLOCK_K)
    total = gl.cdiv(tasks - first, PROGRAMS) * steps
    next_task = first
    next_k = first * 0
    _, row, left, right, _ = _pair(next_task, tasks, used, pairs_ptr, rows_ptr, columns_ptr, COLUMNS)
    for i in gl.static_range(STAGES - 1):
        _load_pair(
            a_desc, b_desc, row, left, right, next_k, a_ring.index(i), left_ring.index(i), right_ring.index(i),
            ready.index(i), i < total, B_K_MAJOR,
        )  # fmt: skip
        next_k += BLOCK_K
        if next_k >= k:
            next_k = first * 0
            next_task += PROGRAMS
            _, row, left, right, _ = _pair(next_task, tasks, used, pairs_ptr, rows_ptr, columns_ptr, COLUMNS)

    done = 0
    for task in range(first, tasks, PROGRAMS):
        left_acc = gl.zeros((128, 128), ACC, layout)
        right_acc = gl.zeros((128, 128), ACC, layout)
        for step in range(steps):
            slot = done % STAGES
            mbarrier.wait(ready.index(slot), (done // STAGES) & 1)
            left_b = left_ring.index(slot)
            right_b = right_ring.index(slot)
            if B_K_MAJOR:
                left_b = left_b.permute((1, 0))
                right_b = right_b.permute((1, 0))
            left_acc = warpgroup_mma(a_ring.index(slot), left_b, left_acc, use_acc=step > 0, is_async=True)
            right_acc = warpgroup_mma(a_ring.index(slot), right_b, right_acc, use_acc=step > 0, is_async=True)
            left_acc, right_acc = warpgroup_mma_wait(2, deps=(left_acc, right_acc))  # the step before left its slot
            coming = done + STAGES - 1
            free = coming % STAGES
            _load_pair(
                a_desc, b_desc, row, left, right, next_k, a_ring.index(free), left_ring.index(free),
                right_ring.index(free), ready.index(free), coming < total, B_K_MAJOR,
            )  # fmt: skip
            done += 1
            next_k += BLOCK_K
            if next_k >= k:
                next_k = first * 0
                next_task += PROGRAMS
                _, row, left, right, _ = _pair(next_task, tasks, used, pairs_ptr, rows_ptr, columns_ptr, COLUMNS)
        left_acc, right_acc = warpgroup_mma_wait(0, deps=(left_acc, right_acc))

        tile, at, at_left, at_right, second = _pair(task, tasks, used, pairs_ptr, rows_ptr, columns_ptr, COLUMNS)
        values = _scaled(left_acc, a_scale_ptr, b_scale_ptr, at, at_left, m, n, SCALES, layout)
        _send(values, values_desc, c_tile, tile * 128, 0)
        if second:
            values = _scaled(right_acc, a_scale_ptr, b_scale_ptr, at, at_right, m, n, SCALES, layout)
            if COLUMNS == 128:
                _send(values, values_desc, c_tile, tile * 128 + 128, 0)
            else:
                _send(values, values_desc, c_tile, tile * 128, 128)
    tma.store_wait(0)


@gluon.jit
def _seek(
    offsets_ptr, tile, tiles_m, tiles_n,
    SPARSE_LEFT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr,
    PROGRAMS: gl.constexpr,
):  # fmt: skip
    """(tile, its first stored tile, the end of those, its place on the dense side) of the next tile with a sum."""
    total = tiles_m * tiles_n
    row, column = tile_origin(gl.minimum(tile, total - 1), tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
    line = row // BLOCK_M if SPARSE_LEFT else column // BLOCK_N
    entry = gl.load(offsets_ptr + line)
    last = gl.load(offsets_ptr + line + 1)
    while (tile < total) & (entry == last):
        tile += PROGRAMS
        row, column = tile_origin(gl.minimum(tile, total - 1), tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        line = row // BLOCK_M if SPARSE_LEFT else column // BLOCK_N
        entry = gl.load(offsets_ptr + line)
        last = gl.load(offsets_ptr + line + 1)
    return tile, entry, last, (column if SPARSE_LEFT else row)


@gluon.jit
def _stored(order_ptr, sum_blocks_ptr, entry, capacity, SUM_OVER_ROWS: gl.constexpr):
    """(which stored tile, which block of the sum) an entry of the topology's index is."""
    at = gl.minimum(entry, capacity - 1)
    if SUM_OVER_ROWS:
        source = gl.load(order_ptr + at)
    else:
        source = at
    return source, gl.load(sum_blocks_ptr + at)


@gluon.jit
def _load_sum_step(
    position, sparse_desc, dense_desc, sparse_slot, dense_slot, ready, offsets_ptr, sum_blocks_ptr, order_ptr,
    capacity, tiles_m, tiles_n,
    SPARSE_LEFT: gl.constexpr, SUM_OVER_ROWS: gl.constexpr, DENSE_K_MAJOR: gl.constexpr, VALUE_ROWS: gl.constexpr,
    SUM_BLOCK: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP_M: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """Start the copies of one step, if there is one left, and return the position after it."""
    tile, entry, last, dense_at, source, block, within = position
    wanted = tile < tiles_m * tiles_n
    mbarrier.expect(ready, sparse_desc.block_type.nbytes + dense_desc.block_type.nbytes, pred=wanted)
    if SUM_OVER_ROWS:
        corner = [source * VALUE_ROWS + within, source * 0]
    else:
        corner = [source * VALUE_ROWS, within]
    tma.async_copy_global_to_shared(sparse_desc, corner, ready, sparse_slot, pred=wanted)
    k = block * SUM_BLOCK + within
    if DENSE_K_MAJOR:
        tma.async_copy_global_to_shared(dense_desc, [dense_at, k], ready, dense_slot, pred=wanted)
    else:
        tma.async_copy_global_to_shared(dense_desc, [k, dense_at], ready, dense_slot, pred=wanted)
    within += BLOCK_K
    if within == SUM_BLOCK:
        within = source * 0
        entry += 1
        if entry == last:
            tile, entry, last, dense_at = _seek(
                offsets_ptr, tile + PROGRAMS, tiles_m, tiles_n, SPARSE_LEFT, BLOCK_M, BLOCK_N, GROUP_M, PROGRAMS
            )
        source, block = _stored(order_ptr, sum_blocks_ptr, entry, capacity, SUM_OVER_ROWS)
    return tile, entry, last, dense_at, source, block, within


@gluon.jit
def _sparse_dense_kernel(
    sparse_desc, dense_desc, c_desc, offsets_ptr, sum_blocks_ptr, order_ptr, row_scale_ptr, column_scale_ptr,
    m, n, capacity,
    SPARSE_LEFT: gl.constexpr, SUM_OVER_ROWS: gl.constexpr, DENSE_K_MAJOR: gl.constexpr, VALUE_ROWS: gl.constexpr,
    SUM_BLOCK: gl.constexpr, SCALES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """C = S dense (SPARSE_LEFT) or dense S; the sum walks the rows or the columns of the stored tiles."""
    INTEGER: gl.constexpr = sparse_desc.dtype == gl.int8
    ACC: gl.constexpr = gl.int32 if INTEGER else gl.float32
    WIDTH: gl.constexpr = 128 if INTEGER else BLOCK_N  # see `gemm_hopper`
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[num_warps, 1],
        instr_shape=[16, WIDTH, 256 // sparse_desc.dtype.primitive_bitwidth],
    )
    sparse_ring, dense_ring, ready = open_ring(sparse_desc, dense_desc, STAGES)
    c_tile = gl.allocate_shared_memory(c_desc.dtype, c_desc.block_type.shape, c_desc.layout)

    tiles_m = gl.cdiv(m, BLOCK_M)
    tiles_n = gl.cdiv(n, BLOCK_N)
    first_tile = gl.program_id(0)
    start, entry, last, dense_at = _seek(
        offsets_ptr, first_tile, tiles_m, tiles_n, SPARSE_LEFT, BLOCK_M, BLOCK_N, GROUP_M, PROGRAMS
    )
    source, block = _stored(order_ptr, sum_blocks_ptr, entry, capacity, SUM_OVER_ROWS)
    coming = (start, entry, last, dense_at, source, block, source * 0)
    for i in gl.static_range(STAGES - 1):
        coming = _load_sum_step(
            coming, sparse_desc, dense_desc, sparse_ring.index(i), dense_ring.index(i), ready.index(i),
            offsets_ptr, sum_blocks_ptr, order_ptr, capacity, tiles_m, tiles_n, SPARSE_LEFT, SUM_OVER_ROWS,
            DENSE_K_MAJOR, VALUE_ROWS, SUM_BLOCK, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, PROGRAMS,
        )  # fmt: skip

    done = 0
    for tile in range(first_tile, tiles_m * tiles_n, PROGRAMS):
        row, column = tile_origin(tile, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        line = row // BLOCK_M if SPARSE_LEFT else column // BLOCK_N
        steps = (gl.load(offsets_ptr + line + 1) - gl.load(offsets_ptr + line)) * (SUM_BLOCK // BLOCK_K)
        acc = gl.zeros((BLOCK_M, BLOCK_N), ACC, layout)
        for step in range(steps):
            slot = done % STAGES
            mbarrier.wait(ready.index(slot), (done // STAGES) & 1)
            a = sparse_ring.index(slot) if SPARSE_LEFT else dense_ring.index(slot)
            b = dense_ring.index(slot) if SPARSE_LEFT else sparse_ring.index(slot)
            if SPARSE_LEFT and SUM_OVER_ROWS:
                a = a.permute((1, 0))
            if (SPARSE_LEFT and DENSE_K_MAJOR) or not (SPARSE_LEFT or SUM_OVER_ROWS):
                b = b.permute((1, 0))
            acc = warpgroup_mma(a, b, acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before left its slot
            free = (done + STAGES - 1) % STAGES
            coming = _load_sum_step(
                coming, sparse_desc, dense_desc, sparse_ring.index(free), dense_ring.index(free), ready.index(free),
                offsets_ptr, sum_blocks_ptr, order_ptr, capacity, tiles_m, tiles_n, SPARSE_LEFT, SUM_OVER_ROWS,
                DENSE_K_MAJOR, VALUE_ROWS, SUM_BLOCK, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, PROGRAMS,
            )  # fmt: skip
            done += 1
        acc = warpgroup_mma_wait(0, deps=(acc,))
        values = _scaled(acc, row_scale_ptr, column_scale_ptr, row, column, m, n, SCALES, layout)
        left, right = values.reshape([BLOCK_M, 2, BLOCK_N // 2]).permute(0, 2, 1).split()
        _send(left, c_desc, c_tile, row, column)
        _send(right, c_desc, c_tile, row, column + BLOCK_N // 2)
    tma.store_wait(0)


def hopper_sdd(
    a_MK: Tensor, b: Tensor, values: Tensor, topology: Topology, *,
    b_k_major: bool, a_scale_M: Tensor | None, b_scale_N: Tensor | None,
) -> None:  # fmt: skip
    """Write `values` [capacity, 128, 128 or 256], bfloat16; arguments as checked by `block_sparse.sdd`."""
    columns = topology.block[1]
    block_k = STEP_BYTES // a_MK.element_size()
    programs = multiprocessors(a_MK.device)
    _sdd_kernel[(programs,)](
        hopper_descriptor(a_MK, (LINE, block_k)),
        hopper_descriptor(b, (128, block_k) if b_k_major else (block_k, 128)),
        hopper_descriptor(values.view(-1, columns), (LINE, 128)),
        topology.row_offsets[-1:], topology.num_pairs, topology.pairs, topology.rows, topology.columns,
        a_scale_M, b_scale_N, a_MK.shape[0], b.shape[0 if b_k_major else 1], a_MK.shape[1],
        BLOCK_K=block_k, COLUMNS=columns, B_K_MAJOR=b_k_major, SCALES=a_scale_M is not None,
        STAGES=STAGES, PROGRAMS=programs, num_warps=WARPS,
    )  # fmt: skip


def hopper_sparse_dense(
    values: Tensor, dense: Tensor, out_MN: Tensor, topology: Topology, *,
    left: bool, over_rows: bool, dense_k_major: bool, row_scale_M: Tensor | None, column_scale_N: Tensor | None,
) -> None:  # fmt: skip
    """Write `out_MN`, bfloat16: S dense (`left`) or dense S, the sum over the rows or columns of the stored tiles."""
    block_k = STEP_BYTES // values.element_size()
    block_m, block_n = (LINE, WIDE) if left else (WIDE, LINE)
    side = block_n if left else block_m
    programs = multiprocessors(values.device)
    options: dict[str, Any] = {"SPARSE_LEFT": left, "SUM_OVER_ROWS": over_rows, "DENSE_K_MAJOR": dense_k_major}
    _sparse_dense_kernel[(programs,)](
        hopper_descriptor(values.view(-1, topology.block[1]), (block_k, LINE) if over_rows else (LINE, block_k)),
        hopper_descriptor(dense, (side, block_k) if dense_k_major else (block_k, side)),
        hopper_descriptor(out_MN, (block_m, block_n // 2)),
        topology.column_offsets if over_rows else topology.row_offsets,
        topology.rows_by_column if over_rows else topology.columns,
        topology.order, row_scale_M, column_scale_N, *out_MN.shape, topology.capacity,
        VALUE_ROWS=topology.block[0], SUM_BLOCK=topology.block[0 if over_rows else 1],
        SCALES=row_scale_M is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=GROUP_M,
        STAGES=STAGES, PROGRAMS=programs, num_warps=WARPS, **options,
    )  # fmt: skip
