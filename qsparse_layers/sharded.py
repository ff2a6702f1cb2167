"""int8 codes of a row whose features are spread over ranks, with kernels instead of `selection`'s counting in PyTorch.

Two collectives per row-parallel layer: the maximum of max|x| (4 bytes per token), and for a top-K over whole rows the
counts of magnitudes of every rank (256 bytes per token and rank, `kernels.sharded`).  Block patterns and K per shard
need no counts.  The result is that of `selection.topk_mask`, bit for bit.
"""

import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import Sharded
from qsparse_layers.collectives import gather_rows


def sharded_codes(
    x: Tensor, kernels: Sharded, group: dist.ProcessGroup, *, kept: int | None, block: int | None, across_ranks: bool
) -> tuple[Tensor, Tensor]:
    """Codes [..., D / ranks] int8 and scales [..., 1] of the whole rows.

    Args:
        x: [..., D / ranks], this rank's features.
        kernels: what to compute with.
        group: ranks that share the row, in feature order.
        kept: K, features kept of the whole row, of this rank's, or of each block; None keeps all.
        block: M, features per block; None: the row.
        across_ranks: K is one of the whole row.
    """
    gamma = kernels.row_absmax(x)
    dist.all_reduce(gamma, op=dist.ReduceOp.MAX, group=group)
    if kept is None or block is not None or not across_ranks:
        return kernels.local_codes(x, gamma, kept, block)
    codes, scale, counts = kernels.count_codes(x, gamma)
    everyone = gather_rows(counts, group).view(group.size(), *counts.shape)
    return kernels.keep_largest(codes, everyone, kept, group.rank()), scale
