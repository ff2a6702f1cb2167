"""RMSNorm that works under sequence parallelism, and over features that are sharded over ranks.

megatron-core's torch norm refuses sequence parallelism and its others need Transformer Engine or Apex.  The sharded
form is BitNet's SubLN in front of a row-parallel layer: every rank holds D / TP features of each token, so the mean
square is a sum over ranks.  Both compute in float32 (float64 for float64 inputs) and round once.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.dispatch import Before, Fused
from qsparse_layers.collectives import group_size


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * gain, with the constructor that megatron-core's layer specs call.

    The gain is marked `sequence_parallel`: with a sharded sequence its gradient is summed over the TP group.
    """

    returns_residual = False

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.fused: Fused | None = None
        """One-pass kernels; set where there are any."""
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and type."""
        if self.fused is not None and x.dtype == torch.bfloat16:
            return fused_rms_norm(x, self.weight, self.eps, self.fused)
        return rms_norm(x, self.weight, x.shape[-1], self.eps)


def fused_rms_norm(x: Tensor, gain: Tensor, eps: float, fused: Fused) -> Tensor:
    """[..., F] bf16 -> the same, in one pass; over ranks with a `sharded.ShardedFused`."""
    return _FusedRMSNorm.apply(x, gain, eps, fused)


class _FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float, fused: Fused) -> Tensor:
        y, rstd = fused.rms_norm(x, gain, eps)
        ctx.save_for_backward(x, gain, rstd)
        ctx.fused = fused
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, gain, rstd = ctx.saved_tensors
        dx, dgain = ctx.fused.backward(grads[0], x, Before(gain=gain), rstd)
        return dx, dgain, None, None


def rms_norm(x: Tensor, gain: Tensor, num_features: int, eps: float, group: dist.ProcessGroup | None = None) -> Tensor:
    """RMSNorm over `num_features` features of which this rank holds x.shape[-1].

    Args:
        x: [..., num_features / ranks].
        gain: [num_features / ranks].
        num_features: features of the whole row.
        eps: added to the mean square.
        group: ranks that share the row; None if this process holds all of it.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = wide.square().sum(-1, keepdim=True)
    if group_size(group) > 1:
        squares = _SumOverRanks.apply(squares, group)
    return (wide * gain * torch.rsqrt(squares / num_features + eps)).to(x.dtype)


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose result every rank uses: the gradient of each contribution is the sum over ranks, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
