"""Ground truth of the grouped and block-sparse products, in plain PyTorch: a loop over experts, a loop over tiles.

Clear and slow: expert boundaries are read on the host, and nothing is fused.  Scales, sums and roundings follow
`kernels.reference.linear`, so that the integer forms are the same bits and the float forms differ by summation order.
"""

from itertools import pairwise

import torch
from torch import Tensor

from kernels import reference


def _per_feature(scale_P: Tensor, features: int) -> Tensor:
    return scale_P.repeat_interleave(features // scale_P.shape[0])


def grouped_forward(
    codes_TD: Tensor, weight_EOD: Tensor, offsets: Tensor, *, x_scale_T: Tensor, weight_scale_EP: Tensor
) -> Tensor:
    """bfloat16 [T, O]: `reference.linear` of each expert's rows (arXiv 2407.10969 eq. 8-10)."""
    O = weight_EOD.shape[1]
    y_TO = codes_TD.new_empty(codes_TD.shape[0], O, dtype=torch.bfloat16)
    for expert, rows in enumerate(expert_rows(offsets)):
        y_TO[rows] = reference.linear(
            codes_TD[rows],
            weight_EOD[expert],
            x_scale_T1=x_scale_T[rows].unsqueeze(-1),
            weight_scale_O=_per_feature(weight_scale_EP[expert], O),
            dtype=torch.bfloat16,
        )
    return y_TO


def grouped_dgrad(
    grad_TO: Tensor,
    weight_EOD: Tensor,
    offsets: Tensor,
    *,
    weight_scale_EP: Tensor,
    grad_scale_T: Tensor | None = None,
) -> Tensor:
    """float64 [T, D]: dX = (grad_scale dY weight_scale) weight (arXiv 2407.10969 eq. 13)."""
    _, O, D = weight_EOD.shape
    grad = grad_TO.double() if grad_scale_T is None else grad_TO.double() * grad_scale_T.double().unsqueeze(-1)
    dx_TD = grad.new_empty(grad.shape[0], D)
    for expert, rows in enumerate(expert_rows(offsets)):
        scale_O = _per_feature(weight_scale_EP[expert], O)
        dx_TD[rows] = reference.linear_dgrad(grad[rows], weight_EOD[expert], weight_scale_O=scale_O)
    return dx_TD


def grouped_wgrad(grad_TO: Tensor, x_TD: Tensor, offsets: Tensor) -> Tensor:
    """float64 [E, O, D]: dW[e] = dY^T x over the rows of expert e; zeros for an expert without rows."""
    return torch.stack([grad_TO[rows].double().t() @ x_TD[rows].double() for rows in expert_rows(offsets)])


def expert_rows(offsets: Tensor) -> list[slice]:
    """Rows of each expert; reads the offsets on the host."""
    bounds = offsets.tolist()
    return [slice(start, end) for start, end in pairwise(bounds)]


def tiles_from_dense(dense_RC: Tensor, rows: Tensor, columns: Tensor, block: tuple[int, int]) -> Tensor:
    """[tiles, *block]: the tiles of a dense matrix at block coordinates (rows, columns)."""
    tiles = dense_RC.unflatten(0, (-1, block[0])).unflatten(2, (-1, block[1])).transpose(1, 2)
    return tiles[rows.long(), columns.long()]


def dense_from_tiles(
    tiles: Tensor, rows: Tensor, columns: Tensor, block: tuple[int, int], grid: tuple[int, int]
) -> Tensor:
    """The dense matrix whose tiles at (rows, columns) are `tiles`, zeros elsewhere."""
    dense = tiles.new_zeros(*grid, *block)
    dense[rows.long(), columns.long()] = tiles
    return dense.transpose(1, 2).flatten(2, 3).flatten(0, 1)
