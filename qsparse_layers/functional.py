"""The Q-Sparse BitNet linear layer as one autograd function, with its tensor-parallel communication inside.

Forward: quantize and sparsify the input, make the weight ternary, multiply integers, scale once
(`kernels.reference`).  Backward: straight through rounding, mask and scales (arXiv 2407.10969 eq. 12-13):

    dX = dY W_hat              every feature, masked or not, gets the gradient of its dequantized value
    dW = dY^T X_hat            with the masked codes that the forward multiplied

The usual way is `x + (q(x) - x).detach()` around an ordinary linear layer.  One function instead of that chain
keeps int8 codes for the backward pass instead of floats, sends codes instead of floats through the sequence-parallel
all-gather, and leaves the product exact.  The price is that communication is spelled out here.

Shapes: x [..., D], weight [O, D], y [..., O]; leading dimensions are [sequence, batch] in megatron-core.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import reference as ops
from qsparse_layers.config import LinearFormat, kept_count
from qsparse_layers.selection import group_size, topk_mask
from qsparse_layers.stats import ZeroCounts


@dataclass(frozen=True)
class WeightParts:
    """How the rows of a fused weight belong to its parts: `groups` repetitions of `sizes` consecutive rows.

    Megatron's q/k/v weight is `groups=query groups, sizes=(queries, key, value)`, its gate/up weight is
    `groups=1, sizes=(ffn, ffn)`, an ordinary matrix `groups=1, sizes=(O,)`.
    """

    groups: int
    sizes: tuple[int, ...]

    def split(self, weight_OD: Tensor) -> tuple[Tensor, ...]:
        """Views [groups, size, D] of the parts."""
        return weight_OD.unflatten(0, (self.groups, sum(self.sizes))).split(self.sizes, dim=1)

    def expand(self, value_per_part: Tensor) -> Tensor:
        """[parts] -> [O], each row with its part's value."""
        sizes = torch.tensor(self.sizes, device=value_per_part.device)
        return value_per_part.repeat_interleave(sizes, output_size=sum(self.sizes)).repeat(self.groups)


@dataclass(frozen=True)
class Sharding:
    """Process groups of one parallel linear layer; None stands for a group of one."""

    weight: dist.ProcessGroup | None = None
    """Ranks that hold shards of the weight: the ternary scale is a mean over all of them."""
    features: dist.ProcessGroup | None = None
    """Ranks that hold shards of the input's features (row parallel): scale and top-K are global."""
    tokens: dist.ProcessGroup | None = None
    """Ranks that hold shards of the sequence (sequence parallel): codes are gathered over them."""
    dgrad: dist.ProcessGroup | None = None
    """Ranks whose input gradients are summed (column parallel without sequence parallel)."""


@dataclass(frozen=True)
class LinearCall:
    """Everything but the tensors of one forward pass."""

    format: LinearFormat
    parts: WeightParts
    sharding: Sharding = field(default_factory=Sharding)
    sparsity: float = 0.0
    """Sparsity of this step: the format's, times the warm-up's progress."""
    quantization: float = 1.0
    """lambda in x + lambda (q(x) - x); below 1 the product is one of floats."""
    counts: ZeroCounts | None = None
    """Where zeros are counted; None when nobody asks."""


@dataclass(frozen=True)
class _Operand:
    """values * scale, values being int8 codes or floats; `scale` None stands for 1."""

    values: Tensor
    scale: Tensor | None = None

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        if self.scale is None:
            return self.values.to(dtype)
        work = torch.promote_types(dtype, torch.float32)
        return (self.values.to(work) * self.scale.to(work)).to(dtype)


def qsparse_linear(x: Tensor, weight: Tensor, call: LinearCall) -> Tensor:
    """y = X_hat W_hat^T with the format, warm-up and layout of `call`.

    Args:
        x: [..., D] (row parallel: this rank's features; sequence parallel: this rank's tokens in dim 0).
        weight: [O, D] master weight shard, fp32, bf16 or fp64.
        call: format and process groups.

    Returns:
        [..., O] in x's type; row-parallel callers sum it over ranks.
    """
    return _QSparseLinear.apply(x, weight, call)


class _QSparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, call: LinearCall) -> Tensor:
        x_hat, straight_through_scale = prepare_input(x, call)
        w_hat = prepare_weight(weight, call)
        if call.counts is not None:
            call.counts.add(x_hat.values, w_hat.values)
        full = _gather_tokens(x_hat, call.sharding.tokens)
        scale = None if w_hat.scale is None else w_hat.scale.flatten()
        ctx.call, ctx.weight_dtype = call, weight.dtype
        ctx.save_for_backward(x_hat.values, x_hat.scale, w_hat.values, scale, straight_through_scale)
        return ops.linear(full.values, w_hat.values, x_scale_T1=full.scale, weight_scale_O=scale, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        values, x_scale, w_values, w_scale, straight_through_scale = ctx.saved_tensors
        sharding = ctx.call.sharding
        grad = grads[0].contiguous()
        dx = ops.linear_dgrad(grad, w_values, weight_scale_O=w_scale)
        dx, handle = _reduce_input_grad(dx, sharding)  # in flight while the weight gradient is computed
        full = _gather_tokens(_Operand(values, x_scale), sharding.tokens)
        dw = ops.linear_wgrad(grad, full.values, x_scale_T1=full.scale).to(ctx.weight_dtype)
        if handle is not None:
            handle.wait()
        if straight_through_scale is not None:
            dx = dx * straight_through_scale
        return dx, dw, None


def prepare_input(x: Tensor, call: LinearCall) -> tuple[_Operand, Tensor | None]:
    """Quantized and sparsified input, and the factor that the input gradient keeps (L2 rescale) or None."""
    operand = _Operand(x)
    if call.format.activations == "int8":
        gamma = x.abs().amax(-1, keepdim=True)
        if group_size(call.sharding.features) > 1:
            dist.all_reduce(gamma, op=dist.ReduceOp.MAX, group=call.sharding.features)
        scale = ops.row_scale(gamma)
        operand = _Operand(ops.absmax_codes(x, scale), scale)
    mask = _sparsity_mask(operand.values, call)
    if call.quantization < 1.0 and call.format.activations == "int8":
        operand = _Operand(_interpolate(x, operand, call.quantization))
    if mask is not None:
        operand = _Operand(ops.apply_mask(operand.values, mask), operand.scale)
    if call.format.rescale == "l2" and mask is not None:
        scale = _inverse_norm(operand.values, call.sharding.features)
        return _Operand(operand.values, scale), scale.to(x.dtype)
    return operand, None


def _sparsity_mask(values: Tensor, call: LinearCall) -> Tensor | None:
    """Mask of the kept features of `values`, or None if all are kept."""
    layout, sparsity = call.format, call.sparsity
    if sparsity == 0.0:
        return None
    if layout.pattern == "block":
        return topk_mask(
            values.unflatten(-1, (-1, layout.block_size)), kept_count(layout.block_size, sparsity)
        ).flatten(-2)
    if layout.topk_scope == "shard":
        return topk_mask(values, kept_count(values.shape[-1], sparsity))
    group = call.sharding.features
    return topk_mask(values, kept_count(values.shape[-1] * group_size(group), sparsity), group)


def _interpolate(full: Tensor, quantized: _Operand, fraction: float) -> Tensor:
    return full + fraction * (quantized.dequantize(full.dtype) - full)


def _inverse_norm(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """1 / ||row||_2 (+1e-6, as third-party code has it), float32 or wider; rows may be sharded over `group`."""
    work = torch.promote_types(values.dtype, torch.float32)
    squares = values.to(work).square().sum(-1, keepdim=True)
    if group_size(group) > 1:
        dist.all_reduce(squares, group=group)
    return 1.0 / (squares.sqrt() + 1e-6)


def prepare_weight(weight: Tensor, call: LinearCall) -> _Operand:
    """Ternary codes and the scale of each row [O, 1], or the master weight."""
    if call.format.weights == "full":
        return _Operand(weight)
    scale = ternary_row_scale(weight, call)
    codes = _Operand(ops.ternary_codes(weight, scale), scale)
    return codes if call.quantization == 1.0 else _Operand(_interpolate(weight, codes, call.quantization))


def ternary_row_scale(weight_OD: Tensor, call: LinearCall) -> Tensor:
    """float32 absmean scale of each row [O, 1]: one per part, or one for the matrix, over all shards."""
    group = call.sharding.weight
    parts = call.parts.split(weight_OD)
    sums = torch.stack([ops.absmean_sum(part) for part in parts])
    counts = torch.tensor([part.numel() * group_size(group) for part in parts], device=weight_OD.device)
    if group_size(group) > 1:
        dist.all_reduce(sums, group=group)
    if call.format.ternary_scale == "matrix":
        sums, counts = sums.sum().expand_as(sums), counts.sum().expand_as(counts)
    return call.parts.expand(ops.absmean_scale(sums, counts)).unsqueeze(-1)


def _gather_tokens(local: _Operand, group: dist.ProcessGroup | None) -> _Operand:
    """All tokens of a sequence-sharded operand: int8 codes and one scale per token travel, not floats."""
    if group_size(group) == 1:
        return local
    return _Operand(_all_gather(local.values, group), None if local.scale is None else _all_gather(local.scale, group))


def _all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    out = x.new_empty((x.shape[0] * group_size(group), *x.shape[1:]))
    dist.all_gather_into_tensor(out, x.contiguous(), group=group)
    return out


def _reduce_input_grad(dx: Tensor, sharding: Sharding) -> tuple[Tensor, dist.Work | None]:
    """Start the sum of the input gradient over ranks; returns where it will be and what to wait for."""
    if group_size(sharding.tokens) > 1:
        out = dx.new_empty((dx.shape[0] // group_size(sharding.tokens), *dx.shape[1:]))
        return out, dist.reduce_scatter_tensor(out, dx, group=sharding.tokens, async_op=True)
    if group_size(sharding.dgrad) > 1:
        return dx, dist.all_reduce(dx, group=sharding.dgrad, async_op=True)
    return dx, None
