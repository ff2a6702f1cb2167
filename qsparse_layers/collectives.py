"""Collectives over the rows of a tensor that do nothing where a group has one rank.

`start_...` returns where the result will be and what to wait for, None where it is there already: NCCL works on it
beside the products that are launched meanwhile.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def group_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks of `group`; None means this process alone."""
    return 1 if group is None else group.size()


def gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[R, ...] of each rank -> [ranks R, ...], in rank order."""
    return _finished(*start_gather(x, group))


def reduce_scatter(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[ranks R, ...] -> [R, ...], this rank's rows of the sum over ranks."""
    return _finished(*start_reduce_scatter(x, group))


def start_gather(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, dist.Work | None]:
    """See `gather_rows`."""
    if group is None or group.size() == 1:
        return x, None
    out = x.new_empty((x.shape[0] * group.size(), *x.shape[1:]))
    # As bytes: NCCL has no 16-bit integers, and some versions no e4m3.
    sent = x.contiguous().view(torch.uint8)
    return out, dist.all_gather_into_tensor(out.view(torch.uint8), sent, group=group, async_op=True)


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, dist.Work | None]:
    """See `reduce_scatter`."""
    if group is None or group.size() == 1:
        return x, None
    out = x.new_empty((x.shape[0] // group.size(), *x.shape[1:]))
    return out, dist.reduce_scatter_tensor(out, x, group=group, async_op=True)


def _finished(out: Tensor, work: dist.Work | None) -> Tensor:
    if work is not None:
        work.wait()
    return out
