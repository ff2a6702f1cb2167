"""Exact top-K of a row whose features are spread over ranks.

The obvious way gathers the row; this one counts.  Keys are non-negative integers ordered like |x| (int8 codes: 8 bits,
floats: their bit pattern).  Digit by digit, from the top, a 256-bin histogram of the keys that still match the
threshold's prefix is summed over the ranks, and every rank finds the digit of the K-th largest key by itself.  int8
codes take one round of 1 KiB per token.  Keys above the threshold are kept; of those equal to it the first ones in
global feature order (rank order, then index) fill up to exactly K, so the mask is that of one process.

The trade-off: a fixed 1 KiB per token and digit, against D / TP bytes per token and rank for a gather of codes.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.reference import digit_histogram, magnitude_keys
from qsparse_layers.collectives import group_size


def topk_mask(values: Tensor, k: int, group: dist.ProcessGroup | None = None) -> Tensor:
    """Bool mask of exactly `k` largest |values| per row over all ranks' features, ties to the lowest global index.

    Args:
        values: [..., D / ranks], int8 codes or floats; the same leading shape on every rank.
        k: number of features kept in the whole row.
        group: ranks that share the row, in feature order; None if this process holds all of it.

    Equal to `kernels.reference.topk_mask` of the unsharded row.
    """
    keys, num_bits = magnitude_keys(values)
    threshold, num_ties = _kth_largest(keys, num_bits, k, group)
    ties = keys == threshold
    rank_among_ties = ties.cumsum(-1, dtype=torch.int32)
    if group_size(group) > 1:
        rank_among_ties = rank_among_ties + _ties_on_lower_ranks(rank_among_ties[..., -1:], group)
    return (keys > threshold) | (ties & (rank_among_ties <= num_ties))


def _kth_largest(keys: Tensor, num_bits: int, k: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """The k-th largest key of each row and how many keys equal to it are kept; both [..., 1]."""
    threshold = torch.zeros_like(keys[..., :1])
    remaining = torch.full_like(threshold, k, dtype=torch.int32)
    for shift in range((num_bits - 1) // 8 * 8, -1, -8):
        histogram = digit_histogram(keys, threshold, shift)
        if group_size(group) > 1:
            dist.all_reduce(histogram, group=group)
        descending = histogram.flip(-1)
        at_least = descending.cumsum(-1, dtype=torch.int32)  # number of keys whose digit is >= 255 - position
        position = (at_least >= remaining).int().argmax(-1, keepdim=True)
        above = at_least.gather(-1, position) - descending.gather(-1, position)
        remaining = remaining - above
        threshold = (threshold << 8) | (255 - position).to(keys.dtype)
    return threshold, remaining


def _ties_on_lower_ranks(num_ties: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    counts = [torch.empty_like(num_ties) for _ in range(group_size(group))]
    dist.all_gather(counts, num_ties.contiguous(), group=group)
    rank = dist.get_rank(group)
    return sum(counts[:rank], torch.zeros_like(num_ties))
