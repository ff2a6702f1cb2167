"""The products of `gemm` for Hopper (sm_90a), with the tensor core instructions placed by hand (Gluon).

    C[M,N] (+)= a_scale[M] b_scale[N] sum_k A[m,k] B[n,k]

`tl.dot` waits for each int8 step before it starts the next one; here one step is always in flight.  The operands of a
tile pass through a ring of shared-memory slots that does not stop at the end of a tile: while a tile is scaled and
stored, the first steps of the next one are already arriving.  bf16 results leave through shared memory; float32 ones,
which may be added to what is there, are written from registers, where a quad's 8 columns fill a 32-byte sector.
"""

from functools import cache
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.compiled import CompiledForms
from kernels.launch import multiprocessors

BLOCK_M, BLOCK_N, STEP_BYTES = 128, 256, 128
STAGES = 4
GROUP_M = 8
WARPS = 8
_GL_TYPES = {torch.int8: gl.int8, torch.float8_e4m3fn: gl.float8e4nv, torch.bfloat16: gl.bfloat16}


@gluon.jit
def tile_origin(tile, tiles_m, tiles_n, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, GROUP_M: gl.constexpr):
    """First row and column of a tile; tiles go down GROUP_M rows before the next column."""
    group = tile // (GROUP_M * tiles_n)
    first = group * GROUP_M
    rows = gl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return (first + within % rows) * BLOCK_M, (within // rows) * BLOCK_N


@gluon.jit
def open_ring(a_desc, b_desc, STAGES: gl.constexpr):
    """(slots of A, slots of B, a barrier per slot) of a ring with room for STAGES steps."""
    a_ring = gl.allocate_shared_memory(a_desc.dtype, [STAGES] + a_desc.block_type.shape, a_desc.layout)
    b_ring = gl.allocate_shared_memory(b_desc.dtype, [STAGES] + b_desc.block_type.shape, b_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    return a_ring, b_ring, ready


@gluon.jit
def _load_step(
    a_desc, b_desc, row, column, k, a_slot, b_slot, ready, wanted,
    A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr,
):  # fmt: skip
    bytes: gl.constexpr = a_desc.block_type.nbytes + b_desc.block_type.nbytes
    mbarrier.expect(ready, bytes, pred=wanted)
    if A_K_MAJOR:
        tma.async_copy_global_to_shared(a_desc, [row, k], ready, a_slot, pred=wanted)
    else:
        tma.async_copy_global_to_shared(a_desc, [k, row], ready, a_slot, pred=wanted)
    if B_K_MAJOR:
        tma.async_copy_global_to_shared(b_desc, [column, k], ready, b_slot, pred=wanted)
    else:
        tma.async_copy_global_to_shared(b_desc, [k, column], ready, b_slot, pred=wanted)


@gluon.jit
def _hopper_gemm_kernel(
    a_desc, b_desc, c_desc, c_ptr, a_scale_ptr, b_scale_ptr, m, n, k, c_stride,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    A_K_MAJOR: gl.constexpr, B_K_MAJOR: gl.constexpr, A_SCALE: gl.constexpr, B_SCALE: gl.constexpr,
    FLOAT32: gl.constexpr, ACCUMULATE: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    PROGRAMS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """A_SCALE: 0 none, 1 a vector; B_SCALE: also 2, a single number.  FLOAT32: C leaves through c_ptr, not c_desc."""
    INTEGER: gl.constexpr = a_desc.dtype == gl.int8
    ACC: gl.constexpr = gl.int32 if INTEGER else gl.float32
    # Triton knows int8 instructions up to 224 wide, which leaves 128 for a power of two.
    WIDTH: gl.constexpr = min(BLOCK_N, 128) if INTEGER else BLOCK_N
    layout: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0],
        warps_per_cta=[num_warps, 1],
        instr_shape=[16, WIDTH, 256 // a_desc.dtype.primitive_bitwidth],
    )
    a_ring, b_ring, ready = open_ring(a_desc, b_desc, STAGES)
    if not FLOAT32:
        c_tile = gl.allocate_shared_memory(c_desc.dtype, c_desc.block_type.shape, c_desc.layout)

    tiles_m = gl.cdiv(m, BLOCK_M)
    tiles_n = gl.cdiv(n, BLOCK_N)
    steps = gl.cdiv(k, BLOCK_K)
    first_tile = gl.program_id(0)
    total = gl.cdiv(tiles_m * tiles_n - first_tile, PROGRAMS) * steps

    next_tile = first_tile
    next_step = 0
    next_row, next_column = tile_origin(next_tile, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
    for i in gl.static_range(STAGES - 1):
        _load_step(
            a_desc, b_desc, next_row, next_column, next_step * BLOCK_K,
            a_ring.index(i), b_ring.index(i), ready.index(i), i < total, A_K_MAJOR, B_K_MAJOR,
        )  # fmt: skip
        next_step += 1
        if next_step == steps:
            next_step = 0
            next_tile += PROGRAMS
            next_row, next_column = tile_origin(next_tile, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)

    done = 0
    for tile in range(first_tile, tiles_m * tiles_n, PROGRAMS):
        acc = gl.zeros((BLOCK_M, BLOCK_N), ACC, layout)
        for step in range(steps):
            slot = done % STAGES
            mbarrier.wait(ready.index(slot), (done // STAGES) & 1)
            a = a_ring.index(slot)
            b = b_ring.index(slot)
            if not A_K_MAJOR:
                a = a.permute((1, 0))
            if B_K_MAJOR:
                b = b.permute((1, 0))
            acc = warpgroup_mma(a, b, acc, use_acc=step > 0, is_async=True)
            acc = warpgroup_mma_wait(1, deps=(acc,))  # the step before is done with its slot
            coming = done + STAGES - 1
            free = coming % STAGES
            _load_step(
                a_desc, b_desc, next_row, next_column, next_step * BLOCK_K,
                a_ring.index(free), b_ring.index(free), ready.index(free), coming < total, A_K_MAJOR, B_K_MAJOR,
            )  # fmt: skip
            done += 1
            next_step += 1
            if next_step == steps:
                next_step = 0
                next_tile += PROGRAMS
                next_row, next_column = tile_origin(next_tile, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        acc = warpgroup_mma_wait(0, deps=(acc,))

        row, column = tile_origin(tile, tiles_m, tiles_n, BLOCK_M, BLOCK_N, GROUP_M)
        values = acc.to(gl.float32)
        rows = row + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, layout))
        columns = column + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, layout))
        if A_SCALE == 1:
            scale = gl.load(a_scale_ptr + rows, mask=rows < m, other=0.0).expand_dims(1)
            if B_SCALE == 1:  # the product of the scales first, as the reference has it
                values *= scale * gl.load(b_scale_ptr + columns, mask=columns < n, other=0.0).expand_dims(0)
            elif B_SCALE == 2:
                values *= scale * gl.load(b_scale_ptr)
            else:
                values *= scale
        elif B_SCALE == 1:
            values *= gl.load(b_scale_ptr + columns, mask=columns < n, other=0.0).expand_dims(0)
        elif B_SCALE == 2:
            values *= gl.load(b_scale_ptr)
        if FLOAT32:
            inside = (rows < m).expand_dims(1) & (columns < n).expand_dims(0)
            target = c_ptr + rows.to(gl.int64).expand_dims(1) * c_stride + columns.expand_dims(0)
            if ACCUMULATE:
                values += gl.load(target, mask=inside, other=0.0)
            gl.store(target, values, mask=inside)
        else:
            left, right = values.to(c_desc.dtype).reshape([BLOCK_M, 2, BLOCK_N // 2]).permute(0, 2, 1).split()
            tma.store_wait(0)
            c_tile.store(left)
            fence_async_shared()
            tma.async_copy_shared_to_global(c_desc, [row, column], c_tile)
            tma.store_wait(0)
            c_tile.store(right)
            fence_async_shared()
            tma.async_copy_shared_to_global(c_desc, [row, column + BLOCK_N // 2], c_tile)
    if not FLOAT32:
        tma.store_wait(0)


def hopper_gemm(
    a: Tensor, b: Tensor, c: Tensor, *, a_k_major: bool, b_k_major: bool,
    a_scale: Tensor | None, b_scale: Tensor | None, accumulate: bool,
    block: tuple[int, int] = (BLOCK_M, BLOCK_N), stages: int = STAGES, group: int = GROUP_M, warps: int = WARPS,
) -> None:  # fmt: skip
    """Write C, bf16 or float32 (only float32 accumulates); arguments as checked by `gemm.gemm`."""
    m, n = c.shape
    k = a.shape[1] if a_k_major else a.shape[0]
    (block_m, block_n), block_k = block, STEP_BYTES // a.element_size()
    float32 = c.dtype == torch.float32
    programs = min(multiprocessors(a.device), -(-m // block_m) * -(-n // block_n))
    arguments = (
        hopper_descriptor(a, (block_m, block_k) if a_k_major else (block_k, block_m)),
        hopper_descriptor(b, (block_n, block_k) if b_k_major else (block_k, block_n)),
        None if float32 else hopper_descriptor(c, (block_m, block_n // 2)),
        c if float32 else None, a_scale, b_scale, m, n, k, c.stride(0),
    )  # fmt: skip
    constants = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "A_K_MAJOR": a_k_major, "B_K_MAJOR": b_k_major,
        "A_SCALE": 0 if a_scale is None else 1, "B_SCALE": 0 if b_scale is None else 2 if b_scale.numel() == 1 else 1,
        "FLOAT32": float32, "ACCUMULATE": accumulate, "GROUP_M": group, "STAGES": stages, "PROGRAMS": programs,
        "num_warps": warps,
    }  # fmt: skip
    _forms.launch(programs, arguments, constants)


_forms = CompiledForms(_hopper_gemm_kernel)


def hopper_descriptor(matrix: Tensor, block: tuple[int, int]) -> Any:
    """`TensorDescriptor` of a matrix that starts, and whose rows start, at multiples of 16 bytes.

    Built without the class's own checks, which take longer than all else here.
    """
    described = TensorDescriptor.__new__(TensorDescriptor)
    described.base, described.shape, described.strides = matrix, matrix.shape, matrix.stride()
    described.block_shape, described.layout, described.padding = list(block), _layout(block, matrix.dtype), "zero"
    return described


@cache
def _layout(block: tuple[int, int], dtype: torch.dtype) -> Any:
    return gl.NVMMASharedLayout.get_default_for(list(block), _GL_TYPES[dtype])
