"""Experts in a few launches instead of a few per expert: the same modules, parameters and results as in `moe.experts`.

Quantization, SubLN and activation look at one token, so they run once over the tokens of all local experts, on a GPU
in one pass (`moe.front`); the two products are grouped (`moe.products`).  Nothing here waits for the GPU.

Ternary codes come from each layer's own cache and are stacked once per step (and, with `run.keep_bf16_weights`, brought
to bf16), and weight gradients are added to each expert's own buffer, wherever it lies.  That experts keep their own
parameters, instead of one tall tensor, costs this copy of codes (half of the bf16 weights' bytes, once per step) and
buys checkpoints, rules, initialization and optimizer state without a second form.

Experts in bf16 run as block-sparse products (`moe.block_sparse`); those of several formats, or whose quantization is in
its warm-up, one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe.block_sparse import BlockSparseExperts
from moe.dispatcher import ExpertInput
from moe.experts import QSparseSequentialMLP
from moe.front import GroupedFused
from moe.gradient_buffers import GradientBuffers
from moe.per_step import PerStep, is_captured
from moe.products import GroupedProducts, StackedWeights, grouped_products_for
from qsparse_layers.functional import prepare_fused, prepare_input, prepare_weight
from qsparse_layers.linear_call import Codes, Front, LinearCall, Sharding
from qsparse_layers.main_grad import place_holder
from qsparse_layers.mlp import activate, activation_name
from qsparse_layers.norm import rms_norm
from qsparse_layers.parallel import QSparseLinearMixin, QSparseRowParallelLinear
from qsparse_layers.stats import ZeroCounts


class QSparseGroupedMLP(QSparseSequentialMLP):
    """`QSparseSequentialMLP` through grouped products."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stacks = [_Stack(), _Stack()]
        self._block_sparse = BlockSparseExperts(self.config)
        for expert in self.local_experts:
            expert.linear_fc1.is_stacked = expert.linear_fc2.is_stacked = True

    def outputs(self, tokens: ExpertInput, tokens_per_expert: Tensor) -> Tensor:
        """Unweighted outputs [T, hidden]."""
        ups = [expert.linear_fc1 for expert in self.local_experts]
        downs = [expert.linear_fc2 for expert in self.local_experts]
        if self._block_sparse.takes(tokens, ups, downs):
            return self._block_sparse.outputs(tokens.x, _offsets(tokens_per_expert, tokens.x.device), ups, downs)
        if not (_is_groupable(ups) and _is_groupable(downs)):
            if is_captured(tokens.x):
                raise RuntimeError("these experts run one after the other: set run.cuda_graph=false")
            return super().outputs(tokens, tokens_per_expert)
        offsets = _offsets(tokens_per_expert, tokens.x.device)
        hidden = _grouped_linear(tokens, ups, offsets, self._stacks[0])
        gains = torch.stack([layer.sub_norm_weight for layer in downs]) if downs[0].format.sub_norm else None
        front = downs[0].front(activation_name(self.config)) if downs[0].tp_group.size() == 1 else None
        if front is not None and front.activation is not None:
            front = replace(front, fused=GroupedFused(front.fused, offsets))
            return _grouped_linear(ExpertInput(hidden), downs, offsets, self._stacks[1], front, gains)
        hidden = activate(hidden, self.config, downs[0].kernels.fused)
        if gains is not None:
            hidden = _sub_norm(hidden, gains, downs[0], offsets)
        return _grouped_linear(ExpertInput(hidden), downs, offsets, self._stacks[1])


def _is_groupable(layers: Sequence[QSparseLinearMixin]) -> bool:
    """Whether the layers multiply int8 codes by ternary codes, all in one format."""
    first = layers[0]
    if first.format.weights == "full" or first.format.activations == "full" or first.schedule.quantization < 1.0:
        return False
    return all(layer.format == first.format for layer in layers)


def _offsets(tokens_per_expert: Tensor, device: torch.device) -> Tensor:
    """int32 [E + 1], first row of each expert and T at the end; megatron-core counts on the host."""
    ends = tokens_per_expert.to(device, non_blocking=True).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)


def _sub_norm(x_TF: Tensor, gains_EF: Tensor, layer: Any, offsets: Tensor) -> Tensor:
    """RMSNorm of each row with the gain of its expert; rows may be sharded as those of `layer`."""
    tokens = torch.arange(len(x_TF), device=x_TF.device, dtype=torch.int32)
    expert_T = torch.searchsorted(offsets[1:], tokens, right=True)
    return rms_norm(x_TF, gains_EF[expert_T], layer.input_size, layer.config.layernorm_epsilon, layer.tp_group)


class _Stack:
    """What the experts' layers of one kind have in common: their codes in one tensor, their gradients in one table."""

    def __init__(self) -> None:
        self._codes: PerStep[StackedWeights] = PerStep()
        self.buffers = GradientBuffers()

    def codes(
        self, layers: Sequence[QSparseLinearMixin], sharding: Sharding, products: GroupedProducts
    ) -> StackedWeights:
        """The ternary codes of `layers`, good until the weights change; in bf16, too, if `products` keep that."""

        def stack() -> StackedWeights:
            operands = [prepare_weight(layer.weight, layer.call(sharding)) for layer in layers]
            stacked = StackedWeights.of([(operand.values, operand.scale) for operand in operands])
            if layers[0].schedule.weight_version is None or layers[0].format.gradients != "full":
                return stacked
            return replace(stacked, expanded=products.expand(stacked))

        return self._codes.get(layers[0], stack)


def _grouped_linear(
    tokens: ExpertInput,
    layers: Sequence[QSparseLinearMixin],
    offsets: Tensor,
    stack: _Stack,
    front: Front | None = None,
    gains: Tensor | None = None,
) -> Tensor:
    """Each expert's layer on its tokens; `front` and the `gains` [E, F] of its norm come first."""
    group = layers[0].tp_group
    features = group if isinstance(layers[0], QSparseRowParallelLinear) else None
    sharding = Sharding(weight=group, features=features)
    call = layers[0].call(sharding)
    products = grouped_products_for(call.kernels)
    counts = None if call.counts is None else [layer.counts for layer in layers]
    work = _Work(call, stack, stack.codes(layers, sharding, products), counts, offsets, products, front)
    return _GroupedLinear.apply(tokens.x, gains, tokens.codes, work, *(layer.weight for layer in layers))


@dataclass(frozen=True)
class _Work:
    """Everything but what has gradients."""

    call: LinearCall
    """Of the first expert's layer; the others' have the same format."""
    stack: _Stack
    stacked: StackedWeights
    counts: list[ZeroCounts] | None
    offsets: Tensor
    products: GroupedProducts
    front: Front | None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gains: Tensor | None, codes: Codes | None, work: _Work, *weights: Tensor
    ) -> Tensor:
        rstd: Tensor | None = None
        before: tuple[Tensor | None, ...] = ()
        if codes is None:
            if work.front is None:
                operand, _ = prepare_input(x, work.call)
            else:
                num_features = work.stacked.codes.shape[-1]
                operand, rstd = prepare_fused(x, gains, work.call, work.front, num_features=num_features)
                before = (x, gains, rstd)
            assert operand.scale is not None
            codes = Codes(operand.values, operand.scale)
        _count(codes, work)
        ctx.work, ctx.weights = work, weights
        ctx.save_for_backward(codes.values, codes.scale, *before)
        return work.products.forward(codes, work.stacked, work.offsets, dtype=x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        work: _Work = ctx.work
        values, scale, *before = ctx.saved_tensors
        main_grads = work.stack.buffers.table(ctx.weights)
        dx, dws = work.products.backward(
            grads[0].contiguous(), Codes(values, scale), work.stacked, work.offsets,
            e4m3=work.call.format.gradients == "e4m3", main_grads=main_grads,
        )  # fmt: skip
        dgains = None
        if work.front is not None:
            x, gains, rstd = before
            dx, dgains = work.front.fused.backward(dx, x, work.front.before(gains), rstd)
        if dws is None:
            return dx, dgains, None, None, *map(place_holder, ctx.weights)
        return dx, dgains, None, None, *(dw.to(weight.dtype) for dw, weight in zip(dws, ctx.weights, strict=True))


def _count(codes: Codes, work: _Work) -> None:
    """Count zeros, expert by expert; only in steps that are logged."""
    if work.counts is None:
        return
    bounds = work.offsets.tolist()
    for expert, counts in enumerate(work.counts):
        counts.add(codes.values[bounds[expert] : bounds[expert + 1]], work.stacked.codes[expert])
