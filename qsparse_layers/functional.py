"""The Q-Sparse BitNet linear layer as one autograd function, with its tensor-parallel communication inside.

Forward: quantize and sparsify the input, make the weight ternary, multiply integers, scale once
(`kernels.reference`).  Backward: straight through rounding, mask and scales (arXiv 2407.10969 eq. 12-13):

    dX = dY W_hat              every feature, masked or not, gets the gradient of its dequantized value
    dW = dY^T X_hat            with the masked codes that the forward multiplied

The usual way is `x + (q(x) - x).detach()` around an ordinary linear layer.  One function instead of that chain
keeps int8 codes for the backward pass instead of floats, sends codes instead of floats through the sequence-parallel
all-gathers (and gradients in e4m3, where the backward products round them to that), and leaves the product exact.
The price is that communication is spelled out here.

Shapes: x [..., D], weight [O, D], y [..., O]; leading dimensions are [sequence, batch] in megatron-core.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import reference
from kernels.dispatch import Backward, Before, Expanded, Fused
from qsparse_layers.collectives import gather_rows, group_size, reduce_scatter, start_gather, start_reduce_scatter
from qsparse_layers.config import kept_count
from qsparse_layers.linear_call import Codes, Front, LinearCall, Operand, Sharding
from qsparse_layers.main_grad import main_grad_of, place_holder
from qsparse_layers.selection import topk_mask
from qsparse_layers.sharded import fused_for


def qsparse_linear(
    x: Tensor,
    weight: Tensor,
    call: LinearCall,
    front: Front | None = None,
    gain: Tensor | None = None,
    *,
    codes: Codes | None = None,
) -> Tensor:
    """y = X_hat W_hat^T with the format, warm-up and layout of `call`.

    Args:
        x: [..., D] (row parallel: this rank's features; sequence parallel: this rank's tokens in dim 0).
        weight: [O, D] master weight shard, fp32, bf16 or fp64.
        call: format and process groups.
        front: what to compute on x first; needs a call for which `is_one_pass` holds.
        gain: [D] gain of the RMSNorm in front.
        codes: what quantizing and sparsifying x gave elsewhere; then only the type of x and its gradient matter.

    Returns:
        [..., O] in x's type; row-parallel callers without `sharding.outputs` sum it over ranks.
    """
    return _QSparseLinear.apply(x, weight, gain, call, front, codes)


class _QSparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        gain: Tensor | None,
        call: LinearCall,
        front: Front | None,
        codes: Codes | None,
    ) -> Tensor:
        rstd, straight_through_scale = None, None
        if codes is not None:
            x_hat = Operand(codes.values, codes.scale)
        elif front is None:
            x_hat, straight_through_scale = prepare_input(x, call)
        else:
            x_hat, rstd = prepare_fused(x, gain, call, front, num_features=weight.shape[1])
        w_hat = prepare_weight(weight, call)
        if call.counts is not None:
            call.counts.add(x_hat.values, w_hat.values)
        full = _gather_tokens(x_hat, call.sharding.tokens)
        w_scale = None if w_hat.scale is None else w_hat.scale.flatten()
        ctx.call, ctx.front, ctx.weight = call, front, weight
        in_bf16 = (None, None) if w_hat.expanded is None else (w_hat.expanded.values, w_hat.expanded.scale)
        before = () if front is None else (x, gain, rstd)
        weights = w_hat.values, w_scale, *in_bf16
        ctx.save_for_backward(x_hat.values, x_hat.scale, *weights, straight_through_scale, *before)
        if w_hat.packed is not None and full.scale is not None and w_hat.packed.takes(full.values):
            y = w_hat.packed.linear(full.values, full.scale)
        else:
            y = call.kernels.linear(full.values, w_hat.values, x_scale=full.scale, weight_scale=w_scale, dtype=x.dtype)
        return reduce_scatter(y, call.sharding.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        values, x_scale, w_values, w_scale, w_bf16, largest, straight_through_scale, *before = ctx.saved_tensors
        call: LinearCall = ctx.call
        has_rows = grads[0].numel() > 0  # an expert may get no tokens
        e4m3 = call.format.gradients == "e4m3" and call.quantization == 1.0 and has_rows
        full_scale = None if x_scale is None else gather_rows(x_scale, call.sharding.tokens)
        full_values, gathering = start_gather(values, call.sharding.tokens)  # in flight while dX is computed
        outputs = call.sharding.outputs
        products = call.kernels.backward(
            grads[0].contiguous(),
            w_values,
            weight_scale=w_scale,
            x_scale=full_scale,
            e4m3=e4m3,
            expanded=None if w_bf16 is None else Expanded(w_bf16, largest),
            gather=partial(gather_rows, group=outputs) if group_size(outputs) > 1 else None,
        )
        dx, reducing = _reduce_input_grad(products.dgrad(), call.sharding)  # in flight while dW is computed
        if gathering is not None:
            gathering.wait()
        dw = _weight_grad(products, full_values, full_scale, ctx.weight)
        if reducing is not None:
            reducing.wait()
        if straight_through_scale is not None:
            dx = dx * straight_through_scale
        if ctx.front is None:
            return dx, dw, None, None, None, None
        x, gain, rstd = before
        dx, dgain = ctx.front.fused.backward(dx, x, ctx.front.before(gain), rstd)
        return dx, dw, dgain, None, None, None


def product_again(y: Tensor) -> Callable[[], Tensor] | None:
    """How to compute a result of `qsparse_linear` again from what it keeps for its backward pass.

    None: `y` is nothing of that kind, or needs no gradient.  To be called before that backward pass has run.
    """
    node: Any = y.grad_fn
    if not isinstance(y.grad_fn, _QSparseLinear._backward_cls):
        return None
    dtype = y.dtype

    def compute() -> Tensor:
        values, x_scale, weight, w_scale, *_ = node.saved_tensors
        full = _gather_tokens(Operand(values, x_scale), node.call.sharding.tokens)
        y = node.call.kernels.linear(full.values, weight, x_scale=full.scale, weight_scale=w_scale, dtype=dtype)
        return reduce_scatter(y, node.call.sharding.outputs)

    return compute


def _weight_grad(products: Backward, x: Tensor, x_scale: Tensor | None, weight: Tensor) -> Tensor | None:
    """dW, or its place holder if it went straight into the gradient buffer of megatron-core's data parallelism."""
    main_grad = main_grad_of(weight)
    dw = products.wgrad(x, x_scale, main_grad)
    return place_holder(weight) if dw is None else dw.to(weight.dtype)


def prepare_input(x: Tensor, call: LinearCall) -> tuple[Operand, Tensor | None]:
    """Quantized and sparsified input, and the factor that the input gradient keeps (L2 rescale) or None."""
    if is_one_pass(call):
        return Operand(*call.kernels.sparsify(x, *_kept_of_block(x.shape[-1], call))), None
    if (fused := _sharded(x, call)) is not None:
        kept, block = _kept_of_block(_row_features(x.shape[-1], call), call)
        codes, scale, _ = fused.sparsify(x, kept, block, Before())
        return Operand(codes, scale), None
    operand = Operand(x)
    if call.format.activations == "int8":
        gamma = x.abs().amax(-1, keepdim=True)
        if group_size(call.sharding.features) > 1:
            dist.all_reduce(gamma, op=dist.ReduceOp.MAX, group=call.sharding.features)
        scale = reference.row_scale(gamma)
        operand = Operand(reference.absmax_codes(x, scale), scale)
    operand = _sparse(x, operand, call)
    if call.format.rescale == "l2" and call.sparsity > 0.0:
        scale = _inverse_norm(operand.values, call.sharding.features)
        return Operand(operand.values, scale), scale.to(x.dtype)
    return operand, None


def _sparse(x: Tensor, operand: Operand, call: LinearCall) -> Operand:
    """The operand, or during the warm-up of the quantization x on its way to it, without what is not kept."""
    is_int8 = call.format.activations == "int8"
    spread = call.format.pattern == "topk" and call.format.topk_scope == "global"
    if call.sparsity > 0.0 and not is_int8 and not (spread and group_size(call.sharding.features) > 1):
        kept, block = _kept_of_block(x.shape[-1], call)
        assert kept is not None
        return Operand(call.kernels.largest(x, kept, block))
    mask = _sparsity_mask(operand.values, call)
    if call.quantization < 1.0 and is_int8:
        operand = Operand(_interpolate(x, operand, call.quantization))
    return operand if mask is None else Operand(reference.apply_mask(operand.values, mask), operand.scale)


def prepare_fused(
    x: Tensor, gain: Tensor | None, call: LinearCall, front: Front, *, num_features: int
) -> tuple[Operand, Tensor | None]:
    """Input after `front`, quantized and sparsified, and 1/rms of the norm or None."""
    kept, block = _kept_of_block(_row_features(num_features, call), call)
    codes, scale, rstd = front.fused.sparsify(x, kept, block, front.before(gain))
    return Operand(codes, scale), rstd


def _sharded(x: Tensor, call: LinearCall) -> Fused | None:
    """Kernels for int8 codes of a row that several ranks hold, if there are any."""
    group = call.sharding.features
    if group_size(group) == 1 or call.format.activations != "int8" or call.quantization < 1.0:
        return None
    return fused_for(call.kernels, call.format, x.dtype, x.shape[-1], group)


def _row_features(features: int, call: LinearCall) -> int:
    """Features that K is taken from, of which this rank has `features`."""
    return features * (group_size(call.sharding.features) if call.format.topk_scope == "global" else 1)


def is_one_pass(call: LinearCall) -> bool:
    """Whether one kernel can quantize and sparsify: int8 codes of a row that this rank holds alone."""
    whole_row = group_size(call.sharding.features) == 1
    return call.format.activations == "int8" and call.quantization == 1.0 and whole_row


def _kept_of_block(num_features: int, call: LinearCall) -> tuple[int | None, int | None]:
    """(features kept, out of how many consecutive ones); None: all of them, the row."""
    if call.sparsity == 0.0:
        return None, None
    block = call.format.block_size if call.format.pattern == "block" else None
    return kept_count(block or num_features, call.sparsity), block


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


def _interpolate(full: Tensor, quantized: Operand, fraction: float) -> Tensor:
    return full + fraction * (quantized.dequantize(full.dtype) - full)


def _inverse_norm(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """1 / ||row||_2 (+1e-6, as third-party code has it), float32 or wider; rows may be sharded over `group`."""
    work = torch.promote_types(values.dtype, torch.float32)
    squares = values.to(work).square().sum(-1, keepdim=True)
    if group_size(group) > 1:
        dist.all_reduce(squares, group=group)
    return 1.0 / (squares.sqrt() + 1e-6)


def prepare_weight(weight: Tensor, call: LinearCall) -> Operand:
    """Ternary codes and the scale of each row [O, 1], or the master weight."""
    if call.format.weights == "full":
        return Operand(weight)
    is_full = call.quantization == 1.0
    ternary = partial(_ternary, weight, call)
    expander = call.expander if is_full else None
    codes = ternary() if call.cache is None else call.cache.get(call.weight_version, ternary, expander)
    return codes if is_full else Operand(_interpolate(weight, codes, call.quantization))


def _ternary(weight: Tensor, call: LinearCall) -> Operand:
    scale = ternary_scale(weight, call)
    return Operand(reference.ternary_codes(weight, scale), scale)


def ternary_scale(weight_OD: Tensor, call: LinearCall) -> Tensor:
    """float32 absmean scale over all shards: [1] for the matrix, or [O, 1], each row with its part's."""
    group = call.sharding.weight
    parts = call.parts.split(weight_OD)
    sums = torch.stack([reference.absmean_sum(part) for part in parts])
    if group_size(group) > 1:
        dist.all_reduce(sums, group=group)
    counts = [part.numel() * group_size(group) for part in parts]
    if len(parts) == 1 or call.format.ternary_scale == "matrix":
        return reference.absmean_scale(sums.sum(), sum(counts)).view(1)
    scales = torch.stack([reference.absmean_scale(total, count) for total, count in zip(sums, counts, strict=True)])
    return call.parts.expand(scales).unsqueeze(-1)


def _gather_tokens(local: Operand, group: dist.ProcessGroup | None) -> Operand:
    """All tokens of a sequence-sharded operand: int8 codes and one scale per token travel, not floats."""
    return Operand(gather_rows(local.values, group), None if local.scale is None else gather_rows(local.scale, group))


def _reduce_input_grad(dx: Tensor, sharding: Sharding) -> tuple[Tensor, dist.Work | None]:
    """Start the sum of the input gradient over ranks; returns where it will be and what to wait for."""
    if group_size(sharding.tokens) > 1:
        return start_reduce_scatter(dx, sharding.tokens)
    if group_size(sharding.dgrad) > 1:
        return dx, dist.all_reduce(dx, group=sharding.dgrad, async_op=True)
    return dx, None
