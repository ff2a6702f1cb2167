"""megatron-core's feed-forward block with its activation function in one pass, or inside the down projection.

A down projection that quantizes a whole row computes the activation together with SubLN and quantization: gate and up
are read once, codes written once, and the backward recomputes what is in between.  On request it computes the gate and
up projections again, too, instead of keeping them (`recompute`).
"""

from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer.mlp import MLP
from torch import Tensor
from torch.nn import Module

from kernels.dispatch import Activation, Before, Fused
from qsparse_layers.parallel import QSparseRowParallelLinear
from qsparse_layers.recompute import recomputed


class QSparseMLP(MLP):
    """`MLP` with the same parameters and results; made from one by `adopt`."""

    recompute = False
    """Compute the up projection again in the backward pass."""

    @classmethod
    def adopt(cls, mlp: MLP, *, recompute: bool = False) -> "QSparseMLP":
        """The block `mlp` itself, as one of this class: megatron-core builds only the class `MLP` without ado."""
        adopted = cls.__new__(cls)
        adopted.__dict__ = mlp.__dict__
        adopted.recompute = recompute
        return adopted

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[s, b, hidden] -> [s, b, hidden] and no bias."""
        down, activation = self.linear_fc2, activation_name(self.config)
        is_ours = isinstance(down, QSparseRowParallelLinear) and activation is not None and per_token_scale is None
        fused = down.kernels.fused if is_ours and hidden_states.dtype == torch.bfloat16 else None
        if not is_ours or (fused is None and not self.recompute):
            return super().forward(hidden_states, per_token_scale, **kwargs)
        hidden, _ = self.linear_fc1(hidden_states)
        with recomputed(hidden) if self.recompute else nullcontext():
            if fused is not None and down.front(activation):
                return down(hidden, activation)
            return down(activate(hidden, self.config, fused))


def activation_name(config: Any) -> Activation | None:
    """The activation function of megatron-core's configuration, if our kernels have it."""
    gated = config.gated_linear_unit
    if config.activation_func is squared_relu:
        return "relu2_glu" if gated else "relu2"
    return "swiglu" if gated and config.activation_func is torch.nn.functional.silu else None


def activate(x: Tensor, config: Any, fused: Fused | None) -> Tensor:
    """The activation function of a feed-forward block: [..., ffn] or [..., gate | up] -> [..., ffn]."""
    name = activation_name(config)
    if fused is not None and name is not None and x.dtype == torch.bfloat16:
        return _Activate.apply(x, name, fused)
    if not config.gated_linear_unit:
        return config.activation_func(x)
    gate, up = x.chunk(2, dim=-1)
    return config.activation_func(gate) * up


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation, fused: Fused) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation, ctx.fused = activation, fused
        return fused.activate(x, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return ctx.fused.backward(grads[0], x, Before(ctx.activation), None)[0], None, None


def fuse_activations(model: Module, *, recompute: bool = False) -> None:
    """Let the feed-forward blocks of `model` compute their activation with the kernels of their down projection.

    Args:
        model: one pipeline chunk.
        recompute: compute gate and up again in the backward pass instead of keeping them.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is MLP:
                setattr(parent, name, QSparseMLP.adopt(child, recompute=recompute))
