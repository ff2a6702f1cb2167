"""The grouped products for Hopper (sm_90a), with the tensor core instructions placed by hand (Gluon).

    rows   y[t]  = row_scale[t] scale[e] (a[t] b[e])        forward (int8) and dgrad (FP8, bfloat16)
    sums   dW[e] (+)= scale[e] (grad[:, e] x[:, e]^T)       wgrad over each expert's padded token columns (FP8)

The engine is `gemm_hopper`'s: one step of the products is always in flight, and the ring of shared-memory slots runs on
across tiles, hence across experts.  What differs is the list of tiles, which depends on the token counts.  Every
program walks it twice, once with the tile it loads and once with the tile it multiplies; both walks only move forward,
so finding the expert of the next tile costs a few scalar loads instead of a search, and nothing waits for the host.
An expert without tokens still owes zeros to its dW: its one step reads beyond the columns, where the copy engine
delivers zeros.

bfloat16 results leave through shared memory: a whole tile by the copy engine, a tile that holds the end of a group
(the next rows belong to another expert) by masked 16-byte stores.  Results that are float32, or added to what is
there, are written from registers.

Shapes: T token copies, Tp padded token columns, E experts, O output features, D input features, P parts of a weight.
"""

from typing import Any

import torch
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

from kernels.gemm_hopper import hopper_descriptor, open_ring
from kernels.launch import multiprocessors
from kernels.tile_launch import HOPPER_STEP_BYTES, HopperTile


@gluon.jit
def _owner(offsets, tile, expert, first, experts, m, column_tiles, BLOCK_M: gl.constexpr, SUMS: gl.constexpr):
    """(expert of a tile, that expert's first tile), walking on from an earlier one; E past the last tile."""
    if SUMS:
        tiles = gl.cdiv(m, BLOCK_M) * column_tiles
        expert = tile // tiles
        first = expert * tiles
    else:
        at = gl.minimum(expert, experts - 1)
        rows = gl.load(offsets + at + 1) - gl.load(offsets + at)
        beyond = first + gl.cdiv(rows, BLOCK_M) * column_tiles
        while (expert < experts) & (tile >= beyond):
            first = beyond
            expert += 1
            at = gl.minimum(expert, experts - 1)
            rows = gl.load(offsets + at + 1) - gl.load(offsets + at)
            beyond = first + gl.cdiv(rows, BLOCK_M) * column_tiles
    return expert, first


@gluon.jit
def _locate(
    offsets, tile, expert, first, experts, m, n,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """(expert, its first tile, its token range, row and column of the tile within the expert)."""
    column_tiles = gl.cdiv(n, BLOCK_N)
    expert, first = _owner(offsets, tile, expert, first, experts, m, column_tiles, BLOCK_M, SUMS)
    at = gl.minimum(expert, experts - 1)
    start = gl.load(offsets + at)
    end = gl.load(offsets + at + 1)
    row_tiles = gl.cdiv(m if SUMS else end - start, BLOCK_M)
    group = (tile - first) // (GROUP_M * column_tiles)
    within = (tile - first) % (GROUP_M * column_tiles)
    rows = gl.maximum(gl.minimum(row_tiles - group * GROUP_M, GROUP_M), 1)
    row = (group * GROUP_M + within % rows) * BLOCK_M
    column = (within // rows) * BLOCK_N
    return expert, first, start, end, row, column


@gluon.jit
def _steps(start, end, k, BLOCK_K: gl.constexpr, SUMS: gl.constexpr):
    """Steps of a tile; padded token ranges are whole steps."""
    return gl.maximum((end - start) // BLOCK_K, 1) if SUMS else gl.cdiv(k, BLOCK_K)


@gluon.jit
def _next_load(
    offsets, tile, expert, first, experts, m, n, k,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    SUMS: gl.constexpr, EXPERT_IN_K: gl.constexpr,
):  # fmt: skip
    """Where the loads of a tile begin: (tile, expert, first tile, row of A, row of B, k of A, k of B, steps)."""
    expert, first, start, end, row, column = _locate(
        offsets, tile, expert, first, experts, m, n, BLOCK_M, BLOCK_N, GROUP_M, SUMS
    )
    steps = _steps(start, end, k, BLOCK_K, SUMS)
    if SUMS:
        a_row = row
        b_row = column
        a_k = gl.where(start < end, start, k)  # zeros lie beyond the columns
        b_k = a_k
    else:
        a_row = start + row
        b_row = column if EXPERT_IN_K else expert * n + column
        a_k = start * 0
        b_k = expert * k if EXPERT_IN_K else a_k
    return tile, expert, first, a_row, b_row, a_k, b_k, steps


@gluon.jit
def _load_step(
    position, a_desc, b_desc, a_slot, b_slot, ready, offsets, experts, m, n, k,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP_M: gl.constexpr,
    SUMS: gl.constexpr, EXPERT_IN_K: gl.constexpr, B_K_MAJOR: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """Start the copies of one step, if there is one left, and return the position after it."""
    tile, expert, first, a_row, b_row, a_k, b_k, left = position
    wanted = expert < experts
    mbarrier.expect(ready, a_desc.block_type.nbytes + b_desc.block_type.nbytes, pred=wanted)
    tma.async_copy_global_to_shared(a_desc, [a_row, a_k], ready, a_slot, pred=wanted)
    if B_K_MAJOR:
        tma.async_copy_global_to_shared(b_desc, [b_row, b_k], ready, b_slot, pred=wanted)
    else:
        tma.async_copy_global_to_shared(b_desc, [b_k, b_row], ready, b_slot, pred=wanted)
    a_k += BLOCK_K
    b_k += BLOCK_K
    left -= 1
    if left == 0:
        tile, expert, first, a_row, b_row, a_k, b_k, left = _next_load(
            offsets, tile + PROGRAMS, expert, first, experts, m, n, k,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUMS, EXPERT_IN_K,
        )  # fmt: skip
    return tile, expert, first, a_row, b_row, a_k, b_k, left


@gluon.jit
def _store_half(
    values, c_desc, c_tile, c_ptr, row, limit, column, n,
    BLOCK_M: gl.constexpr, WIDTH: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Rows up to `limit` of half a tile, through shared memory."""
    tma.store_wait(0)
    c_tile.store(values)
    if row + BLOCK_M <= limit:
        fence_async_shared()
        tma.async_copy_shared_to_global(c_desc, [row, column], c_tile)
    else:
        spread: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [num_warps, 1], [1, 0])
        rows = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, spread))
        columns = column + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, spread))
        inside = (rows < limit).expand_dims(1) & (columns < n).expand_dims(0)
        target = c_ptr + rows.to(gl.int64).expand_dims(1) * n + columns.expand_dims(0)
        gl.store(target, c_tile.load(spread), mask=inside)


@gluon.jit
def _grouped_kernel(
    a_desc, b_desc, c_desc, c_ptr, offsets, row_scale_ptr, scale_ptr, experts, m, n, k,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, SUMS: gl.constexpr,
    EXPERT_IN_K: gl.constexpr, B_K_MAJOR: gl.constexpr, ROW_SCALE: gl.constexpr,
    PARTS: gl.constexpr, PARTS_OF: gl.constexpr, ACCUMULATE: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """scale [E, PARTS] lies over the columns, the rows of dW or the sum (PARTS_OF "n", "m", "k"), or is absent ("").

    Rows: A [T, k], C [T, n], and B [E * n, k] or, with EXPERT_IN_K, [n, E * k] ([E * k, n] unless B_K_MAJOR).
    Sums: A [m, k], B [n, k] with k the padded columns, C [E * m, n]; with ACCUMULATE `c_ptr` holds the address of each
    expert's float32 [m, n].
    """
    INTEGER: gl.constexpr = a_desc.dtype == gl.int8
    ACC: gl.constexpr = gl.int32 if INTEGER else gl.float32
    DIRECT: gl.constexpr = ACCUMULATE or c_ptr.dtype.element_ty == gl.float32
    SUM_PARTS: gl.constexpr = PARTS if PARTS_OF == "k" else 1
    # Triton knows int8 instructions up to 224 wide, which leaves 128 for a power of two.
    WIDTH: gl.constexpr = min(BLOCK_N, 128) if INTEGER else BLOCK_N
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[num_warps, 1],
        instr_shape=[16, WIDTH, 256 // a_desc.dtype.primitive_bitwidth],
    )
    a_ring, b_ring, ready = open_ring(a_desc, b_desc, STAGES)
    if not DIRECT:
        c_tile = gl.allocate_shared_memory(c_desc.dtype, c_desc.block_type.shape, c_desc.layout)

    tile = gl.program_id(0)
    expert = tile * 0
    first = tile * 0
    coming = _next_load(
        offsets, tile, expert, first, experts, m, n, k, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUMS, EXPERT_IN_K
    )
    for i in gl.static_range(STAGES - 1):
        coming = _load_step(
            coming, a_desc, b_desc, a_ring.index(i), b_ring.index(i), ready.index(i), offsets, experts, m, n, k,
            BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUMS, EXPERT_IN_K, B_K_MAJOR, PROGRAMS,
        )  # fmt: skip

    done = 0
    expert, first, start, end, row, column = _locate(
        offsets, tile, expert, first, experts, m, n, BLOCK_M, BLOCK_N, GROUP_M, SUMS
    )
    while expert < experts:
        acc = gl.zeros((BLOCK_M, BLOCK_N), ACC, layout)
        steps = _steps(start, end, k, BLOCK_K, SUMS) // SUM_PARTS
        for part in gl.static_range(SUM_PARTS):
            for step in range(steps):
                slot = done % STAGES
                mbarrier.wait(ready.index(slot), (done // STAGES) & 1)
                b = b_ring.index(slot)
                if B_K_MAJOR:
                    b = b.permute((1, 0))
                acc = warpgroup_mma(a_ring.index(slot), b, acc, use_acc=step + part > 0, is_async=True)
                acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before is done with its slot
                free = (done + STAGES - 1) % STAGES
                coming = _load_step(
                    coming, a_desc, b_desc, a_ring.index(free), b_ring.index(free), ready.index(free),
                    offsets, experts, m, n, k,
                    BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, SUMS, EXPERT_IN_K, B_K_MAJOR, PROGRAMS,
                )  # fmt: skip
                done += 1
            acc = warpgroup_mma_wait(0, deps=(acc,))
            if part + 1 < SUM_PARTS:  # from the unit of this part to that of the next
                scales = scale_ptr + expert * PARTS + part
                acc *= gl.load(scales) / gl.load(scales + 1)

        values = acc.to(gl.float32)
        in_m = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        row += expert * m if SUMS else start
        limit = (expert + 1) * m if SUMS else end
        rows = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
        if PARTS_OF == "n" and PARTS > 1:
            part_of = gl.minimum(columns // (n // PARTS), PARTS - 1)
            scale = gl.load(scale_ptr + expert * PARTS + part_of).expand_dims(0)
        elif PARTS_OF == "m" and PARTS > 1:
            part_of = gl.minimum(in_m // (m // PARTS), PARTS - 1)
            scale = gl.load(scale_ptr + expert * PARTS + part_of).expand_dims(1)
        elif PARTS_OF != "":
            scale = gl.load(scale_ptr + expert * PARTS + PARTS - 1)
        if ROW_SCALE:
            row_scale = gl.load(row_scale_ptr + rows, mask=rows < limit, other=0.0).expand_dims(1)
            if PARTS_OF != "":
                values *= row_scale * scale  # the product of the scales first, as the reference has it
            else:
                values *= row_scale
        elif PARTS_OF != "":
            values *= scale
        if ACCUMULATE:
            inside = (in_m < m).expand_dims(1) & (columns < n).expand_dims(0)
            owner = gl.multiple_of(gl.load(c_ptr + expert).to(gl.pointer_type(gl.float32)), 16)
            target = owner + in_m.to(gl.int64).expand_dims(1) * n + columns.expand_dims(0)
            gl.store(target, values + gl.load(target, mask=inside, other=0.0), mask=inside)
        elif DIRECT:
            inside = (rows < limit).expand_dims(1) & (columns < n).expand_dims(0)
            target = c_ptr + rows.to(gl.int64).expand_dims(1) * n + columns.expand_dims(0)
            gl.store(target, values.to(c_ptr.dtype.element_ty), mask=inside)
        else:
            left, right = values.to(c_desc.dtype).reshape([BLOCK_M, 2, BLOCK_N // 2]).permute(0, 2, 1).split()
            _store_half(left, c_desc, c_tile, c_ptr, row, limit, column, n, BLOCK_M, BLOCK_N // 2, num_warps)
            _store_half(
                right, c_desc, c_tile, c_ptr, row, limit, column + BLOCK_N // 2, n, BLOCK_M, BLOCK_N // 2, num_warps
            )
        tile += PROGRAMS
        expert, first, start, end, row, column = _locate(
            offsets, tile, expert, first, experts, m, n, BLOCK_M, BLOCK_N, GROUP_M, SUMS
        )
    if not DIRECT:
        tma.store_wait(0)


def hopper_rows(
    a_TK: Tensor, b: Tensor, y_TN: Tensor, offsets: Tensor, *,
    row_scale_T: Tensor | None, scale_EP: Tensor | None, parts_of: str, expert_in_k: bool, b_k_major: bool,
    tile: HopperTile,
) -> None:  # fmt: skip
    """Write y [T, N], bfloat16.

    Args:
        a_TK: int8, FP8 or bfloat16.
        b: two-dimensional, [E * N, K]; with `expert_in_k` [N, E * K], or [E * K, N] unless `b_k_major` (bfloat16 only).
        y_TN: the result.
        offsets: int32 [E + 1].
        row_scale_T: float32, or None.
        scale_EP: float32 over equal ranges of N or of K, as `parts_of` says ("n", "k"), or None ("").
        parts_of: see `scale_EP`.
        expert_in_k: how `b` is stored.
        b_k_major: how `b` is stored.
        tile: tuning.
    """
    n = y_TN.shape[1]
    _launch(
        a_TK, b, y_TN, offsets, row_scale_T, scale_EP, (n, n, a_TK.shape[1]), tile,
        SUMS=False, EXPERT_IN_K=expert_in_k, B_K_MAJOR=b_k_major, PARTS_OF=parts_of, ACCUMULATE=False,
    )  # fmt: skip


def hopper_sums(
    grad_OT: Tensor, x_DT: Tensor, padded_offsets: Tensor, target: Tensor, sizes: tuple[int, int, int], *,
    scale_EP: Tensor, tile: HopperTile,
) -> None:  # fmt: skip
    """Write dW [E, O, D], float32 or bfloat16, to `target`; or add it to the float32 [O, D] at the addresses in it.

    Arguments as checked by `grouped_wgrad_fp8`; `sizes` are E, O, D.
    """
    experts, m, n = sizes
    accumulates = target.dtype == torch.int64
    _launch(
        grad_OT, x_DT, target if accumulates else target.view(experts * m, n), padded_offsets, None, scale_EP,
        (m, n, grad_OT.shape[1]), tile,
        SUMS=True, EXPERT_IN_K=False, B_K_MAJOR=True, PARTS_OF="m", ACCUMULATE=accumulates,
    )  # fmt: skip


def _launch(
    a: Tensor, b: Tensor, c: Tensor, offsets: Tensor, row_scale: Tensor | None, scale: Tensor | None,
    sizes: tuple[int, int, int], tile: HopperTile, **options: Any,
) -> None:  # fmt: skip
    block_k = HOPPER_STEP_BYTES // a.element_size()
    programs = multiprocessors(a.device) * tile.programs_per_sm  # whatever the counts: one compilation
    through_tma = c.dtype == torch.bfloat16
    _grouped_kernel[(programs,)](
        hopper_descriptor(a, (tile.block_m, block_k)),
        hopper_descriptor(b, (tile.block_n, block_k) if options["B_K_MAJOR"] else (block_k, tile.block_n)),
        hopper_descriptor(c, (tile.block_m, tile.block_n // 2)) if through_tma else None,
        c, offsets, row_scale, scale, offsets.shape[0] - 1, *sizes,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=block_k, GROUP_M=tile.group_m, STAGES=tile.stages,
        ROW_SCALE=row_scale is not None, PARTS=1 if scale is None else scale.shape[1],
        PROGRAMS=programs, num_warps=tile.warps, **options,
    )  # fmt: skip
