"""Experts in a few launches instead of a few per expert: the same modules, parameters and results as in `moe.experts`.

Quantization, SubLN and activation look at one token, so they run once over the tokens of all local experts; the two
products are grouped (`moe.products`).  Ternary codes come from each layer's own cache and are stacked once per step.
That every expert keeps its own parameters, instead of one tall tensor, costs this copy of codes (a quarter of the bf16
weights' bytes, once per step) and buys checkpoints, rules, initialization and optimizer state without a second form.

Experts of several formats, or quantization in its warm-up, run one after the other.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moe.dispatcher import ExpertInput
from moe.experts import QSparseSequentialMLP
from moe.products import GroupedProducts, StackedWeights, grouped_products_for
from qsparse_layers.functional import Codes, LinearCall, Sharding, prepare_input, prepare_weight
from qsparse_layers.mlp import activate
from qsparse_layers.norm import rms_norm
from qsparse_layers.parallel import QSparseLinearMixin


class QSparseGroupedMLP(QSparseSequentialMLP):
    """`QSparseSequentialMLP` through grouped products."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stacks = [_StackCache(), _StackCache()]

    def outputs(self, tokens: ExpertInput, tokens_per_expert: Tensor) -> Tensor:
        """Unweighted outputs [T, hidden]."""
        ups = [expert.linear_fc1 for expert in self.local_experts]
        downs = [expert.linear_fc2 for expert in self.local_experts]
        if not (_is_groupable(ups) and _is_groupable(downs)):
            return super().outputs(tokens, tokens_per_expert)
        offsets = _offsets(tokens_per_expert, tokens.x.device)
        hidden = _grouped_linear(tokens.x, tokens.codes, ups, offsets, self._stacks[0])
        hidden = activate(hidden, self.config, downs[0].kernels.fused)
        if downs[0].format.sub_norm:
            hidden = _sub_norm(hidden, downs, offsets, self.config.layernorm_epsilon)
        return _grouped_linear(hidden, None, downs, offsets, self._stacks[1], shards_features=True)


def _is_groupable(layers: Sequence[QSparseLinearMixin]) -> bool:
    """Whether the layers multiply int8 codes by ternary codes, all in one format."""
    first = layers[0]
    if any(layer.format != first.format for layer in layers) or first.schedule.quantization < 1.0:
        return False
    return first.format.weights == "ternary" and first.format.activations == "int8"


def _offsets(tokens_per_expert: Tensor, device: torch.device) -> Tensor:
    """int32 [E + 1], first row of each expert and T at the end."""
    ends = tokens_per_expert.to(device).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)


def _sub_norm(x_TD: Tensor, layers: Sequence[Any], offsets: Tensor, eps: float) -> Tensor:
    """RMSNorm of each row with the gain of its expert."""
    gains_ED = torch.stack([layer.sub_norm_weight for layer in layers])
    tokens = torch.arange(len(x_TD), device=x_TD.device, dtype=torch.int32)
    expert_T = torch.searchsorted(offsets[1:], tokens, right=True)
    return rms_norm(x_TD, gains_ED[expert_T], layers[0].input_size, eps, layers[0].tp_group)


class _StackCache:
    """Stacked ternary codes, good until the weights change."""

    def __init__(self) -> None:
        self._version: int | None = None
        self._stacked: StackedWeights | None = None

    def get(self, layers: Sequence[QSparseLinearMixin], calls: list[LinearCall]) -> StackedWeights:
        """The codes of `layers` under `calls`."""
        version = calls[0].weight_version
        if self._stacked is None or version is None or version != self._version:
            operands = [prepare_weight(layer.weight, call) for layer, call in zip(layers, calls, strict=True)]
            self._stacked = StackedWeights.of([(operand.values, operand.scale) for operand in operands])
            self._version = version
        return self._stacked


def _grouped_linear(
    x: Tensor,
    codes: Codes | None,
    layers: Sequence[QSparseLinearMixin],
    offsets: Tensor,
    stacks: _StackCache,
    *,
    shards_features: bool = False,
) -> Tensor:
    group = layers[0].tp_group
    sharding = Sharding(weight=group, features=group if shards_features else None)
    calls = [layer.call(sharding) for layer in layers]
    products = grouped_products_for(calls[0].kernels)
    weights = [layer.weight for layer in layers]
    return _GroupedLinear.apply(x, codes, calls, stacks.get(layers, calls), offsets, products, *weights)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        codes: Codes | None,
        calls: list[LinearCall],
        stacked: StackedWeights,
        offsets: Tensor,
        products: GroupedProducts,
        *weights: Tensor,
    ) -> Tensor:
        rescale = None
        if codes is None:
            operand, rescale = prepare_input(x, calls[0])
            assert operand.scale is not None and rescale is None  # l2 rescale and int8 codes exclude each other
            codes = Codes(operand.values, operand.scale)
        _count(codes, stacked, calls, offsets)
        ctx.save_for_backward(codes.values, codes.scale, offsets)
        ctx.stacked, ctx.products, ctx.weights = stacked, products, weights
        ctx.e4m3 = calls[0].format.gradients == "e4m3"
        return products.forward(codes, stacked, offsets, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        values, scale, offsets = ctx.saved_tensors
        dx, dw_EOD = ctx.products.backward(
            grads[0].contiguous(), Codes(values, scale), ctx.stacked, offsets, e4m3=ctx.e4m3
        )
        dws = [_hand_over(dw, weight) for dw, weight in zip(dw_EOD, ctx.weights, strict=True)]
        return dx, None, None, None, None, None, *dws


def _hand_over(dw: Tensor, weight: Tensor) -> Tensor:
    """dW, or its place holder if it was added to megatron-core's gradient buffer (see `functional._weight_grad`)."""
    main_grad: Tensor | None = getattr(weight, "main_grad", None)
    if main_grad is None or not weight.is_cuda or main_grad.dtype != torch.float32:
        return dw.to(weight.dtype)
    main_grad.add_(dw)
    setattr(weight, "grad_added_to_main_grad", True)  # noqa: B010 - megatron-core's mark on a parameter
    return torch.empty_like(weight)


def _count(codes: Codes, stacked: StackedWeights, calls: list[LinearCall], offsets: Tensor) -> None:
    """Count zeros, expert by expert; only in steps that are logged."""
    if calls[0].counts is None:
        return
    bounds = offsets.tolist()
    for expert, call in enumerate(calls):
        assert call.counts is not None
        call.counts.add(codes.values[bounds[expert] : bounds[expert + 1]], stacked.codes[expert])
