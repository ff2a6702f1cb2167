"""Absmax codes and exact top-K of a row whose features are spread over ranks, in Triton.

The three passes between the collectives of a row-parallel layer (`qsparse_layers.sharded`):

    row_absmax     max|x| of this rank's features                             -> maximum over ranks
    count_codes    codes under the row's scale, and how many have each of the 128 magnitudes
                                                                              -> every rank learns all counts
    keep_largest   the K largest codes of the whole row stay, in place

The obvious way sums the counts over ranks and then asks how many of the tied codes lie on lower ranks.  Here the counts
of each rank travel as they are: the K-th largest magnitude follows from their sum and the ties on lower ranks are an
entry of the same table, so one collective does for both.  16 bits hold a count: 256 bytes per token and rank, and up to
four ranks no more than a sum of 32-bit counts moves.

Bit for bit `reference.absmax_codes` and `topk_mask` of the unsharded row.

Shapes: T tokens, D features of this rank, R ranks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import check_dtype, check_rows, next_power_of_2
from kernels.sparsify import check_kept, quarters
from kernels.sparsify_triton import (
    code_bits,
    code_multiplier,
    larger,
    load_quarter,
    quarter_tile,
    row_scale,
    store_codes,
)

MAX_FEATURES = 16384
MAGNITUDES = 128


@triton.jit
def _absmax_kernel(x_ptr, gamma_ptr, row_stride, features, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + feature, mask=feature < features, other=0.0).to(tl.float32)
    tl.store(gamma_ptr + row, tl.reduce(tl.abs(x), 0, larger))


@triton.jit
def _count_kernel(
    x_ptr, gamma_ptr, codes_ptr, scale_ptr, counts_ptr, row_stride, features,
    BLOCK: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    mask = feature < features
    x = tl.load(x_ptr + row * row_stride + feature, mask=mask, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + row)
    scale = row_scale(gamma)
    tl.store(scale_ptr + row, scale)
    codes = code_bits(x, scale, code_multiplier(gamma, scale), FACTOR).to(tl.int8)
    tl.store(codes_ptr + row * features + feature, codes, mask=mask)
    magnitude = tl.abs(codes.to(tl.int32)) & 127
    counts = tl.histogram(tl.where(mask, magnitude, 0), 128)
    bin = tl.arange(0, 128)
    counts -= tl.where(bin == 0, BLOCK - features, 0)  # what lies beyond the row
    tl.store(counts_ptr + row * 128 + bin, counts.to(tl.int16))


@triton.jit
def _keep_kernel(
    codes_ptr, counts_ptr, features, kept, rank, ranks, rank_stride, BLOCK: tl.constexpr, RANKS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    bin = tl.arange(0, 128)[None, :]
    holder = tl.arange(0, RANKS)[:, None]
    place = counts_ptr + holder.to(tl.int64) * rank_stride + row * 128 + bin
    counts = tl.load(place, mask=holder < ranks, other=0).to(tl.int32)
    total = tl.sum(counts, axis=0)
    at_least = tl.cumsum(total, axis=0, reverse=True)
    threshold = tl.sum((at_least >= kept).to(tl.int32), axis=0) - 1
    above = tl.sum(tl.where(tl.arange(0, 128) > threshold, total, 0), axis=0)
    tied = tl.sum(tl.where(bin == threshold, counts, 0), axis=1)
    left = kept - above - tl.sum(tl.where(tl.arange(0, RANKS) < rank, tied, 0), axis=0)

    feature = tl.arange(0, BLOCK)
    mask = feature < features
    codes_row = codes_ptr + row * features + feature
    codes = tl.load(codes_row, mask=mask, other=0)
    magnitude = tl.abs(codes.to(tl.int32))
    is_tie = magnitude == threshold
    keep = (magnitude > threshold) | (is_tie & (tl.cumsum(is_tie.to(tl.int32), axis=0) <= left))
    tl.store(codes_row, tl.where(keep, codes, 0), mask=mask)


@triton.jit
def _local_kernel(
    x_ptr, gamma_ptr, codes_ptr, scale_ptr, row_stride, features, quarter, kept,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPARSE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """`sparsify._sparsify_kernel` under a given max|x|."""
    row = tl.program_id(0).to(tl.int64)
    index, mask = quarter_tile(quarter, ROWS, COLUMNS, BLOCK)
    x_row = x_ptr + row * row_stride
    x0 = load_quarter(x_row, index, quarter, features, 0, mask)
    x1 = load_quarter(x_row, index, quarter, features, 1, mask)
    x2 = load_quarter(x_row, index, quarter, features, 2, mask)
    x3 = load_quarter(x_row, index, quarter, features, 3, mask)
    store_codes(
        x0, x1, x2, x3, tl.load(gamma_ptr + row), codes_ptr, scale_ptr, row, index, quarter, features, mask, kept,
        SPARSE, BLOCK, FACTOR,
    )  # fmt: skip


def row_absmax(x: Tensor) -> Tensor:
    """max|x| of each row, float32 [..., 1].

    Args:
        x: [..., D] bf16, fp16 or fp32, rows contiguous.

    Raises:
        ValueError: dtype or shape that the kernel does not take.
    """
    rows = check_rows(x, "x", MAX_FEATURES)
    gamma = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        _absmax_kernel[(rows.shape[0],)](rows, gamma, rows.stride(0), rows.shape[1], **_options(rows.shape[1]))
    return gamma


def count_codes(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of this rank's features, and how many have each magnitude.

    Args:
        x: [..., D] bf16, fp16 or fp32, rows contiguous.
        gamma: [..., 1] float32, max|x| of the whole row.

    Returns:
        codes [..., D] int8, scale [..., 1] float32, counts [T, 128] int16.

    Raises:
        ValueError: dtype or shape that the kernel does not take.
    """
    rows = check_rows(x, "x", MAX_FEATURES)
    _check_gamma(gamma, x)
    codes, scale = torch.empty(x.shape, dtype=torch.int8, device=x.device), torch.empty_like(gamma)
    counts = torch.empty((rows.shape[0], MAGNITUDES), dtype=torch.int16, device=x.device)
    if x.numel():
        _count_kernel[(rows.shape[0],)](
            rows, gamma, codes, scale, counts, rows.stride(0), rows.shape[1],
            FACTOR=x.dtype == torch.bfloat16, **_options(rows.shape[1]),
        )  # fmt: skip
    return codes, scale, counts


def keep_largest(codes: Tensor, counts: Tensor, kept: int, rank: int) -> Tensor:
    """Set all but the `kept` largest codes of the whole row to 0, in place; ties to the lowest rank and index.

    Args:
        codes: [..., D] int8 from `count_codes`, contiguous.
        counts: [R, T, 128] int16 of all ranks, in the order of their features.
        kept: K of the whole row.
        rank: whose features `codes` are.

    Raises:
        ValueError: dtype or shape that the kernel does not take.
    """
    rows = check_rows(codes, "codes", MAX_FEATURES, (torch.int8,))
    check_dtype(counts, "counts", (torch.int16,))
    if counts.shape[1:] != (rows.shape[0], MAGNITUDES) or not counts.is_contiguous():
        wanted = f"[ranks, {rows.shape[0]}, {MAGNITUDES}]"
        raise ValueError(f"counts has shape {tuple(counts.shape)}, the kernel takes {wanted}, contiguous")
    if not codes.is_contiguous():
        raise ValueError(f"codes has strides {codes.stride()}, the kernel takes contiguous ones")
    if codes.numel():
        _keep_kernel[(rows.shape[0],)](
            rows, counts, rows.shape[1], kept, rank, counts.shape[0], counts.stride(0),
            RANKS=next_power_of_2(counts.shape[0]), **_options(rows.shape[1]),
        )  # fmt: skip
    return codes


def local_codes(x: Tensor, gamma: Tensor, kept: int | None, block: int | None) -> tuple[Tensor, Tensor]:
    """`sparsify.sparsify` of this rank's features under the scale of the whole row.

    Args:
        x: [..., D] bf16, fp16 or fp32, rows contiguous.
        gamma: [..., 1] float32, max|x| of the whole row.
        kept: K of this rank's features, or of each block; None keeps all.
        block: M, features per block; None: all of this rank's.

    Returns:
        codes [..., D] int8 and scale [..., 1] float32.

    Raises:
        ValueError: dtype, shape, K or M that the kernel does not take.
    """
    rows = check_rows(x, "x", MAX_FEATURES)
    features = rows.shape[1]
    check_kept(kept, block, features)
    _check_gamma(gamma, x)
    codes, scale = torch.empty(x.shape, dtype=torch.int8, device=x.device), torch.empty_like(gamma)
    if x.numel():
        quarter, lines, columns = quarters(features, block if kept is not None else None)
        _local_kernel[(rows.shape[0],)](
            rows, gamma, codes, scale, rows.stride(0), features, quarter, kept or 0,
            ROWS=lines, COLUMNS=columns, BLOCK=block if block and kept is not None else 0,
            SPARSE=kept is not None and kept < (block or features),
            FACTOR=x.dtype == torch.bfloat16, num_warps=max(1, min(8, lines * columns // 512)),
        )  # fmt: skip
    return codes, scale


def _options(features: int) -> dict[str, int]:
    """One row per program, 16 features per thread."""
    block = max(32, next_power_of_2(features))
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 512))}


def _check_gamma(gamma: Tensor, x: Tensor) -> None:
    check_dtype(gamma, "gamma", (torch.float32,))
    if gamma.shape != (*x.shape[:-1], 1) or not gamma.is_contiguous():
        wanted = (*x.shape[:-1], 1)
        raise ValueError(
            f"gamma has shape {tuple(gamma.shape)} and strides {gamma.stride()}, the kernel takes {wanted}, contiguous"
        )
