"""sdd for Hopper (sm_90a), with the tensor core instructions placed by hand (Gluon).

    S = a_scale b_scale (A B), only at the tiles of a topology

The engine is `gemm_hopper`'s: one step of the products is always in flight, and the ring of shared-memory slots runs on
across output tiles.  Here the topology names the corners from which slots are filled.

A tile of 128 x 128 reads too much for what it multiplies, so a program computes two tiles of one row of tiles, wherever
their columns are, from one copy of A: both B tiles lie in one slot, and one instruction multiplies by both.  A row with
an odd number of tiles computes its last one twice and stores it once.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from kernels.block_sparse_hopper_store import halves, nothing_waits, scales, send_waiting
from kernels.gemm_hopper import STAGES, STEP_BYTES, WARPS, hopper_descriptor
from kernels.launch import multiprocessors
from kernels.topology import Topology


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
    a_desc, b_desc, row, left, right, k, a_slot, b_slot, ready, wanted, B_K_MAJOR: gl.constexpr
):  # fmt: skip
    mbarrier.expect(ready, a_desc.block_type.nbytes + 2 * b_desc.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(a_desc, [row, k], ready, a_slot, pred=wanted)
    if B_K_MAJOR:
        tma.async_copy_global_to_shared(b_desc, [left, k], ready, b_slot.slice(0, 128, 0), pred=wanted)
        tma.async_copy_global_to_shared(b_desc, [right, k], ready, b_slot.slice(128, 128, 0), pred=wanted)
    else:
        tma.async_copy_global_to_shared(b_desc, [k, left], ready, b_slot.slice(0, 128, 1), pred=wanted)
        tma.async_copy_global_to_shared(b_desc, [k, right], ready, b_slot.slice(128, 128, 1), pred=wanted)


@gluon.jit
def _sdd_kernel(
    a_desc, b_desc, values_desc, used_ptr, num_pairs_ptr, pairs_ptr, rows_ptr, columns_ptr,
    a_scale_ptr, b_scale_ptr, m, n, k,
    BLOCK_K: gl.constexpr, COLUMNS: gl.constexpr, B_K_MAJOR: gl.constexpr, SCALES: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Two tiles [128, 128] per task, or with COLUMNS = 256 the halves of one; results go to rows of `values_desc`."""
    INTEGER: gl.constexpr = a_desc.dtype == gl.int8
    ACC: gl.constexpr = gl.int32 if INTEGER else gl.float32
    WIDTH: gl.constexpr = 128 if INTEGER else 256  # see `gemm_hopper`
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, WIDTH, 256 // a_desc.dtype.primitive_bitwidth]
    )
    B_SLOT: gl.constexpr = [256, BLOCK_K] if B_K_MAJOR else [BLOCK_K, 256]
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES] + a_desc.block_type.shape, a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + B_SLOT, b_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
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
            a_desc, b_desc, row, left, right, next_k, a_ring.index(i), b_ring.index(i), ready.index(i), i < total,
            B_K_MAJOR,
        )  # fmt: skip
        next_k += BLOCK_K
        if next_k >= k:
            next_k = first * 0
            next_task += PROGRAMS
            _, row, left, right, _ = _pair(next_task, tasks, used, pairs_ptr, rows_ptr, columns_ptr, COLUMNS)

    done = 0
    acc = gl.zeros((128, 256), ACC, layout)
    waiting = nothing_waits(first * 0, (128, 256), layout)
    for task in range(first, tasks, PROGRAMS):
        for step in range(steps):
            slot = done % STAGES
            mbarrier.wait(ready.index(slot), (done // STAGES) & 1)
            b = b_ring.index(slot)
            if B_K_MAJOR:
                b = b.permute((1, 0))
            acc = warpgroup_mma(a_ring.index(slot), b, acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before left its slot
            coming = done + STAGES - 1
            free = coming % STAGES
            _load_pair(
                a_desc, b_desc, row, left, right, next_k, a_ring.index(free), b_ring.index(free), ready.index(free),
                coming < total, B_K_MAJOR,
            )  # fmt: skip
            done += 1
            next_k += BLOCK_K
            if next_k >= k:
                next_k = first * 0
                next_task += PROGRAMS
                _, row, left, right, _ = _pair(next_task, tasks, used, pairs_ptr, rows_ptr, columns_ptr, COLUMNS)
            send_waiting(waiting, step, steps, values_desc, c_tile)

        # While the last step is multiplied: where these tiles lie, and their scales.
        tile, at, at_left, at_right, both = _pair(task, tasks, used, pairs_ptr, rows_ptr, columns_ptr, COLUMNS)
        if SCALES:
            rows = at + gl.arange(0, 128, layout=gl.SliceLayout(1, layout))
            columns = gl.arange(0, 256, layout=gl.SliceLayout(0, layout))
            columns += gl.where(columns < 128, at_left, at_right - 128)
            row_scale = scales(a_scale_ptr, rows, m).expand_dims(1)
            column_scale = scales(b_scale_ptr, columns, n).expand_dims(0)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        values = acc.to(gl.float32)
        if SCALES:
            values *= row_scale * column_scale
        first_half, second_half = halves(values)
        if COLUMNS == 128:
            waiting = (first_half, tile * 128, tile * 0, tile >= 0, second_half, tile * 128 + 128, tile * 0, both)
        else:
            waiting = (first_half, tile * 128, tile * 0, both, second_half, tile * 128, tile * 0 + 128, both)
    send_waiting(waiting, 0, 1, values_desc, c_tile)
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
        hopper_descriptor(a_MK, (128, block_k)),
        hopper_descriptor(b, (128, block_k) if b_k_major else (block_k, 128)),
        hopper_descriptor(values.view(-1, columns), (128, 128)),
        topology.row_offsets[-1:], topology.num_pairs, topology.pairs, topology.rows, topology.columns,
        a_scale_M, b_scale_N, a_MK.shape[0], b.shape[0 if b_k_major else 1], a_MK.shape[1],
        BLOCK_K=block_k, COLUMNS=columns, B_K_MAJOR=b_k_major, SCALES=a_scale_M is not None,
        STAGES=STAGES, PROGRAMS=programs, num_warps=WARPS,
    )  # fmt: skip
