"""What each data-parallel rank updates of megatron-core's parameter buckets, and a gather of some of it.

The distributed optimizer (ZeRO-1, arXiv 1910.02054) cuts every bucket, a flat buffer of whole parameters, into as many
equal shards as there are ranks, without regard to where parameters begin.  megatron-core gathers whole shards;
`ChosenValues` gathers some parameters and leaves out others.

What is chosen may lie on one rank (an embedding, at the end of a bucket), and an all-gather of equal messages would be
as long as n times that.  So ranks first deal their values out evenly, then gather: each value is received once by all
as in one gather, and once more by whom it was dealt to, one n-th on each rank.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """Consecutive elements of one parameter, which lie next to each other in a bucket."""

    parameter: Tensor
    start: int
    """First element, of the flattened parameter."""
    end: int

    @property
    def values(self) -> Tensor:
        """View of the elements."""
        return self.parameter.detach().view(-1)[self.start : self.end]

    def __len__(self) -> int:
        return self.end - self.start


def rank_shards(bucket: Any, ranks: int, chosen: Callable[[Tensor], bool]) -> list[list[Run]]:
    """For each rank what it updates of the chosen parameters, in the order of the bucket.

    Args:
        bucket: one of megatron-core's, of data parallelism with the distributed optimizer.
        ranks: that share it.
        chosen: whether a parameter counts.
    """
    buffer = bucket.param_data
    size = buffer.numel() // ranks
    places = {parameter: _place(parameter, buffer) for parameter in bucket.params_list if chosen(parameter)}
    shards: list[list[Run]] = [[] for _ in range(ranks)]
    for parameter, place in sorted(places.items(), key=lambda item: item[1]):
        for rank, shard in enumerate(shards):
            start, end = max(0, rank * size - place), min(parameter.numel(), (rank + 1) * size - place)
            if start < end:
                shard.append(Run(parameter, start, end))
    return shards


def _place(parameter: Tensor, buffer: Tensor) -> int:
    return (parameter.data_ptr() - buffer.data_ptr()) // buffer.element_size()


class ChosenValues:
    """Parameters that are gathered as they are.

    Args:
        ranks: that share the buckets.
        buckets: megatron-core's.
        chosen: whether a parameter is gathered.
    """

    def __init__(self, ranks: dist.ProcessGroup, buckets: list[Any], chosen: Callable[[Tensor], bool]) -> None:
        self._ranks = ranks
        here, size = ranks.rank(), ranks.size()
        by_rank: list[list[Tensor]] = [[] for _ in range(size)]
        for bucket in buckets:
            for rank, runs in enumerate(rank_shards(bucket, size, chosen)):
                by_rank[rank] += [run.values for run in runs]
        self._mine = by_rank[here]
        self._all = [values for of_rank in by_rank for values in of_rank]
        self._sizes = [values.numel() for values in self._all]
        owned = list(accumulate((sum(map(len, of_rank)) for of_rank in by_rank), initial=0))
        self._dealt = -(-owned[-1] // size)
        """Values that a rank sends to all others, once they are dealt out; the last ones may have fewer."""
        dealt = [min(rank * self._dealt, owned[-1]) for rank in range(size + 1)]
        self._sent = list(_overlaps(owned[here], owned[here + 1], dealt))
        self._received = list(_overlaps(dealt[here], dealt[here + 1], owned))

    def gather(self) -> None:
        """Write what each rank has updated into the parameters of all; collective."""
        if not self._all:
            return
        mine = torch.cat(self._mine) if self._mine else self._all[0].new_empty(0)
        dealt = mine.new_zeros(self._dealt)
        dist.all_to_all_single(dealt[: sum(self._received)], mine, self._received, self._sent, group=self._ranks)
        values = mine.new_empty(self._dealt * self._ranks.size())
        dist.all_gather_into_tensor(values, dealt, group=self._ranks)
        torch._foreach_copy_(self._all, list(values[: sum(self._sizes)].split(self._sizes)))


def _overlaps(start: int, end: int, bounds: list[int]) -> Iterator[int]:
    """How much of start..end lies between each two neighbouring bounds."""
    for low, high in pairwise(bounds):
        yield max(0, min(end, high) - max(start, low))
