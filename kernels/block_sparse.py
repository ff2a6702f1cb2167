"""Block-sparse matrix products, in the names of MegaBlocks (arXiv 2211.15841 sec. 5): D dense, S sparse by tiles.

    sdd   S = A B     only the tiles of the topology are computed          (first layer of the experts; dS)
    dsd   C = S B     and C = S^T B                                        (second layer; weight gradients)
    dds   C = A S     and C = A S^T                                        (activation gradients)

A sparse matrix is `values` [tiles, rows, columns] in the row order of a `Topology`.  One kernel computes sdd, one the
two others: a program owns one output tile and walks the nonzero tiles of its row (or column), so only those are read
and multiplied.  Products with S^T walk the second index of the topology; the values are neither moved nor copied.

Tiles of 128 x 128 keep the tensor cores busy, and on Hopper have kernels of their own (`block_sparse_hopper`); smaller
ones follow a pattern more closely and lose speed.  bfloat16 sums in float32; int8 codes times ternary int8 sum in int32
(both contiguous along the sum, as Hopper's 8-bit products want) and meet the scales once, so the result is exact up to
one rounding.
"""

import importlib
from dataclasses import replace
from typing import Literal

import torch
import triton
from torch import Tensor

from kernels.block_sparse_triton import sdd_kernel, sparse_dense_kernel
from kernels.gemm import has_hopper_kernel
from kernels.tile_launch import (
    HOPPER_STEP_BYTES,
    TileConfig,
    check_choice,
    check_operand,
    check_same_device,
    check_tensor,
    descriptor,
    launch_options,
    stored_dtype,
)
from kernels.topology import Topology, check_blocks

Layout = Literal["kn", "nk"]
"""How a right operand is stored: [K, N], or transposed, [N, K]."""

SDD_CONFIG = TileConfig(128, 128, 64, num_warps=4, num_stages=4)
SDD_INT8_CONFIG = TileConfig(128, 128, 128, num_warps=4, num_stages=3, programs_per_sm=2)
WIDE_SDD_CONFIG = TileConfig(128, 256, 64, num_warps=8, num_stages=3)
WIDE_SDD_INT8_CONFIG = TileConfig(128, 256, 128, num_warps=8, num_stages=3)
# Tile indices are loaded before the tiles, and Triton gives each of the two levels half of the stages.
DSD_CONFIG = TileConfig(128, 256, 64, num_warps=8, num_stages=5, persistent=False)
DSD_TRANSPOSED_CONFIG = TileConfig(128, 256, 64, num_warps=8, num_stages=7, persistent=False)
DSD_INT8_CONFIG = TileConfig(128, 128, 128, num_warps=4, num_stages=5, persistent=False)
DDS_CONFIG = TileConfig(256, 128, 64, num_warps=8, num_stages=5, persistent=False)
DDS_INT8_CONFIG = TileConfig(256, 128, 128, num_warps=8, num_stages=5, persistent=False)
HOPPER_LINE = 128
"""Rows (columns) of tiles along the result that `block_sparse_hopper` and its `_sdd` take."""
HOPPER_SDD_TILES = ((HOPPER_LINE, 128), (HOPPER_LINE, 256))
_SMALLEST_INT8_STEP = 32
"""Features per step that one int8 instruction of the tensor cores sums."""
_MOST_SUMS = 128 * 256
"""Sums per program that eight warps hold in registers."""


def sdd(
    a_MK: Tensor,
    b: Tensor,
    topology: Topology,
    *,
    b_layout: Layout = "kn",
    a_scale_M: Tensor | None = None,
    b_scale_N: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """S = a_scale b_scale (A B) at the tiles of `topology`.

    Args:
        a_MK: bfloat16, or int8 codes; M fits the row blocks (the last one may be partly outside, it reads zeros).
        b: the same dtype, [K, N] or [N, K] as `b_layout` says; int8 takes "nk" only.
        topology: which tiles.
        b_layout: how `b` is stored.
        a_scale_M: float32 scale of each row; needed with int8, refused with bfloat16.
        b_scale_N: float32 scale of each column; likewise.
        config: `block_k`, warps, stages and programs are used; the tile is the topology's block.

    Returns:
        bfloat16 [capacity, *block]; tiles past those in use are undefined.

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_choice("b_layout", b_layout, "kn", "nk")
    check_operand("a_MK", a_MK, dtype=(torch.bfloat16, torch.int8), shape=(None, None))
    (M, K), transposed = a_MK.shape, b_layout == "nk"
    check_operand("b", b, dtype=a_MK.dtype, shape=(None, K) if transposed else (K, None))
    N = b.shape[0 if transposed else 1]
    check_blocks("a_MK", M, topology.grid[0], topology.block[0])
    check_blocks("b", N, topology.grid[1], topology.block[1])
    _check_8_bit(a_MK, contiguous_sum=transposed, hint='b_layout="nk"')
    _check_scales(a_MK, ("a_scale_M", a_scale_M, M), ("b_scale_N", b_scale_N, N))
    check_same_device(a_MK=a_MK, b=b, row_offsets=topology.row_offsets, a_scale_M=a_scale_M, b_scale_N=b_scale_N)
    on_hopper = config is None and has_hopper_kernel(a_MK.device) and topology.block in HOPPER_SDD_TILES
    narrow = topology.block[0] * topology.block[1] <= 128 * 128
    if a_MK.dtype == torch.int8:
        default = SDD_INT8_CONFIG if narrow else WIDE_SDD_INT8_CONFIG
    else:
        default = SDD_CONFIG if narrow else WIDE_SDD_CONFIG
    config = _config(config, default, a_MK.dtype, block_m=topology.block[0], block_n=topology.block[1])
    values = torch.empty(topology.capacity, *topology.block, dtype=stored_dtype(torch.bfloat16), device=a_MK.device)
    if topology.capacity and on_hopper:
        importlib.import_module("kernels.block_sparse_hopper_sdd").hopper_sdd(
            a_MK, b, values, topology, b_k_major=transposed, a_scale_M=a_scale_M, b_scale_N=b_scale_N
        )
    elif topology.capacity:
        b_tile = (config.block_n, config.block_k) if transposed else (config.block_k, config.block_n)
        sdd_kernel[(config.num_programs(a_MK.device, topology.capacity),)](
            descriptor(a_MK, config.block_m, config.block_k), descriptor(b, *b_tile), values,
            topology.rows, topology.columns, topology.row_offsets[-1:], a_scale_M, b_scale_N, M, N,
            K=K, B_IS_NK=transposed, HAS_SCALES=a_scale_M is not None, INTEGER=a_MK.dtype == torch.int8,
            **launch_options(a_MK, config),
        )  # fmt: skip
    return values.to(torch.bfloat16)


def dsd(
    values: Tensor,
    b: Tensor,
    topology: Topology,
    *,
    form: Literal["S", "S^T"] = "S",
    b_layout: Layout = "kn",
    row_scale_M: Tensor | None = None,
    column_scale_N: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """C = S B or S^T B, times row_scale column_scale.

    Args:
        values: bfloat16 or int8 [capacity, *block], the tiles of S.
        b: the same dtype, [K, N] or [N, K] as `b_layout` says; a shorter K counts as filled up with zeros.
        topology: where the tiles of S lie.
        form: which product; int8 takes "S" with b_layout="nk" only.
        b_layout: how `b` is stored.
        row_scale_M: float32 scale of each row of the result; needed with int8, refused with bfloat16.
        column_scale_N: float32 scale of each column; likewise.
        config: the tile's `block_n` and `block_k`; its rows are the topology's block.

    Returns:
        bfloat16 [M, N], M being the rows (form "S^T": columns) of the topology's dense matrix.

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_choice("b_layout", b_layout, "kn", "nk")
    check_choice("form", form, "S", "S^T")
    M, sum_size, over_rows = _sides(topology, sparse_left=True, transposed=form == "S^T")
    nk = b_layout == "nk"
    check_operand("b", b, dtype=(torch.bfloat16, torch.int8), shape=(None, None))
    block = _sum_block(topology, over_rows)
    check_blocks("b", b.shape[1 if nk else 0], sum_size // block, block)
    _check_8_bit(b, contiguous_sum=nk and form == "S", hint='form="S" and b_layout="nk"')
    N = b.shape[0 if nk else 1]
    _check_scales(b, ("row_scale_M", row_scale_M, M), ("column_scale_N", column_scale_N, N))
    return _sparse_dense(values, b, topology, (M, N), row_scale_M, column_scale_N, config, over_rows, nk, left=True)


def dds(
    a_MK: Tensor,
    values: Tensor,
    topology: Topology,
    *,
    form: Literal["S", "S^T"] = "S",
    row_scale_M: Tensor | None = None,
    column_scale_N: Tensor | None = None,
    config: TileConfig | None = None,
) -> Tensor:
    """C = A S or A S^T, times row_scale column_scale.

    Args:
        a_MK: bfloat16 or int8; a shorter K counts as filled up with zeros.
        values: the same dtype, [capacity, *block], the tiles of S.
        topology: where the tiles of S lie.
        form: which product; int8 takes "S^T" only.
        row_scale_M: float32 scale of each row of the result; needed with int8, refused with bfloat16.
        column_scale_N: float32 scale of each column; likewise.
        config: the tile's `block_m` and `block_k`; its columns are the topology's block.

    Returns:
        bfloat16 [M, N], N being the columns (form "S^T": rows) of the topology's dense matrix.

    Raises:
        ValueError: a wrong dtype, shape, layout, alignment or device.
    """
    check_choice("form", form, "S", "S^T")
    N, sum_size, over_rows = _sides(topology, sparse_left=False, transposed=form == "S^T")
    check_operand("a_MK", a_MK, dtype=(torch.bfloat16, torch.int8), shape=(None, None))
    block = _sum_block(topology, over_rows)
    check_blocks("a_MK", a_MK.shape[1], sum_size // block, block)
    _check_8_bit(a_MK, contiguous_sum=form == "S^T", hint='form="S^T"')
    M = a_MK.shape[0]
    _check_scales(a_MK, ("row_scale_M", row_scale_M, M), ("column_scale_N", column_scale_N, N))
    return _sparse_dense(
        values, a_MK, topology, (M, N), row_scale_M, column_scale_N, config, over_rows, False, left=False
    )


def _sparse_dense(
    values: Tensor,
    dense: Tensor,
    topology: Topology,
    shape: tuple[int, int],
    row_scale: Tensor | None,
    column_scale: Tensor | None,
    config: TileConfig | None,
    over_rows: bool,
    dense_is_nk: bool,
    *,
    left: bool,
) -> Tensor:
    check_operand("values", values, dtype=dense.dtype, shape=(topology.capacity, *topology.block))
    check_same_device(
        values=values, dense=dense, row_offsets=topology.row_offsets, row_scale=row_scale, column_scale=column_scale
    )
    line_block = topology.block[1 if over_rows else 0]
    sum_block = _sum_block(topology, over_rows)
    block_m, block_n = (line_block, 0) if left else (0, line_block)
    on_hopper = (
        config is None and has_hopper_kernel(dense.device) and _hopper_takes(topology, shape[1], dense, over_rows)
    )
    if dense.dtype == torch.int8:
        default = DSD_INT8_CONFIG if left else DDS_INT8_CONFIG
    elif left:
        default = DSD_TRANSPOSED_CONFIG if over_rows else DSD_CONFIG
    else:
        default = DDS_CONFIG
    config = _config(config, default, dense.dtype, sum_block=sum_block, block_m=block_m, block_n=block_n)
    out = torch.empty(*shape, dtype=stored_dtype(torch.bfloat16), device=dense.device)
    if out.numel() == 0 or topology.capacity == 0:
        return out.to(torch.bfloat16).zero_()
    if on_hopper:
        importlib.import_module("kernels.block_sparse_hopper").hopper_sparse_dense(
            values, dense, out, topology, left=left, over_rows=over_rows, dense_k_major=dense_is_nk or not left,
            row_scale_M=row_scale, column_scale_N=column_scale,
        )  # fmt: skip
        return out
    if not left:
        dense_tile = (config.block_m, config.block_k)
    else:
        dense_tile = (config.block_n, config.block_k) if dense_is_nk else (config.block_k, config.block_n)
    sparse_dense_kernel[(triton.cdiv(shape[0], config.block_m) * triton.cdiv(shape[1], config.block_n),)](
        descriptor(values, *((config.block_k, line_block) if over_rows else (line_block, config.block_k))),
        descriptor(dense, *dense_tile), out,
        topology.column_offsets if over_rows else topology.row_offsets,
        topology.rows_by_column if over_rows else topology.columns,
        topology.order, row_scale, column_scale, *shape,
        SPARSE_LEFT=left, SUM_OVER_ROWS=over_rows, DENSE_IS_NK=dense_is_nk, VALUE_ROWS=topology.block[0],
        SUM_BLOCK=sum_block, HAS_SCALES=row_scale is not None, INTEGER=dense.dtype == torch.int8,
        GROUP_M=config.group_m, **launch_options(dense, config),
    )  # fmt: skip
    return out.to(torch.bfloat16)


def _sides(topology: Topology, *, sparse_left: bool, transposed: bool) -> tuple[int, int, bool]:
    """(size of the result along the sparse operand, size of the sum, whether the sum runs over the rows of S)."""
    rows, columns = topology.shape
    over_rows = sparse_left == transposed
    return (columns, rows, True) if over_rows else (rows, columns, False)


def _sum_block(topology: Topology, over_rows: bool) -> int:
    return topology.block[0 if over_rows else 1]


def _hopper_takes(topology: Topology, result_columns: int, operand: Tensor, over_rows: bool) -> bool:
    """Whether `hopper_sparse_dense` has a form for these tiles and can write whole 16 bytes of bfloat16."""
    line, summed = reversed(topology.block) if over_rows else topology.block
    step = HOPPER_STEP_BYTES // operand.element_size()
    return line == HOPPER_LINE and summed % step == 0 and result_columns % 8 == 0


def _config(
    config: TileConfig | None,
    default: TileConfig,
    dtype: torch.dtype,
    *,
    sum_block: int = 256,
    block_m: int = 0,
    block_n: int = 0,
) -> TileConfig:
    """The tile shape with the sides that the topology fixes (0: free)."""
    if config is None:
        config = replace(
            default,
            block_m=min(default.block_m, _MOST_SUMS // max(block_n, 128)),
            block_n=min(default.block_n, _MOST_SUMS // max(block_m, 128)),
            block_k=min(default.block_k, sum_block),
        )
    if sum_block % config.block_k:
        raise ValueError(f"block_k={config.block_k}: expected a divisor of the sparse operand's block, {sum_block}")
    if dtype == torch.int8 and config.block_k < _SMALLEST_INT8_STEP:
        raise ValueError(f"block_k={config.block_k}: expected at least {_SMALLEST_INT8_STEP} with int8 operands")
    return replace(config, block_m=block_m or config.block_m, block_n=block_n or config.block_n)


def _check_8_bit(operand: Tensor, *, contiguous_sum: bool, hint: str) -> None:
    if operand.dtype == torch.int8 and not contiguous_sum:
        raise ValueError(f"int8 operands have to be contiguous along the sum: expected {hint}")


def _check_scales(operand: Tensor, *scales: tuple[str, Tensor | None, int]) -> None:
    for name, scale, size in scales:
        if (scale is not None) != (operand.dtype == torch.int8):
            raise ValueError(f"{name}: {'absent' if scale is None else 'given'}, expected with int8 operands only")
        if scale is not None:
            check_tensor(name, scale, dtype=torch.float32, shape=(size,))
