"""Exact top-K of 16-bit floats in one pass, in Triton: for sparse activations that are not quantized.

Without their sign the bits of a bf16 or fp16 number are an integer of 15 bits ordered like its magnitude.  A row is
held in registers and the K-th largest of these integers found bit by bit from the top, by counting how many are at
least the trial value: 15 counts of a row that is read once.  The halves of a row share 32-bit words, in which one
subtraction compares both: (0x8000 + key) - threshold keeps its top bit exactly if key >= threshold, and never borrows
from its neighbour.  Counting digits in PyTorch reads the row from memory a dozen times.

`reference.topk_mask` and `block_mask`, exactly: K of each row (of each block) stay, ties to the lowest index, and NaN
counts as larger than infinity.  What is dropped becomes +0, where multiplying by a mask keeps the sign.

Shapes: T tokens, D features, K kept features, M features per block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import INTERPRETED, cdiv, check_rows, next_power_of_2
from kernels.sparsify import check_kept

MAX_FEATURES = 16384
DTYPES = (torch.bfloat16, torch.float16)
_TOPS = tl.constexpr(-0x7FFF8000)
"""0x80008000 as int32."""
_ELEMENTS = 2048
"""Of a program with blocks; more than one block of 64."""


@triton.jit
def _at_least(keys, threshold):
    """1 where a key is >= the threshold of 1 to 32768: an addition and a shift, where a comparison takes three."""
    return (keys + (32768 - threshold)) >> 15


@triton.jit
def _largest_of(values, kept, AXIS: tl.constexpr):
    """`values` without all but the `kept` largest magnitudes along AXIS."""
    keys = values.to(tl.int16, bitcast=True).to(tl.int32) & 0x7FFF
    threshold = tl.sum(keys * 0, axis=AXIS, keep_dims=True)
    for step in tl.static_range(15):
        trial = threshold | (16384 >> step)
        at_least = tl.sum(_at_least(keys, trial), axis=AXIS, keep_dims=True)
        threshold = tl.where(at_least >= kept, trial, threshold)
    ties = (keys == threshold).to(tl.int32)
    free = kept - tl.sum(_at_least(keys, threshold + 1), axis=AXIS, keep_dims=True)
    keep = (keys > threshold) | ((ties != 0) & (tl.cumsum(ties, axis=AXIS) <= free))
    return tl.where(keep, values, 0.0)


@triton.jit
def _half(row_ptr, feature, mask):
    return tl.load(row_ptr + feature, mask=mask, other=0.0).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _both_at_least(words, threshold):
    """0x00010001 flags of keys >= threshold (0 to 32768); `words` hold two keys with the top bit of each half set."""
    return ((words - threshold * 0x10001) >> 15) & 0x10001


@triton.jit
def _both_counts(flags):
    total = tl.sum(flags, axis=0)
    return (total & 0xFFFF) + (total >> 16)


@triton.jit
def _row_kernel(x_ptr, out_ptr, row_stride, features, half, kept, WORDS: tl.constexpr):
    """One row, its halves in the halves of 32-bit words: half the registers."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, WORDS)
    second = first + half
    first_mask = (first < half) & (first < features)
    second_mask = (first < half) & (second < features)
    x_row = x_ptr + row * row_stride
    low = _half(x_row, first, first_mask)
    high = _half(x_row, second, second_mask)
    bits = (low & 0xFFFF) | (high << 16)
    words = bits | _TOPS
    threshold = 0
    for step in tl.static_range(15):
        trial = threshold | (16384 >> step)
        threshold = tl.where(_both_counts(_both_at_least(words, trial)) >= kept, trial, threshold)
    above = _both_at_least(words, threshold + 1)
    inside = first_mask.to(tl.int32) | (second_mask.to(tl.int32) << 16)
    ties = (_both_at_least(words, threshold) ^ above) & inside
    free = kept - _both_counts(above)
    before = tl.cumsum(ties, axis=0)
    first_ties = tl.sum(ties, axis=0) & 0xFFFF
    keep_low = ((above & 1) != 0) | (((ties & 1) != 0) & ((before & 0xFFFF) <= free))
    keep_high = ((above >> 16) != 0) | (((ties >> 16) != 0) & ((before >> 16) + first_ties <= free))
    out_row = out_ptr + row * features
    kind = out_ptr.dtype.element_ty
    tl.store(out_row + first, tl.where(keep_low, bits, 0).to(tl.int16).to(kind, bitcast=True), mask=first_mask)
    tl.store(out_row + second, tl.where(keep_high, bits >> 16, 0).to(tl.int16).to(kind, bitcast=True), mask=second_mask)


@triton.jit
def _block_kernel(
    x_ptr, out_ptr, row_stride, features, num_blocks, kept, M: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    """BLOCKS blocks of one row; WIDTH is M rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    mask = (block < num_blocks) & (column < M)
    feature = block * M + column
    values = tl.load(x_ptr + row * row_stride + feature, mask=mask, other=0.0)
    tl.store(out_ptr + row * features + feature, _largest_of(values, kept, 1), mask=mask)


def largest(x: Tensor, kept: int, block: int | None = None) -> Tensor:
    """`x` with all but its largest features set to 0.

    Args:
        x: [..., D] bf16 or fp16, rows contiguous.
        kept: K, features kept of every token (of every block with `block`).
        block: M, features per block; None: the whole row.

    Returns:
        [..., D] in the type of `x`.

    Raises:
        ValueError: dtype, shape, K or M that the kernel does not take.
    """
    rows = check_rows(x, "x", MAX_FEATURES, DTYPES)
    tokens, features = rows.shape
    check_kept(kept, block, features)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    if block is None:
        half = cdiv(features, 32) * 16  # both halves begin at multiples of 16: wide loads
        words = max(32, next_power_of_2(half))
        _row_kernel[(tokens,)](rows, out, rows.stride(0), features, half, kept, WORDS=words, **_row_options(words))
        return out
    width, num_blocks = next_power_of_2(block), features // block
    blocks = min(_ELEMENTS // width, next_power_of_2(num_blocks))
    _block_kernel[(tokens, cdiv(num_blocks, blocks))](
        rows, out, rows.stride(0), features, num_blocks, kept, M=block, BLOCKS=blocks, WIDTH=width,
        num_warps=max(1, blocks * width // 512),
    )  # fmt: skip
    return out


def _row_options(words: int) -> dict[str, int]:
    """16 words per thread.

    The cap on registers, at which a few spill, keeps several rows on a multiprocessor: while one waits for the next of
    its 15 counts, others work.
    """
    warps = max(1, min(16, words // 512))
    return {"num_warps": warps} | ({} if INTERPRETED else {"maxnreg": 80 if warps < 16 else 64})
