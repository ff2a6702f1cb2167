"""What stands in front of a row-parallel layer, for rows whose features are spread over ranks.

`ShardedFused` has the operations of `kernels.dispatch.Fused` with the collectives inside, so that a layer is written
once for rows that it holds alone and for rows that it shares.  Forward, a collective of 8 bytes per token and rank
(mean square and largest magnitude), and for a top-K over whole rows two more with counts of magnitudes (32 and 16
bytes, `kernels.sharded`); block patterns and K per shard need no counts.  Backward, one of 4 bytes, if there is a norm.

Without a norm the result is that of `selection.topk_mask`, bit for bit.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import Before, Fused, Kernels, Sharded
from qsparse_layers.collectives import gather_rows, group_size
from qsparse_layers.config import LinearFormat


class ShardedFused:
    """`kernels.dispatch.Fused` for the features [..., F] of this rank.

    Args:
        fused: for what needs no other rank.
        sharded: the passes between the collectives.
        group: ranks that share the rows, in feature order, F features each.
        across_ranks: K is one of the whole row, not of this rank's features.
    """

    def __init__(self, fused: Fused, sharded: Sharded, group: dist.ProcessGroup, *, across_ranks: bool) -> None:
        self._fused, self._sharded, self._group, self._across_ranks = fused, sharded, group, across_ranks
        self.activate, self.takes = fused.activate, fused.takes

    def rms_norm(self, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """See `Fused.rms_norm`."""
        norm = Before(None, gain, eps)
        return self._sharded.normalize(x, self._of_all(self._sharded.row_sums(x, norm)), norm)

    def sparsify(
        self, x: Tensor, kept: int | None, block: int | None, before: Before
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `Fused.sparsify`; nothing before is fine."""
        sums = self._of_all(self._sharded.row_sums(x, before))
        if kept is None or block is not None or not self._across_ranks:
            return self._sharded.local_codes(x, sums, kept, block, before)
        (codes, scale, rstd), counts = self._sharded.count_codes(x, sums, before)
        coarse = self._of_all(counts)
        fine = self._of_all(self._sharded.count_nearest(codes, coarse, kept))
        return self._sharded.keep_largest(codes, coarse, fine, kept, self._group.rank()), scale, rstd

    def backward(self, grad: Tensor, x: Tensor, before: Before, rstd: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `Fused.backward`."""
        if before.gain is None or rstd is None:
            return self._fused.backward(grad, x, before, rstd)
        dots = self._sharded.gradient_dots(grad, x, before, rstd)
        dist.all_reduce(dots, group=self._group)
        return self._sharded.gradients(grad, x, before, rstd, dots, before.gain.numel() * self._group.size())

    def _of_all(self, rows: Tensor) -> Tensor:
        """[T, N] of each rank -> [ranks, T, N]."""
        return gather_rows(rows, self._group).view(self._group.size(), *rows.shape)


def fused_for(
    kernels: Kernels, layout: LinearFormat, dtype: torch.dtype, features: int, group: dist.ProcessGroup | None
) -> Fused | None:
    """What computes the codes of rows of which this rank has `features`; None: there are no kernels for it.

    Args:
        kernels: of the layer.
        layout: the layer's format.
        dtype: of the rows.
        features: of this rank.
        group: ranks that share the rows; None: this one has them alone.
    """
    fused, sharded = kernels.fused, kernels.sharded
    block = layout.block_size if layout.pattern == "block" else None
    if fused is None or group_size(group) == 1:
        return fused if fused is not None and fused.takes(features, block) else None
    assert group is not None
    if sharded is None or not sharded.takes(dtype, features, block):
        return None
    return ShardedFused(fused, sharded, group, across_ranks=layout.topk_scope == "global")
