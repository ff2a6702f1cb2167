"""Matrix products of the three passes of a linear layer in Triton, fed by the tensor memory accelerator.

    forward   Y[T,O] = s_x s_w (Q[T,D] W[O,D]^T)     int8 x ternary int8, int32 sums: bit-equal to `reference.linear`
    dgrad    dX[T,D] = s_w (dY[T,O] W[O,D])          bf16 x ternary bf16, or e4m3 x ternary e4m3 (exact there, too)
    wgrad    dW[O,D] += c (dY[T,O]^T X[T,D])         bf16, or e4m3; added to fp32 `main_grad` in the epilogue

One kernel does them all: C[M,N] (+)= a_scale[M] b_scale[N] sum_k A[m,k] B[n,k], where each operand is stored with its
K or its M/N dimension contiguous.  The 8-bit tensor core instructions of Hopper take K-contiguous operands only, so
the 8-bit backward products read transposed copies that `kernels.gradients` writes.

As many programs as multiprocessors run, each taking every n-th tile, so that the loads of the next tile start while
this one is scaled and stored.  Scales are applied once to the sum, in float32.
"""

import importlib
import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import ALIGNMENT, INTERPRETED, check_dtype, multiprocessors
from kernels.tuning import Tuner

BYTES_8 = (torch.int8, torch.float8_e4m3fn)
_MAX_EXACT_INT8 = 2**24 // 128
"""Terms up to which a sum of int8 x ternary products fits float32."""


@triton.jit
def _gemm_kernel(
    a_desc, b_desc, c_desc, a_scale_ptr, b_scale_ptr, m, n, k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    A_K_MAJOR: tl.constexpr, B_K_MAJOR: tl.constexpr, A_SCALE: tl.constexpr, B_SCALE: tl.constexpr,
    INTEGER: tl.constexpr, PROGRAMS: tl.constexpr, HALVES: tl.constexpr,
    SPECIALIZE: tl.constexpr, FLATTEN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """A_SCALE: 0 none, 1 a vector; B_SCALE: also 2, a single number.  WIDEN: the interpreter cannot multiply bf16."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n = tl.cdiv(n, BLOCK_N)
    steps = tl.cdiv(k, BLOCK_K)
    accumulator_type = tl.int32 if INTEGER else tl.float32
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN, warp_specialize=SPECIALIZE):
        # Tiles go down GROUP_M rows before the next column: their operands stay in the second-level cache.
        group = tile // (GROUP_M * tiles_n)
        first = group * GROUP_M
        rows = tl.minimum(tiles_m - first, GROUP_M)
        tile_m = (first + tile % (GROUP_M * tiles_n) % rows) * BLOCK_M
        tile_n = (tile % (GROUP_M * tiles_n) // rows) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), accumulator_type)
        for step in range(steps):
            if A_K_MAJOR:
                a = a_desc.load([tile_m, step * BLOCK_K])
            else:
                a = a_desc.load([step * BLOCK_K, tile_m]).T
            if B_K_MAJOR:
                b = b_desc.load([tile_n, step * BLOCK_K]).T
            else:
                b = b_desc.load([step * BLOCK_K, tile_n])
            if WIDEN:
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            acc = tl.dot(a, b, acc, out_dtype=accumulator_type)
        if HALVES:  # two stores of half the width: half the shared memory for the output tile
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            _store_tile(
                left, c_desc, a_scale_ptr, b_scale_ptr, m, n, tile_m, tile_n,
                BLOCK_M, BLOCK_N // 2, A_SCALE, B_SCALE,
            )  # fmt: skip
            _store_tile(
                right, c_desc, a_scale_ptr, b_scale_ptr, m, n, tile_m, tile_n + BLOCK_N // 2,
                BLOCK_M, BLOCK_N // 2, A_SCALE, B_SCALE,
            )  # fmt: skip
        else:
            _store_tile(
                acc, c_desc, a_scale_ptr, b_scale_ptr, m, n, tile_m, tile_n,
                BLOCK_M, BLOCK_N, A_SCALE, B_SCALE,
            )  # fmt: skip


@triton.jit
def _store_tile(
    acc, c_desc, a_scale_ptr, b_scale_ptr, m, n, tile_m, tile_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, A_SCALE: tl.constexpr, B_SCALE: tl.constexpr,
):  # fmt: skip
    values = acc.to(tl.float32)
    row = tile_m + tl.arange(0, BLOCK_M)
    column = tile_n + tl.arange(0, BLOCK_N)
    if A_SCALE == 1:
        a_scale = tl.load(a_scale_ptr + row, mask=row < m, other=0.0)[:, None]
        if B_SCALE == 1:  # the product of the scales first, as the reference has it
            values = values * (a_scale * tl.load(b_scale_ptr + column, mask=column < n, other=0.0)[None, :])
        elif B_SCALE == 2:
            values = values * (a_scale * tl.load(b_scale_ptr))
        else:
            values = values * a_scale
    elif B_SCALE == 1:
        values = values * tl.load(b_scale_ptr + column, mask=column < n, other=0.0)[None, :]
    elif B_SCALE == 2:
        values = values * tl.load(b_scale_ptr)
    c_desc.store([tile_m, tile_n], values.to(c_desc.dtype))


@dataclass(frozen=True)
class Tiling:
    """How the portable kernel divides a product.

    Attributes:
        m: rows of C per tile.
        n: columns of C per tile.
        k: operand columns per step.
        warps: per program.
        stages: steps in flight.
        halves: store a tile in two halves, which takes half the shared memory.
        group: rows of tiles before the next column of tiles.
        specialize: loads in warps of their own.
        flatten: one loop over tiles and steps.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    halves: bool = False
    group: int = 8
    specialize: bool = False
    flatten: bool = True


TILINGS_8_BIT = (
    Tiling(128, 256, 128, warps=8, stages=3),
    Tiling(128, 256, 128, warps=8, stages=4, halves=True),
    Tiling(128, 256, 128, warps=8, stages=3, halves=True),
    Tiling(128, 128, 128, warps=4, stages=4),
    Tiling(256, 128, 128, warps=8, stages=3),
)
"""Of 8-bit operands.  The first, second and last fit a Hopper GPU's shared memory with results in 16 bits only."""
TILINGS_16_BIT = tuple(replace(tiling, k=64) for tiling in TILINGS_8_BIT)
_TILINGS_INTERPRETED = (Tiling(16, 32, 32, warps=1, stages=1, flatten=False, halves=True, group=2),)
_tiles_8_bit = Tuner(_gemm_kernel, _TILINGS_INTERPRETED if INTERPRETED else TILINGS_8_BIT)
_tiles_16_bit = Tuner(_gemm_kernel, _TILINGS_INTERPRETED if INTERPRETED else TILINGS_16_BIT)


def gemm(
    a: Tensor,
    b: Tensor,
    *,
    a_k_major: bool = True,
    b_k_major: bool = True,
    a_scale: Tensor | None = None,
    b_scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    tiles: Tuner[Tiling] | None = None,
) -> Tensor:
    """C[M,N] = a_scale[M] b_scale[N] sum_k A[m,k] B[n,k].

    Args:
        a: [M,K], or [K,M].
        b: [N,K], or [K,N]; the type of `a`.
        a_k_major: False says that `a` is [K,M] (16-bit types only).
        b_k_major: False says that `b` is [K,N] (16-bit types only).
        a_scale: float32, one per row of C.
        b_scale: float32, one per column of C, or a single one.
        dtype: type of a new C.
        out: C to add to, bf16 or fp32; takes the place of `dtype`.
        tiles: of the portable kernel, which then runs also where there is a faster one.

    Returns:
        `out`, or a new tensor.

    Raises:
        ValueError: types, shapes or strides that the kernel does not take.
    """
    m, n, k = _sizes(a, b, a_k_major, b_k_major)
    accumulate = out is not None
    c = torch.empty(m, n, dtype=dtype, device=a.device) if out is None else out
    if c.numel() == 0 or k == 0:
        return c if accumulate else c.zero_()
    _check(a, b, c, (m, n, k), a_k_major and b_k_major)
    a_scale, b_scale = _scale(a_scale, (m,), "a_scale"), _scale(b_scale, (n, 1), "b_scale")
    if tiles is None and has_hopper_kernel(a.device) and _hopper_takes(a.dtype, c.dtype, accumulate):
        _hopper_gemm()(
            a, b, c, a_k_major=a_k_major, b_k_major=b_k_major, accumulate=accumulate, a_scale=a_scale, b_scale=b_scale
        )
        return c
    # While tilings are tried a launch is many: none of them may add to C.
    product = torch.empty(m, n, dtype=torch.float32, device=a.device) if accumulate else c
    programs = multiprocessors(a.device)

    def launch(tiling: Tiling) -> None:
        num_tiles = triton.cdiv(m, tiling.m) * triton.cdiv(n, tiling.n)
        _gemm_kernel[(min(programs, num_tiles),)](
            TensorDescriptor.from_tensor(a, [tiling.m, tiling.k] if a_k_major else [tiling.k, tiling.m]),
            TensorDescriptor.from_tensor(b, [tiling.n, tiling.k] if b_k_major else [tiling.k, tiling.n]),
            TensorDescriptor.from_tensor(product, [tiling.m, tiling.n // 2 if tiling.halves else tiling.n]),
            a_scale, b_scale, m, n, k,
            BLOCK_M=tiling.m, BLOCK_N=tiling.n, BLOCK_K=tiling.k, GROUP_M=tiling.group,
            A_K_MAJOR=a_k_major, B_K_MAJOR=b_k_major, INTEGER=a.dtype == torch.int8,
            A_SCALE=0 if a_scale is None else 1, B_SCALE=0 if b_scale is None else 2 if b_scale.numel() == 1 else 1,
            PROGRAMS=programs, HALVES=tiling.halves, SPECIALIZE=tiling.specialize, FLATTEN=tiling.flatten,
            WIDEN=INTERPRETED and a.dtype not in BYTES_8, num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip

    tiles = tiles or (_tiles_8_bit if a.dtype in BYTES_8 else _tiles_16_bit)
    launch(tiles.choose((m, n, k, a_k_major, b_k_major, a.dtype, product.dtype), a.device, launch))
    return c.add_(product) if accumulate else c


@cache
def has_hopper_kernel(device: torch.device) -> bool:
    """Whether `gemm_hopper` runs here: sm_90, and a Triton that has Gluon."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return importlib.util.find_spec("triton.experimental.gluon") is not None


@cache
def _hopper_gemm() -> Any:
    return importlib.import_module("kernels.gemm_hopper").hopper_gemm


def _hopper_takes(operands: torch.dtype, result: torch.dtype, accumulate: bool) -> bool:
    if operands == torch.float16:
        return False
    return result == torch.float32 or (result == torch.bfloat16 and not accumulate)


def _scale(scale: Tensor | None, sizes: tuple[int, ...], name: str) -> Tensor | None:
    if scale is None:
        return None
    check_dtype(scale, name, (torch.float32,))
    if scale.numel() not in sizes:
        raise ValueError(f"{name} has {scale.numel()} numbers, the product takes {' or '.join(map(str, sizes))}")
    return scale.contiguous()


def _sizes(a: Tensor, b: Tensor, a_k_major: bool, b_k_major: bool) -> tuple[int, int, int]:
    if a.dim() != 2 or b.dim() != 2:
        raise ValueError(f"operands of shapes {tuple(a.shape)} and {tuple(b.shape)} are not two matrices")
    m, k = a.shape if a_k_major else a.shape[::-1]
    n, k_b = b.shape if b_k_major else b.shape[::-1]
    if k != k_b:
        raise ValueError(f"operands of shapes {tuple(a.shape)} and {tuple(b.shape)} sum over {k} and {k_b} terms")
    return m, n, k


def _check(a: Tensor, b: Tensor, c: Tensor, sizes: tuple[int, int, int], k_major: bool) -> None:
    check_dtype(a, "a", (*BYTES_8, torch.bfloat16, torch.float16))
    check_dtype(b, "b", (a.dtype,))
    check_dtype(c, "the result", (torch.bfloat16, torch.float16, torch.float32))
    if a.dtype in BYTES_8 and not k_major:
        raise ValueError(f"{a.dtype} products need both operands K-major, tensor cores take nothing else")
    if a.dtype == torch.int8 and sizes[2] >= _MAX_EXACT_INT8:
        raise ValueError(f"a sum of {sizes[2]} int8 products may leave float32, the kernel takes {_MAX_EXACT_INT8 - 1}")
    if tuple(c.shape) != sizes[:2]:
        raise ValueError(f"out has shape {tuple(c.shape)}, the product has {sizes[:2]}")
    for name, matrix in (("a", a), ("b", b), ("the result", c)):
        problem = unaligned(matrix)
        if problem:
            raise ValueError(f"{name} of shape {tuple(matrix.shape)} {problem}")


def unaligned(matrix: Tensor) -> str:
    """Why the tensor memory accelerator cannot read this matrix; empty if it can."""
    if matrix.numel() and matrix.stride(1) != 1:
        return f"has stride {matrix.stride(1)} along its rows, the kernel takes 1: call .contiguous()"
    if matrix.stride(0) * matrix.element_size() % ALIGNMENT:
        row_bytes = matrix.stride(0) * matrix.element_size()
        return f"has rows of {row_bytes} bytes, the kernel takes multiples of {ALIGNMENT}"
    if matrix.data_ptr() % ALIGNMENT:
        return f"does not start at a multiple of {ALIGNMENT} bytes"
    return ""
