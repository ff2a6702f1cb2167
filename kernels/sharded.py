"""What `fused.sparsify` and `norm.rms_norm` do, for rows whose features are spread over ranks, in Triton.

The passes between the collectives of a row-parallel layer (`qsparse_layers.sharded`).  With a the row or its
activation, and x = (a gain) rstd or a itself:

    row_sums        sum(a^2) and max|a gain| of this rank's features
    count_codes     codes of x, and how many of their magnitudes have each value of the upper four bits
    count_nearest   of those with the upper bits of the K-th largest, how many have each value of the lower three
    keep_largest    the K largest codes of the whole row stay, in place

What the first three find of their features, every rank learns of all ranks.

The obvious way takes a collective more: the largest |x| of the row is known when x is, and x when the mean square is.
But rounding is monotonic, so max|x| is max|a gain| times rstd, rounded alike: both travel together, 8 bytes per token
and rank, and x never goes to memory.  Likewise, the obvious way to select sums the counts over ranks and then asks how
many of the tied codes lie on lower ranks.  Here the counts of each rank travel as they are: the K-th largest magnitude
follows from their sum, and the ties on lower ranks are an entry of the same table.  All 128 counts at once would take a
collective less, and 256 bytes per token and rank instead of 48: with eight ranks more than the features themselves.

Bit for bit the unsharded row's codes without a norm; with one, its mean square is summed in another order.

Shapes: T tokens, F features of this rank, R ranks; x has 2 F columns with a gated activation, else F.
"""

from typing import Any

import torch
from torch import Tensor

from kernels.dispatch import Before
from kernels.fused import MAX_FEATURES, Sparsified, check_gain, check_input, fused_options
from kernels.launch import check_dtype, check_rows, next_power_of_2
from kernels.sharded_triton import (
    count_kernel,
    fine_kernel,
    keep_kernel,
    local_kernel,
    normalize_kernel,
    sums_kernel,
)
from kernels.sparsify import LAUNCHES, check_kept, launch_options, quarters

COARSE, FINE = 16, 8
"""Counts of magnitudes: by their upper four bits, and by the lower three."""


def row_sums(x: Tensor, before: Before) -> Tensor:
    """Sum of squares (0 without a gain) and largest magnitude of this rank's features, float32 [T, 2].

    Args:
        x: rows contiguous; [..., 2 F] = [gate | up] with a gated activation, else [..., F]; bf16, and fp16 or fp32
            where there is neither activation nor norm.
        before: the activation and the norm.

    Raises:
        ValueError: dtype or shape that the kernel does not take.
    """
    rows, features = _check(x, before)
    sums = torch.empty((rows.shape[0], 2), dtype=torch.float32, device=x.device)
    if x.numel():
        gain = rows if before.gain is None else before.gain
        sums_kernel[(rows.shape[0],)](rows, gain, sums, rows.stride(0), features, **_tiles(features, None, before))
    return sums


def count_codes(x: Tensor, sums: Tensor, before: Before) -> tuple[Sparsified, Tensor]:
    """Codes of this rank's features, and how many have each of the upper four bits of a magnitude.

    Args:
        x: as for `row_sums`.
        sums: [R, T, 2] float32, those of all ranks.
        before: as for `row_sums`.

    Returns:
        codes, scale and 1/rms as `fused.sparsify` returns them, and int16 [T, 16] how many magnitudes are 0 to 7, 8 to
        15, and so on.

    Raises:
        ValueError: dtype or shape that the kernel does not take.
    """
    found, rows, given = _results(x, sums, before, None)
    counts = torch.empty((rows.shape[0], COARSE), dtype=torch.int16, device=x.device)
    if x.numel():
        count_kernel[(rows.shape[0],)](**given, counts_ptr=counts.view(torch.int32))
    return found, counts


def count_nearest(codes: Tensor, coarse: Tensor, kept: int) -> Tensor:
    """How many codes have each of the eight magnitudes around the K-th largest of the whole row, int16 [T, 8].

    Args:
        codes: [..., F] int8 from `count_codes`, contiguous.
        coarse: [R, T, 16] int16, the counts of all ranks.
        kept: K of the whole row.

    Raises:
        ValueError: dtype or shape that the kernel does not take.
    """
    rows = _check_codes(codes)
    _check_counts(coarse, "coarse", rows.shape[0], COARSE)
    fine = torch.empty((rows.shape[0], FINE), dtype=torch.int16, device=codes.device)
    if codes.numel():
        fine_kernel[(rows.shape[0],)](
            rows, coarse, fine.view(torch.int32), rows.shape[1], kept=kept, ranks=len(coarse),
            coarse_stride=coarse.stride(0), **_code_tiles(rows.shape[1], len(coarse)),
        )  # fmt: skip
    return fine


def keep_largest(codes: Tensor, coarse: Tensor, fine: Tensor, kept: int, rank: int) -> Tensor:
    """Set all but the `kept` largest codes of the whole row to 0, in place; ties to the lowest rank and index.

    Args:
        codes: [..., F] int8 from `count_codes`, contiguous.
        coarse: [R, T, 16] int16 of all ranks, in the order of their features.
        fine: [R, T, 8] int16 of all ranks from `count_nearest`.
        kept: K of the whole row.
        rank: whose features `codes` are.

    Raises:
        ValueError: dtype or shape that the kernel does not take.
    """
    rows = _check_codes(codes)
    _check_counts(coarse, "coarse", rows.shape[0], COARSE)
    _check_counts(fine, "fine", rows.shape[0], FINE)
    if codes.numel():
        keep_kernel[(rows.shape[0],)](
            rows, coarse, fine, rows.shape[1], kept=kept, rank=rank, ranks=len(coarse),
            coarse_stride=coarse.stride(0), fine_stride=fine.stride(0), **_code_tiles(rows.shape[1], len(coarse)),
        )  # fmt: skip
    return codes


def local_codes(x: Tensor, sums: Tensor, kept: int | None, block: int | None, before: Before) -> Sparsified:
    """`fused.sparsify` of this rank's features under the norm and the scale of the whole row.

    Args:
        x: as for `row_sums`.
        sums: [R, T, 2] float32, those of all ranks.
        kept: K of this rank's features, or of each block; None keeps all.
        block: M, features per block; None: all of this rank's.
        before: as for `row_sums`.

    Raises:
        ValueError: dtype, shape, K or M that the kernel does not take.
    """
    found, rows, given = _results(x, sums, before, block if kept is not None else None)
    features = found.codes.shape[-1]
    check_kept(kept, block, features)
    if x.numel():
        is_sparse = kept is not None and kept < (block or features)
        local_kernel[(rows.shape[0],)](
            **given, kept=kept or 0, BLOCK=block if block and kept is not None else 0, SPARSE=is_sparse
        )
    return found


def normalize(x: Tensor, sums: Tensor, before: Before) -> tuple[Tensor, Tensor]:
    """Normalized rows and 1/rms, of layers that do not quantize them.

    Args:
        x: [..., F] bf16, rows contiguous.
        sums: [R, T, 2] float32, `row_sums` of all ranks.
        before: the norm, without an activation.

    Returns:
        y [..., F] bf16 and 1/rms [..., 1] float32.

    Raises:
        ValueError: type or shape that the kernel does not take.
    """
    rows, features = _check(x, before)
    _check_sums(sums, rows.shape[0])
    y, rstd = torch.empty(x.shape, dtype=x.dtype, device=x.device), sums.new_empty((*x.shape[:-1], 1))
    if x.numel():
        block = next_power_of_2(features)
        normalize_kernel[(rows.shape[0],)](
            rows, sums, before.gain, y, rstd, rows.stride(0), rows.shape[0], len(sums), len(sums) * features,
            before.eps, features, BLOCK=block, RANKS=next_power_of_2(len(sums)),
            num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return y, rstd


def _results(x: Tensor, sums: Tensor, before: Before, block: int | None) -> tuple[Sparsified, Tensor, dict[str, Any]]:
    """Empty results, `x` as rows, and the arguments that kernels with codes (of blocks, or of the row) share."""
    rows, features = _check(x, before)
    _check_sums(sums, rows.shape[0])
    codes = torch.empty((*x.shape[:-1], features), dtype=torch.int8, device=x.device)
    scale = sums.new_empty((*x.shape[:-1], 1))
    rstd = None if before.gain is None else torch.empty_like(scale)
    given = {
        **{"x_ptr": rows, "gain_ptr": rows if rstd is None else before.gain, "sums_ptr": sums, "codes_ptr": codes},
        **{"scale_ptr": scale, "rstd_ptr": scale if rstd is None else rstd, "row_stride": rows.stride(0)},
        **{"num_rows": rows.shape[0], "ranks": len(sums), "total": len(sums) * features, "eps": before.eps},
        **{"features": features, "RANKS": next_power_of_2(len(sums)), "FACTOR": x.dtype == torch.bfloat16},
        **_tiles(features, block, before),
    }
    return Sparsified(codes, scale, rstd), rows, given


def _tiles(features: int, block: int | None, before: Before) -> dict[str, Any]:
    """Tile, form and launch of a kernel that reads x."""
    quarter, lines, columns = quarters(features, block)
    activation, has_norm = before.activation, before.gain is not None
    options = launch_options(LAUNCHES, lines * columns)
    if activation is not None or has_norm:
        options = fused_options(lines * columns, activation, norm=has_norm)
    form = {"ACTIVATION": activation or "", "NORM": has_norm}
    return {"quarter": quarter, "ROWS": lines, "COLUMNS": columns, **form, **options}


def _code_tiles(features: int, ranks: int) -> dict[str, int]:
    """Likewise of one that reads codes."""
    quarter, lines, columns = quarters(features, None)
    tile = {"quarter": quarter, "ROWS": lines, "COLUMNS": columns, "RANKS": next_power_of_2(ranks)}
    return tile | fused_options(lines * columns, None, norm=True)


def _check_codes(codes: Tensor) -> Tensor:
    """`codes` as rows without a copy."""
    rows = check_rows(codes, "codes", MAX_FEATURES, (torch.int8,))
    if not codes.is_contiguous():
        raise ValueError(f"codes has strides {codes.stride()}, the kernel takes contiguous ones")
    return rows


def _check_counts(counts: Tensor, name: str, tokens: int, entries: int) -> None:
    check_dtype(counts, name, (torch.int16,))
    if counts.dim() != 3 or counts.shape[1:] != (tokens, entries) or not counts.is_contiguous():
        wanted = f"[ranks, {tokens}, {entries}]"
        raise ValueError(f"{name} has shape {tuple(counts.shape)}, the kernel takes {wanted}, contiguous")


def _check_sums(sums: Tensor, tokens: int) -> None:
    check_dtype(sums, "sums", (torch.float32,))
    if sums.dim() != 3 or sums.shape[1:] != (tokens, 2) or not sums.is_contiguous():
        wanted = f"[ranks, {tokens}, 2]"
        raise ValueError(f"sums has shape {tuple(sums.shape)}, the kernel takes {wanted}, contiguous")


def _check(x: Tensor, before: Before) -> tuple[Tensor, int]:
    """`x` as rows without a copy, and F."""
    if before.activation is None and before.gain is None:
        rows = check_rows(x, "x", MAX_FEATURES)
        return rows, rows.shape[1]
    rows, features = check_input(x, before.activation)
    if before.gain is not None:
        check_gain(before.gain, features)
    return rows, features
