"""One pass from activations to int8 codes: absmax scale, rounding, exact top-K, in Triton.

Computes what `reference.row_scale`, `absmax_codes`, `topk_mask` or `block_mask` and `apply_mask` compute, bit for bit,
reading each activation once and writing one byte for it.  One program holds one token's row in registers; how it does
is told in `sparsify_triton`.

A row with an infinity or a NaN gets a scale that is not finite, hence outputs that are not; its codes mean nothing.

Shapes: T tokens, D features, K kept features, M features per block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import INTERPRETED, cdiv, check_rows, next_power_of_2
from kernels.sparsify_triton import load_quarter, quarter_tile, row_gamma, store_codes

MAX_FEATURES = 65536
MAX_BLOCK = 64

Launches = dict[int, tuple[int, int | None]]
"""Words of four codes in a row, rounded up to a power of two -> warps, and registers of a thread (None: any)."""
LAUNCHES: Launches = {
    512: (1, 64), 1024: (2, 64), 2048: (2, 128), 4096: (4, 128), 8192: (16, 64), 16384: (16, 128),
}  # fmt: skip
"""16 words per thread in 64 registers, 32 in 128: rows hide each other's waiting.  Measured on an H200."""


@triton.jit
def _sparsify_kernel(
    x_ptr, codes_ptr, scale_ptr, row_stride, features, quarter, kept,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SPARSE: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """One token.  A quarter is a tile [ROWS, COLUMNS]: COLUMNS = 8, or the block size rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    index, mask = quarter_tile(quarter, ROWS, COLUMNS, BLOCK)
    x_row = x_ptr + row * row_stride
    x0 = load_quarter(x_row, index, quarter, features, 0, mask)
    x1 = load_quarter(x_row, index, quarter, features, 1, mask)
    x2 = load_quarter(x_row, index, quarter, features, 2, mask)
    x3 = load_quarter(x_row, index, quarter, features, 3, mask)
    store_codes(
        x0, x1, x2, x3, row_gamma(x0, x1, x2, x3), codes_ptr, scale_ptr, row, index, quarter, features, mask, kept,
        SPARSE, BLOCK, FACTOR,
    )  # fmt: skip


def sparsify(
    x: Tensor, kept: int | None, block: int | None = None, *, launch: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """int8 codes with all but the largest set to 0, and the scale of each token.

    Args:
        x: [..., D] bf16, fp16 or fp32, rows contiguous.
        kept: K, features kept of every token (of every block with `block`); None keeps all.
        block: M, features per block; None: the whole row.
        launch: `num_warps` and `maxnreg` of the kernel; None: from `LAUNCHES`.

    Returns:
        codes [..., D] int8 and scale [..., 1] float32, as `reference.absmax_codes` masked by `reference.topk_mask`.

    Raises:
        ValueError: dtype, shape, K or M that the kernel does not take.
    """
    features = x.shape[-1]
    rows = check_rows(x, "x", MAX_FEATURES)
    check_kept(kept, block, features)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if codes.numel() == 0:
        return codes, scale
    quarter, lines, columns = quarters(features, block if kept is not None else None)
    _sparsify_kernel[(rows.shape[0],)](
        rows, codes, scale, rows.stride(0), features, quarter, kept or 0,
        ROWS=lines, COLUMNS=columns, BLOCK=block if block and kept is not None else 0,
        SPARSE=kept is not None and kept < (block or features),
        FACTOR=x.dtype == torch.bfloat16,
        **(launch or launch_options(LAUNCHES, lines * columns)),
    )  # fmt: skip
    return codes, scale


def launch_options(launches: Launches, words: int) -> dict[str, int]:
    """Launch options of a program that holds one row of `words` words of four codes; short rows take one warp."""
    if words < min(launches):
        return {"num_warps": 1}
    warps, registers = launches[min(words, max(launches))]
    return {"num_warps": warps} | ({} if INTERPRETED or registers is None else {"maxnreg": registers})


def quarters(features: int, block: int | None) -> tuple[int, int, int]:
    """Features per quarter, and the power-of-two grid [lines, columns] that holds a quarter."""
    if block is None:
        quarter = cdiv(cdiv(features, 4), 16) * 16
        return quarter, next_power_of_2(cdiv(quarter, 8)), 8
    lines = cdiv(features // block, 4)
    return lines * block, next_power_of_2(lines), next_power_of_2(block)


def check_kept(kept: int | None, block: int | None, features: int) -> None:
    """Refuse K or M that a row cannot have.

    Raises:
        ValueError: `kept` or `block` is out of range.
    """
    if block is not None and not (1 < block <= MAX_BLOCK and features % block == 0):
        raise ValueError(f"block={block} must be 2 to {MAX_BLOCK} and divide the {features} features of a row")
    if kept is not None and not 1 <= kept <= (block or features):
        raise ValueError(f"kept={kept} must be 1 to {block or features}, the features it is taken from")
