"""dsd and dds for Hopper (sm_90a), with the tensor core instructions placed by hand (Gluon).

    C = row_scale column_scale (S B), S^T B, A S or A S^T

The engine is `gemm_hopper`'s: one step of the products is always in flight, and the ring of shared-memory slots runs on
across output tiles.  What the topology adds are the corners from which slots are filled: a few integers per step that
are read one step, and per line of tiles one line, ahead.  A program joins 256 columns or rows of the dense operand.

Lines differ in length, and every program has a few output tiles only.  So they are dealt out longest first, forth and
back (`_place`); a counter that programs draw from would balance as well, but has to be zeroed and waited for.
"""

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from kernels.block_sparse_hopper_store import halves, nothing_waits, scales, send_waiting
from kernels.gemm_hopper import STAGES, STEP_BYTES, WARPS, hopper_descriptor, open_ring, tile_origin
from kernels.launch import multiprocessors
from kernels.topology import Topology

LINE = 128
"""Rows (columns) of the sparse operand's tiles along the result."""
WIDE = 256
"""Columns (rows) of the result that a program of dsd (dds) computes."""
GROUP_LINES = 16
"""Lines of tiles that advance together through the dense operand's columns (rows), which they share in the cache."""


@gluon.jit
def _place(turn, PROGRAMS: gl.constexpr):
    """The tile of this program's turn: every other turn deals backwards, so a long line is followed by a short one."""
    program = gl.program_id(0)
    return turn * PROGRAMS + gl.where(turn % 2 == 0, program, PROGRAMS - 1 - program)


@gluon.jit
def _turns(tiles, PROGRAMS: gl.constexpr):
    """Tiles of this program."""
    full = tiles // PROGRAMS
    return full + (_place(full, PROGRAMS) < tiles).to(gl.int32)


@gluon.jit
def _visit(turn, lines_ptr, lines, tiles_across, ACROSS: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr):
    """(line of tiles, its first entry, its number of entries, the place on the dense side) of a turn."""
    tile = gl.minimum(_place(turn, PROGRAMS), lines * tiles_across - 1)
    at, across = tile_origin(tile, lines, tiles_across, 1, ACROSS, GROUP)
    line = gl.load(lines_ptr + at)
    return line, gl.load(lines_ptr + lines + at), gl.load(lines_ptr + 2 * lines + at), across


@gluon.jit
def _stored(order_ptr, sum_blocks_ptr, entry, capacity, sum_blocks, SUM_OVER_ROWS: gl.constexpr):
    """(which stored tile, which block of the sum) an entry of the topology's index is; past the last one, zeros."""
    inside = entry < capacity
    if SUM_OVER_ROWS:
        source = gl.load(order_ptr + entry, mask=inside, other=capacity)
    else:
        source = entry
    return source, gl.load(sum_blocks_ptr + entry, mask=inside, other=sum_blocks)


@gluon.jit
def _load_sum_step(
    position, sparse_desc, dense_desc, sparse_slot, dense_slot, ready, turns, lines_ptr, sum_blocks_ptr, order_ptr,
    capacity, lines, tiles_across, sum_blocks,
    SUM_OVER_ROWS: gl.constexpr, DENSE_K_MAJOR: gl.constexpr, VALUE_ROWS: gl.constexpr,
    SUM_BLOCK: gl.constexpr, ACROSS: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """Start the copies of one step, if there is one left, and return the position after it."""
    turn, entry, left, across, source, block, within, next_entry, next_left, next_across = position
    wanted = turn < turns
    mbarrier.expect(ready, sparse_desc.block_type.nbytes + dense_desc.block_type.nbytes, pred=wanted)
    if SUM_OVER_ROWS:
        corner = [source * VALUE_ROWS + within, source * 0]
    else:
        corner = [source * VALUE_ROWS, within]
    tma.async_copy_global_to_shared(sparse_desc, corner, ready, sparse_slot, pred=wanted)
    k = block * SUM_BLOCK + within
    if DENSE_K_MAJOR:
        tma.async_copy_global_to_shared(dense_desc, [across, k], ready, dense_slot, pred=wanted)
    else:
        tma.async_copy_global_to_shared(dense_desc, [k, across], ready, dense_slot, pred=wanted)
    within += BLOCK_K
    if within == SUM_BLOCK:
        within = source * 0
        entry += 1
        left -= 1
        if left == 0:
            turn += 1
            entry = next_entry
            left = next_left
            across = next_across
            _, next_entry, next_left, next_across = _visit(
                turn + 1, lines_ptr, lines, tiles_across, ACROSS, GROUP, PROGRAMS
            )
        source, block = _stored(order_ptr, sum_blocks_ptr, entry, capacity, sum_blocks, SUM_OVER_ROWS)
    return turn, entry, left, across, source, block, within, next_entry, next_left, next_across


@gluon.jit
def _sparse_dense_kernel(
    sparse_desc, dense_desc, c_desc, lines_ptr, sum_blocks_ptr, order_ptr, row_scale_ptr, column_scale_ptr,
    m, n, capacity, lines, sum_blocks,
    SPARSE_LEFT: gl.constexpr, SUM_OVER_ROWS: gl.constexpr, DENSE_K_MAJOR: gl.constexpr, VALUE_ROWS: gl.constexpr,
    SUM_BLOCK: gl.constexpr, SCALES: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """C = S dense (SPARSE_LEFT) or dense S; the sum walks the rows or the columns of the stored tiles."""
    INTEGER: gl.constexpr = sparse_desc.dtype == gl.int8
    ACC: gl.constexpr = gl.int32 if INTEGER else gl.float32
    WIDTH: gl.constexpr = 128 if INTEGER else BLOCK_N  # see `gemm_hopper`
    ACROSS: gl.constexpr = BLOCK_N if SPARSE_LEFT else BLOCK_M
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[num_warps, 1],
        instr_shape=[16, WIDTH, 256 // sparse_desc.dtype.primitive_bitwidth],
    )
    sparse_ring, dense_ring, ready = open_ring(sparse_desc, dense_desc, STAGES)
    c_tile = gl.allocate_shared_memory(c_desc.dtype, c_desc.block_type.shape, c_desc.layout)

    tiles_across = gl.cdiv(n if SPARSE_LEFT else m, ACROSS)
    turns = _turns(lines * tiles_across, PROGRAMS)
    line, entry, entries, across = _visit(0, lines_ptr, lines, tiles_across, ACROSS, GROUP, PROGRAMS)
    _, next_entry, next_left, next_across = _visit(1, lines_ptr, lines, tiles_across, ACROSS, GROUP, PROGRAMS)
    source, block = _stored(order_ptr, sum_blocks_ptr, entry, capacity, sum_blocks, SUM_OVER_ROWS)
    zero = line * 0
    coming = (zero, entry, entries, across, source, block, zero, next_entry, next_left, next_across)
    for i in gl.static_range(STAGES - 1):
        coming = _load_sum_step(
            coming, sparse_desc, dense_desc, sparse_ring.index(i), dense_ring.index(i), ready.index(i),
            turns, lines_ptr, sum_blocks_ptr, order_ptr, capacity, lines, tiles_across, sum_blocks, SUM_OVER_ROWS,
            DENSE_K_MAJOR, VALUE_ROWS, SUM_BLOCK, ACROSS, BLOCK_K, GROUP, PROGRAMS,
        )  # fmt: skip

    done = 0
    acc = gl.zeros((BLOCK_M, BLOCK_N), ACC, layout)
    waiting = nothing_waits(zero, (BLOCK_M, BLOCK_N), layout)
    for turn in range(turns):
        steps = entries * (SUM_BLOCK // BLOCK_K)
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
                turns, lines_ptr, sum_blocks_ptr, order_ptr, capacity, lines, tiles_across, sum_blocks, SUM_OVER_ROWS,
                DENSE_K_MAJOR, VALUE_ROWS, SUM_BLOCK, ACROSS, BLOCK_K, GROUP, PROGRAMS,
            )  # fmt: skip
            send_waiting(waiting, step, steps, c_desc, c_tile)
            done += 1

        # While the last step is multiplied: where this tile lies, its scales, and the next one.
        row = line * BLOCK_M if SPARSE_LEFT else across
        column = across if SPARSE_LEFT else line * BLOCK_N
        line, _, entries, across = _visit(turn + 1, lines_ptr, lines, tiles_across, ACROSS, GROUP, PROGRAMS)
        if SCALES:
            rows = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
            columns = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
            row_scale = scales(row_scale_ptr, rows, m).expand_dims(1)
            column_scale = scales(column_scale_ptr, columns, n).expand_dims(0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        values = acc.to(gl.float32)
        if SCALES:
            values *= row_scale * column_scale
        left, right = halves(values)
        waiting = (left, row, column, steps > 0, right, row, column + BLOCK_N // 2, steps > 0)
    send_waiting(waiting, 0, 1, c_desc, c_tile)
    tma.store_wait(0)


def hopper_sparse_dense(
    values: Tensor, dense: Tensor, out_MN: Tensor, topology: Topology, *,
    left: bool, over_rows: bool, dense_k_major: bool, row_scale_M: Tensor | None, column_scale_N: Tensor | None,
) -> None:  # fmt: skip
    """Write `out_MN`, bfloat16: S dense (`left`) or dense S, the sum over the rows or columns of the stored tiles."""
    block_k = STEP_BYTES // values.element_size()
    block_m, block_n = (LINE, WIDE) if left else (WIDE, LINE)
    side = block_n if left else block_m
    programs = multiprocessors(values.device)
    lines, sum_blocks = topology.grid[::-1] if over_rows else topology.grid
    options: dict[str, Any] = {"SPARSE_LEFT": left, "SUM_OVER_ROWS": over_rows, "DENSE_K_MAJOR": dense_k_major}
    _sparse_dense_kernel[(programs,)](
        hopper_descriptor(values.view(-1, topology.block[1]), (block_k, LINE) if over_rows else (LINE, block_k)),
        hopper_descriptor(dense, (side, block_k) if dense_k_major else (block_k, side)),
        hopper_descriptor(out_MN, (block_m, block_n // 2)),
        topology.longest_columns if over_rows else topology.longest_rows,
        topology.rows_by_column if over_rows else topology.columns,
        topology.order, row_scale_M, column_scale_N, *out_MN.shape, topology.capacity, lines, sum_blocks,
        VALUE_ROWS=topology.block[0], SUM_BLOCK=topology.block[0 if over_rows else 1],
        SCALES=row_scale_M is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP=GROUP_LINES,
        STAGES=STAGES, PROGRAMS=programs, num_warps=WARPS, **options,
    )  # fmt: skip
